// `sample_tokens` on the CPU: rows are shared out over torch's threads; each thread runs the kernel of this processor.
#include "../instruction_sets/row_kernels.h"

namespace distillm {
namespace {

struct Cpu {
  static void run(const SampleTensors& t) {
    const SampleRows rows = row_kernels().sample_tokens;
    const int64_t grain = rows_per_task(t.call.vocab);
    torch::stable::parallel_for(0, t.call.rows, grain, [&](int64_t begin, int64_t end) { rows(t, begin, end); });
  }
};

}  // namespace
}  // namespace distillm

STABLE_TORCH_LIBRARY_IMPL(distillm_ext, CPU, m) {
  m.impl("sample_tokens", TORCH_BOX(&distillm::sample_tokens<distillm::Cpu>));
}
