// `topk_logits` on the CPU: rows are shared out over torch's threads; each thread runs the kernel of this processor.
#include "../instruction_sets/row_kernels.h"

namespace distillm {
namespace {

struct Cpu {
  static void run(const TopkLogitsTensors&, const TopkLogitsCall& call) {
    const TopkLogitsRows rows = row_kernels().topk_logits(call.type == ScalarType::Double);
    const int64_t grain = rows_per_task(call.vocab + call.k);
    torch::stable::parallel_for(0, call.rows, grain, [&](int64_t begin, int64_t end) { rows(call, begin, end); });
  }
};

}  // namespace
}  // namespace distillm

STABLE_TORCH_LIBRARY_IMPL(distillm_ext, CPU, m) {
  m.impl("topk_logits", TORCH_BOX(&distillm::topk_logits<distillm::Cpu>));
}
