// The instantiations of the sparse divergence kernel for ptxsim.
#include "cuda/sparse_divergence.cuh"

using namespace distillm;

template __global__ void distillm::sparse_divergence_kernel<float>(const SparseDivergenceArguments);
template __global__ void distillm::sparse_divergence_kernel<BFloat16>(const SparseDivergenceArguments);
template __global__ void distillm::sparse_divergence_kernel<Half>(const SparseDivergenceArguments);
