// The teacher has another dtype than the student, known at run time only.
#include "divergence_kernels.cuh"

namespace distillm {
namespace {

struct ByStudent {
  template <class Member>
  static DivergenceKernel kernel(const DivergenceCall& call) {
    switch (element_type(call.student_type)) {
      case ElementType::kBFloat16: return instantiated<Member, BFloat16, AnyElement>();
      case ElementType::kHalf: return instantiated<Member, Half, AnyElement>();
      default: return instantiated<Member, float, AnyElement>();
    }
  }
};

}  // namespace

DivergenceKernel divergence_kernel_of_two_types(const DivergenceCall& call) {
  return kernel_of_member<ByStudent>(call);
}

}  // namespace distillm
