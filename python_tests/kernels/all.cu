// Every kernel that the extension instantiates, without torch: for ptxas to report registers and spills of.
#include "cuda/divergence.cuh"
#include "cuda/pack_logits.cuh"
#include "cuda/scale_rows.cuh"
#include "cuda/unpack_logits.cuh"

using namespace distillm;

#define KERNEL(Functor, Student, Teacher) \
  template __global__ void distillm::divergence_kernel<Functor<float>, Student, Teacher>(const DivergenceArguments);
#define KERNELS(public_name, Positive, AtZero, Functor)   \
  KERNEL(Functor, float, float)         \
  KERNEL(Functor, BFloat16, BFloat16)   \
  KERNEL(Functor, Half, Half)           \
  KERNEL(Functor, float, AnyElement)    \
  KERNEL(Functor, BFloat16, AnyElement) \
  KERNEL(Functor, Half, AnyElement)
DISTILLM_FOR_EACH_DIVERGENCE(KERNELS)

template __global__ void distillm::scale_rows_kernel<float>(float*, const float*, int32_t);
template __global__ void distillm::scale_rows_kernel<BFloat16>(BFloat16*, const float*, int32_t);
template __global__ void distillm::scale_rows_kernel<Half>(Half*, const float*, int32_t);
