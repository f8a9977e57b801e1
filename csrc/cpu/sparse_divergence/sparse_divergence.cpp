// `sparse_divergence` on the CPU: rows are shared out over torch's threads; each thread runs the kernel of this
// processor.
#include "../instruction_sets/row_kernels.h"
#include "../memory/gradient_memory.h"

namespace distillm {
namespace {

struct Cpu {
  static Tensor new_gradient(const Tensor& like) { return recycled_empty_like(like); }

  static void run(const SparseDivergenceTensors& t) {
    const DivergenceCall& dense = t.call.dense;
    const std::string& name = dense.options.divergence;
    const bool float64 = dense.student_type == ScalarType::Double;
    const SparseDivergenceRows rows = row_kernels().sparse_divergence(name.c_str(), t.call.tail, float64);
    STD_TORCH_CHECK(rows, "divergence '", name, "' has no CPU kernel for this tail");
    const int64_t grain = rows_per_task(dense.student_vocab);
    torch::stable::parallel_for(0, dense.rows, grain, [&](int64_t begin, int64_t end) { rows(t.call, begin, end); });
  }
};

}  // namespace
}  // namespace distillm

STABLE_TORCH_LIBRARY_IMPL(distillm_ext, CPU, m) {
  m.impl("sparse_divergence", TORCH_BOX(&distillm::SparseDivergenceOps<distillm::Cpu>::sparse_divergence));
  m.impl("sparse_divergence_", TORCH_BOX(&distillm::SparseDivergenceOps<distillm::Cpu>::sparse_divergence_));
}
