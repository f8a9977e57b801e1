// `divergence` on the CPU: rows are shared out over torch's threads; each thread runs the kernel of this processor.
#include "../instruction_sets/row_kernels.h"
#include "../memory/gradient_memory.h"

namespace distillm {
namespace {

struct Cpu {
  static Tensor new_gradient(const Tensor& like) { return recycled_empty_like(like); }

  static void run(const DivergenceTensors& t) {
    const DivergenceCall& call = t.call;
    const std::string& name = call.options.divergence;
    const DivergenceRows rows = row_kernels().divergence(name.c_str(), call.student_type == ScalarType::Double);
    STD_TORCH_CHECK(rows, "divergence '", name, "' has no CPU kernel");
    const int64_t grain = rows_per_task(call.student_vocab);
    torch::stable::parallel_for(0, call.rows, grain, [&](int64_t begin, int64_t end) { rows(call, begin, end); });
  }
};

}  // namespace
}  // namespace distillm

STABLE_TORCH_LIBRARY_IMPL(distillm_ext, CPU, m) {
  m.impl("divergence", TORCH_BOX(&distillm::DivergenceOps<distillm::Cpu>::divergence));
  m.impl("divergence_", TORCH_BOX(&distillm::DivergenceOps<distillm::Cpu>::divergence_));
}
