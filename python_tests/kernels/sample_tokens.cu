// The instantiations of the sample_tokens kernel for ptxsim: for LOGITS where that is given, which builds sooner, else
// for all types.
#include "cuda/sample_tokens/sample_tokens.cuh"

using namespace distillm;

#ifdef LOGITS
template __global__ void distillm::sample_tokens_kernel<LOGITS>(const SampleArguments);
#else
template __global__ void distillm::sample_tokens_kernel<float>(const SampleArguments);
template __global__ void distillm::sample_tokens_kernel<BFloat16>(const SampleArguments);
template __global__ void distillm::sample_tokens_kernel<Half>(const SampleArguments);
#endif
