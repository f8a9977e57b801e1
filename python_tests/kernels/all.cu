// Every kernel that the extension instantiates, without torch: for ptxas to report registers and spills of.
#include "cuda/pack_logits.cuh"
#include "cuda/row_metrics.cuh"
#include "cuda/sample_tokens.cuh"
#include "cuda/scale_rows.cuh"
#include "cuda/unpack_logits.cuh"
#include "cuda/zero_rest.cuh"

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

#define METRICS(Student, Teacher) \
  template __global__ void distillm::row_metrics_kernel<Student, Teacher>(const DivergenceArguments);
METRICS(float, float)
METRICS(BFloat16, BFloat16)
METRICS(Half, Half)
METRICS(float, AnyElement)
METRICS(BFloat16, AnyElement)
METRICS(Half, AnyElement)

template __global__ void distillm::scale_rows_kernel<float>(float*, RowLayout, const float*, int32_t);
template __global__ void distillm::scale_rows_kernel<BFloat16>(BFloat16*, RowLayout, const float*, int32_t);
template __global__ void distillm::scale_rows_kernel<Half>(Half*, RowLayout, const float*, int32_t);
template __global__ void distillm::zero_rest_kernel<float>(float*, RowLayout, int32_t, int32_t);
template __global__ void distillm::zero_rest_kernel<BFloat16>(BFloat16*, RowLayout, int32_t, int32_t);
template __global__ void distillm::zero_rest_kernel<Half>(Half*, RowLayout, int32_t, int32_t);

template __global__ void distillm::sample_tokens_kernel<float>(const SampleArguments);
template __global__ void distillm::sample_tokens_kernel<BFloat16>(const SampleArguments);
template __global__ void distillm::sample_tokens_kernel<Half>(const SampleArguments);
