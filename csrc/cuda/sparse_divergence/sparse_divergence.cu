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
  const DivergenceOptions& options = dense.options;
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
          dense.labels,
          static_cast<const float*>(dense.weight),
          static_cast<const float*>(dense.alpha),
          static_cast<const float*>(dense.cap),
          static_cast<float*>(dense.loss),
          options.ignore_index,
          static_cast<float>(options.alpha),
          static_cast<float>(options.beta),
          static_cast<float>(1 / options.temperature),
          static_cast<float>(options.ce_weight),
          options.detach_mixture};
}

void run(const SparseDivergenceTensors& t, const DeviceScope& device) {
  const DivergenceCall& dense = t.call.dense;
  const KeptForm form = form_of(dense.options.divergence, t.call.tail);
  STD_TORCH_CHECK(form != KeptForm::kNone, "divergence '", dense.options.divergence,
                  "' has no CUDA kernel for this tail");
  if (dense.rows == 0) return;
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

std::tuple<Tensor, Tensor> sparse_divergence(
    const Tensor& student, const Tensor& ids, const Tensor& logprobs, const Tensor& log_norm,
    const Tensor& tail_logprob, const std::optional<Tensor>& counts, const std::optional<Tensor>& labels,
    const std::optional<Tensor>& weight, const std::optional<Tensor>& alpha_rows, const std::optional<Tensor>& cap,
    std::string name, std::string tail, double alpha, double beta, double temperature, double ce_weight,
    int64_t ignore_index, bool detach_mixture, int64_t vocab_size, int64_t teacher_vocab, bool need_gradient) {
  const DeviceScope device(student);
  const SparseDivergenceTensors t = prepare_sparse_divergence(
      student, {ids, logprobs, log_norm, tail_logprob, counts, teacher_vocab}, labels, weight, alpha_rows, cap, tail,
      {std::move(name), alpha, beta, temperature, ce_weight, ignore_index, detach_mixture, vocab_size},
      need_gradient ? GradientTo::kNewTensor : GradientTo::kNowhere);
  run(t, device);
  return {t.loss, t.gradient};
}

Tensor sparse_divergence_(Tensor student, const Tensor& ids, const Tensor& logprobs, const Tensor& log_norm,
                          const Tensor& tail_logprob, const std::optional<Tensor>& counts,
                          const std::optional<Tensor>& labels, const std::optional<Tensor>& weight,
                          const std::optional<Tensor>& alpha_rows, const std::optional<Tensor>& cap, std::string name,
                          std::string tail, double alpha, double beta, double temperature, double ce_weight,
                          int64_t ignore_index, bool detach_mixture, int64_t vocab_size, int64_t teacher_vocab) {
  const DeviceScope device(student);
  const SparseDivergenceTensors t = prepare_sparse_divergence(
      student, {ids, logprobs, log_norm, tail_logprob, counts, teacher_vocab}, labels, weight, alpha_rows, cap, tail,
      {std::move(name), alpha, beta, temperature, ce_weight, ignore_index, detach_mixture, vocab_size},
      GradientTo::kStudent);
  run(t, device);
  return t.loss;
}

}  // namespace
}  // namespace distillm

STABLE_TORCH_LIBRARY_IMPL(distillm_ext, CUDA, m) {
  m.impl("sparse_divergence", TORCH_BOX(&distillm::sparse_divergence));
  m.impl("sparse_divergence_", TORCH_BOX(&distillm::sparse_divergence_));
}
