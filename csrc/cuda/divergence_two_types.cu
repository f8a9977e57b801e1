// The teacher has another dtype than the student, known at run time only.
#include "divergence_kernels.cuh"

namespace distillm {

template <class Student>
using AnyType = AnyElement;

DivergenceKernel divergence_kernel_of_two_types(const DivergenceCall& call) { return kernel_of_member<AnyType>(call); }

}  // namespace distillm
