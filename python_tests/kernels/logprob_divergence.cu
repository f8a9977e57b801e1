// The instantiations of the logprob_divergence kernel, for ptxsim and for ptxas.
#include "cuda/logprob_divergence/logprob_divergence.cuh"

using namespace distillm;

#define KERNEL(Functor, kProbabilities, T)                                                                          \
  template __global__ void distillm::logprob_divergence_kernel<LogprobTerms<float, Functor<float>, kProbabilities>, \
                                                               T>(const LogprobDivergenceArguments);
#define KERNELS(known_name, Functor, kProbabilities) \
  KERNEL(Functor, kProbabilities, float)             \
  KERNEL(Functor, kProbabilities, BFloat16)          \
  KERNEL(Functor, kProbabilities, Half)              \
  KERNEL(Functor, kProbabilities, AnyElement)
DISTILLM_FOR_EACH_LOGPROB_DIVERGENCE(KERNELS)
