// The instantiations of the zero_rest kernel for ptxsim.
#include "cuda/zero_rest.cuh"

using namespace distillm;

template __global__ void distillm::zero_rest_kernel<float>(float*, RowLayout, int32_t, int32_t);
template __global__ void distillm::zero_rest_kernel<BFloat16>(BFloat16*, RowLayout, int32_t, int32_t);
template __global__ void distillm::zero_rest_kernel<Half>(Half*, RowLayout, int32_t, int32_t);
