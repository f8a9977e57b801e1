// `sample_tokens` on the CPU: rows are shared out over torch's threads; each thread runs the kernel of this processor.
#include "../instruction_sets/row_kernels.h"

namespace distillm {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> sample_tokens(
    const Tensor& logits, const std::optional<Tensor>& temperature_rows, const std::optional<Tensor>& top_k_rows,
    const std::optional<Tensor>& top_p_rows, const std::optional<Tensor>& min_p_rows,
    const std::optional<Tensor>& penalty_rows, const std::optional<Tensor>& seed_rows,
    const std::optional<Tensor>& position_rows, const std::optional<Tensor>& previous,
    const std::optional<Tensor>& banned, const std::optional<Tensor>& bits, double temperature, int64_t top_k,
    double top_p, double min_p, double penalty, int64_t seed, int64_t position) {
  const SampleTensors t = prepare_sample({logits, temperature_rows, top_k_rows, top_p_rows, min_p_rows, penalty_rows,
                                          seed_rows, position_rows, previous, banned, bits},
                                         temperature, top_k, top_p, min_p, penalty, seed, position);
  const int64_t grain = rows_per_task(t.call.vocab);
  const SampleRows rows = row_kernels().sample_tokens;
  torch::stable::parallel_for(0, t.call.rows, grain, [&](int64_t begin, int64_t end) { rows(t, begin, end); });
  return t.outputs();
}

}  // namespace
}  // namespace distillm

STABLE_TORCH_LIBRARY_IMPL(distillm_ext, CPU, m) { m.impl("sample_tokens", TORCH_BOX(&distillm::sample_tokens)); }
