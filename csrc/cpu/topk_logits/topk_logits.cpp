// `topk_logits` on the CPU: rows are shared out over torch's threads; each thread runs the kernel of this processor.
#include "../instruction_sets/row_kernels.h"

namespace distillm {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> topk_logits(
    const Tensor& logits, const std::optional<Tensor>& labels, const std::optional<Tensor>& position, int64_t k,
    std::vector<double> temperatures, int64_t seed) {
  const TopkLogitsTensors t = prepare_topk_logits(logits, labels, position, k, std::move(temperatures));
  const TopkLogitsCall call = t.call(k, seed);
  const TopkLogitsRows rows = row_kernels().topk_logits(call.type == ScalarType::Double);
  const int64_t grain = rows_per_task(call.vocab + k);
  torch::stable::parallel_for(0, call.rows, grain, [&](int64_t begin, int64_t end) { rows(call, begin, end); });
  return t.outputs();
}

}  // namespace
}  // namespace distillm

STABLE_TORCH_LIBRARY_IMPL(distillm_ext, CPU, m) { m.impl("topk_logits", TORCH_BOX(&distillm::topk_logits)); }
