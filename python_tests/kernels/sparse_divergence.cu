// The sparse divergence kernel: for ptxsim the instantiation chosen by -DSTUDENT=, for ptxas all of them.
#include "cuda/sparse_divergence/sparse_divergence.cuh"

using namespace distillm;

#ifdef STUDENT
template __global__ void distillm::sparse_divergence_kernel<STUDENT>(const SparseDivergenceArguments);
#else
template __global__ void distillm::sparse_divergence_kernel<float>(const SparseDivergenceArguments);
template __global__ void distillm::sparse_divergence_kernel<BFloat16>(const SparseDivergenceArguments);
template __global__ void distillm::sparse_divergence_kernel<Half>(const SparseDivergenceArguments);
#endif
