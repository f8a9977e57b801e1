// `sparse_divergence` on CUDA: chooses the kernel of this dtype and launches one block per row.
#include <algorithm>

#include "../../ops/sparse_divergence.h"
#include "../row/launch.h"
#include "sparse_divergence.cuh"
#include "sparse_divergence_plan.h"

namespace distillm {
namespace {

KeptForm form_of(const std::string& name, Tail tail) {
#define DISTILLM_MATCH(public_name, D, Z, Any) \
  if (tail != Tail::kSampled && name == public_name) return KeptForm::k##Any;
  DISTILLM_FOR_EACH_SPARSE_DIVERGENCE(DISTILLM_MATCH)
#undef DISTILLM_MATCH
#define DISTILLM_MATCH(public_name, D, Z, Any) \
  if (tail == Tail::kSampled && name == public_name) return KeptForm::k##Any;
  DISTILLM_FOR_EACH_SAMPLED_DIVERGENCE(DISTILLM_MATCH)
#undef DISTILLM_MATCH
  return KeptForm::kNone;
}

using SparseKernel = void (*)(SparseDivergenceArguments);

SparseKernel kernel_for(ScalarType type) {
  switch (element_type(type)) {
    case ElementType::kBFloat16: return sparse_divergence_kernel<BFloat16>;
    case ElementType::kHalf: return sparse_divergence_kernel<Half>;
    default: return sparse_divergence_kernel<float>;
  }
}

SparseDivergenceArguments arguments_of(const SparseDivergenceCall& call, KeptForm form, const SparsePlan& plan) {
  const DivergenceCall& dense = call.dense;
  return {dense.student,
          dense.gradient,
          dense.student_rows,
          dense.gradient_rows,
          static_cast<int32_t>(dense.student_vocab),
          static_cast<int32_t>(dense.gradient_vocab),
          static_cast<int32_t>(dense.teacher_vocab),
          static_cast<int32_t>(call.kept),
          static_cast<int32_t>(plan.table_slots),
          static_cast<int32_t>(plan.staged_chunks),
          static_cast<int32_t>(form),
          call.tail,
          call.ids,
          static_cast<const float*>(call.logprobs),
          static_cast<const float*>(call.log_norm),
          static_cast<const float*>(call.tail_logprob),
          call.counts,
          LossArguments::of(dense)};
}

void launch(const SparseDivergenceTensors& t, KeptForm form, const DeviceScope& device) {
  const DivergenceCall& dense = t.call.dense;
  check_grid(dense.rows, dense.gradient_vocab);
  const int64_t optin = device.attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const SparsePlan plan = plan_sparse_divergence(dense.student_vocab, t.student.element_size(), t.call.kept,
                                                 optin - static_cast<int64_t>(sizeof(SparseScratch)));
  STD_TORCH_CHECK(plan.fits, "the kept entries of a row (", t.call.kept, ") and a bit per vocabulary entry (",
                  dense.student_vocab, ") exceed the shared memory of a block (", optin, " bytes)");
  const SparseKernel kernel = kernel_for(dense.student_type);
  STD_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(plan.shared_bytes)));
  kernel<<<dim3(static_cast<unsigned>(dense.rows)), static_cast<unsigned>(plan.threads),
           static_cast<size_t>(plan.shared_bytes), device.stream()>>>(arguments_of(t.call, form, plan));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

struct Cuda {
  static Tensor new_gradient(const Tensor& like) { return torch_empty_like(like); }

  static void run(const SparseDivergenceTensors& t) {
    const std::string& name = t.call.dense.options.divergence;
    const KeptForm form = form_of(name, t.call.tail);
    STD_TORCH_CHECK(form != KeptForm::kNone, "divergence '", name, "' has no CUDA kernel for this tail");
    if (t.call.dense.rows > 0) launch(t, form, DeviceScope(t.student));
  }
};

}  // namespace
}  // namespace distillm

STABLE_TORCH_LIBRARY_IMPL(distillm_ext, CUDA, m) {
  m.impl("sparse_divergence", TORCH_BOX(&distillm::SparseDivergenceOps<distillm::Cuda>::sparse_divergence));
  m.impl("sparse_divergence_", TORCH_BOX(&distillm::SparseDivergenceOps<distillm::Cuda>::sparse_divergence_));
}
