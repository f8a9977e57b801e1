// Every kernel of the divergences, of scaling and of the codec, without torch: for ptxas to report registers and spills of.
#include "cuda/divergence/divergence.cuh"
#include "cuda/pack_logits/pack_logits.cuh"
#include "cuda/scale_rows/scale_rows.cuh"
#include "cuda/pack_logits/unpack_logits.cuh"

using namespace distillm;

#define KERNEL(Member, T) \
  template __global__ void distillm::divergence_kernel<Member<float>, T>(const DivergenceArguments);
#define KERNELS_OF(Member) \
  KERNEL(Member, float)    \
  KERNEL(Member, BFloat16) \
  KERNEL(Member, Half)     \
  KERNEL(Member, AnyElement)
#define KERNELS(public_name, Positive, AtZero, Functor) KERNELS_OF(Functor)
DISTILLM_FOR_EACH_DIVERGENCE(KERNELS)
KERNELS_OF(Interpolated)
KERNELS_OF(AdaptiveKl)

template __global__ void distillm::scale_rows_kernel<float>(float*, RowLayout, const float*, int32_t);
template __global__ void distillm::scale_rows_kernel<BFloat16>(BFloat16*, RowLayout, const float*, int32_t);
template __global__ void distillm::scale_rows_kernel<Half>(Half*, RowLayout, const float*, int32_t);
