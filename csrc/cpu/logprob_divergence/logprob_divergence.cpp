// `logprob_divergence` on the CPU: rows are shared out over torch's threads; each thread runs the kernel of this
// processor.
#include "../instruction_sets/row_kernels.h"
#include "../memory/gradient_memory.h"

namespace distillm {
namespace {

struct Cpu {
  static Tensor new_gradient(const Tensor& like) { return recycled_empty_like(like); }

  static void run(const LogprobDivergenceTensors& t) {
    const LogprobDivergenceCall& call = t.call;
    const bool float64 = call.student_type == ScalarType::Double;
    const LogprobDivergenceRows rows =
        row_kernels().logprob_divergence(call.divergence.c_str(), call.probabilities, float64);
    STD_TORCH_CHECK(rows, "divergence '", call.divergence, "' is none of forward_kl, reverse_kl, generalized_js");
    const int64_t grain = rows_per_task(call.vocab);
    torch::stable::parallel_for(0, call.rows, grain, [&](int64_t begin, int64_t end) { rows(call, begin, end); });
  }
};

}  // namespace
}  // namespace distillm

STABLE_TORCH_LIBRARY_IMPL(distillm_ext, CPU, m) {
  m.impl("logprob_divergence", TORCH_BOX(&distillm::logprob_divergence<distillm::Cpu>));
}
