// Both sides have the same dtype.
#include "divergence_kernels.cuh"

namespace distillm {
namespace {

struct ByStudent {
  template <class Member>
  static DivergenceKernel kernel(const DivergenceCall& call) {
    switch (element_type(call.student_type)) {
      case ElementType::kBFloat16: return instantiated<Member, BFloat16, BFloat16>();
      case ElementType::kHalf: return instantiated<Member, Half, Half>();
      default: return instantiated<Member, float, float>();
    }
  }
};

}  // namespace

DivergenceKernel divergence_kernel_of_one_type(const DivergenceCall& call) { return kernel_of_member<ByStudent>(call); }

}  // namespace distillm
