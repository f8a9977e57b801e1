// The instantiations of the scale_rows kernel for ptxsim.
#include "cuda/scale_rows/scale_rows.cuh"

using namespace distillm;

template __global__ void distillm::scale_rows_kernel<float>(float*, RowLayout, const float*, int32_t);
template __global__ void distillm::scale_rows_kernel<BFloat16>(BFloat16*, RowLayout, const float*, int32_t);
template __global__ void distillm::scale_rows_kernel<Half>(Half*, RowLayout, const float*, int32_t);
