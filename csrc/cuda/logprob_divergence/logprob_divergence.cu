// `logprob_divergence` on CUDA: one block per row.
#include "../../ops/logprob_divergence.h"
#include "../row/launch.h"
#include "logprob_divergence.cuh"

namespace distillm {
namespace {

using Kernel = void (*)(LogprobDivergenceArguments);

// T: the dtype of both sides, or AnyElement where they have two. Null: no such divergence.
template <class T>
Kernel kernel_of_type(const LogprobDivergenceCall& call) {
#define DISTILLM_MATCH(known_name, Functor, kProbabilities)                                   \
  if (call.divergence == known_name && call.probabilities == kProbabilities) {                \
    return logprob_divergence_kernel<LogprobTerms<float, Functor<float>, kProbabilities>, T>; \
  }
  DISTILLM_FOR_EACH_LOGPROB_DIVERGENCE(DISTILLM_MATCH)
#undef DISTILLM_MATCH
  return nullptr;
}

Kernel kernel_of(const LogprobDivergenceCall& call) {
  if (call.student_type != call.teacher_type) return kernel_of_type<AnyElement>(call);
  switch (element_type(call.student_type)) {
    case ElementType::kBFloat16: return kernel_of_type<BFloat16>(call);
    case ElementType::kHalf: return kernel_of_type<Half>(call);
    default: return kernel_of_type<float>(call);
  }
}

LogprobDivergenceArguments arguments_of(const LogprobDivergenceCall& call) {
  return {call.student,
          call.teacher,
          call.gradient,
          call.student_rows,
          call.teacher_rows,
          static_cast<const float*>(call.weight),
          static_cast<float*>(call.loss),
          element_type(call.student_type),
          element_type(call.teacher_type),
          static_cast<int32_t>(call.vocab),
          static_cast<float>(call.beta),
          static_cast<float>(call.floor)};
}

struct Cuda {
  static Tensor new_gradient(const Tensor& like) { return torch_empty_like(like); }

  static void run(const LogprobDivergenceTensors& t) {
    const LogprobDivergenceCall& call = t.call;
    const Kernel kernel = kernel_of(call);
    STD_TORCH_CHECK(kernel, "divergence '", call.divergence, "' is none of forward_kl, reverse_kl, generalized_js");
    check_grid(call.rows, call.vocab);
    if (call.rows == 0) return;
    const DeviceScope device(t.student);
    kernel<<<static_cast<unsigned>(call.rows), kLogprobThreads, 0, device.stream()>>>(arguments_of(call));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

}  // namespace
}  // namespace distillm

STABLE_TORCH_LIBRARY_IMPL(distillm_ext, CUDA, m) {
  m.impl("logprob_divergence", TORCH_BOX(&distillm::logprob_divergence<distillm::Cuda>));
}
