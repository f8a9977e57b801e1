// Both sides have the same dtype.
#include "divergence_kernels.cuh"

namespace distillm {

template <class Student>
using SameType = Student;

DivergenceKernel divergence_kernel_of_one_type(const DivergenceCall& call) { return kernel_of_member<SameType>(call); }

}  // namespace distillm
