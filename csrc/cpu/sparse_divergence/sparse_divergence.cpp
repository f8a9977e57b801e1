// `sparse_divergence` on the CPU: rows are shared out over torch's threads; each thread runs the kernel of this
// processor.
#include "../instruction_sets/row_kernels.h"
#include "../memory/gradient_memory.h"

namespace distillm {
namespace {

void run(const SparseDivergenceTensors& t) {
  const DivergenceCall& dense = t.call.dense;
  const std::string& name = dense.options.divergence;
  const bool float64 = dense.student_type == ScalarType::Double;
  const SparseDivergenceRows rows = row_kernels().sparse_divergence(name.c_str(), t.call.tail, float64);
  STD_TORCH_CHECK(rows, "divergence '", name, "' has no CPU kernel for this tail");
  const int64_t grain = rows_per_task(dense.student_vocab);
  torch::stable::parallel_for(0, dense.rows, grain, [&](int64_t begin, int64_t end) { rows(t.call, begin, end); });
}

std::tuple<Tensor, Tensor> sparse_divergence(
    const Tensor& student, const Tensor& ids, const Tensor& logprobs, const Tensor& log_norm,
    const Tensor& tail_logprob, const std::optional<Tensor>& counts, const std::optional<Tensor>& labels,
    const std::optional<Tensor>& weight, const std::optional<Tensor>& alpha_rows, const std::optional<Tensor>& cap,
    std::string name, std::string tail, double alpha, double beta, double temperature, double ce_weight,
    int64_t ignore_index, bool detach_mixture, int64_t vocab_size, int64_t teacher_vocab, bool need_gradient) {
  const SparseDivergenceTensors t = prepare_sparse_divergence(
      student, {ids, logprobs, log_norm, tail_logprob, counts, teacher_vocab}, labels, weight, alpha_rows, cap, tail,
      {std::move(name), alpha, beta, temperature, ce_weight, ignore_index, detach_mixture, vocab_size},
      need_gradient ? GradientTo::kNewTensor : GradientTo::kNowhere, recycled_empty_like);
  run(t);
  return {t.loss, t.gradient};
}

Tensor sparse_divergence_(Tensor student, const Tensor& ids, const Tensor& logprobs, const Tensor& log_norm,
                          const Tensor& tail_logprob, const std::optional<Tensor>& counts,
                          const std::optional<Tensor>& labels, const std::optional<Tensor>& weight,
                          const std::optional<Tensor>& alpha_rows, const std::optional<Tensor>& cap, std::string name,
                          std::string tail, double alpha, double beta, double temperature, double ce_weight,
                          int64_t ignore_index, bool detach_mixture, int64_t vocab_size, int64_t teacher_vocab) {
  const SparseDivergenceTensors t = prepare_sparse_divergence(
      student, {ids, logprobs, log_norm, tail_logprob, counts, teacher_vocab}, labels, weight, alpha_rows, cap, tail,
      {std::move(name), alpha, beta, temperature, ce_weight, ignore_index, detach_mixture, vocab_size},
      GradientTo::kStudent);
  run(t);
  return t.loss;
}

}  // namespace
}  // namespace distillm

STABLE_TORCH_LIBRARY_IMPL(distillm_ext, CPU, m) {
  m.impl("sparse_divergence", TORCH_BOX(&distillm::sparse_divergence));
  m.impl("sparse_divergence_", TORCH_BOX(&distillm::sparse_divergence_));
}
