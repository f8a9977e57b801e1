// The instantiations of the sample_tokens kernel for ptxsim.
#include "cuda/sample_tokens.cuh"

using namespace distillm;

template __global__ void distillm::sample_tokens_kernel<float>(const SampleArguments);
template __global__ void distillm::sample_tokens_kernel<BFloat16>(const SampleArguments);
template __global__ void distillm::sample_tokens_kernel<Half>(const SampleArguments);
