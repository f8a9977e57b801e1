// `divergence` on the CPU: rows are shared out over torch's threads; each thread runs the kernel of this processor.
#include "../instruction_sets/row_kernels.h"
#include "../memory/gradient_memory.h"

namespace distillm {

namespace {

void run(const DivergenceTensors& t) {
  const DivergenceCall& call = t.call;
  const std::string& name = call.options.divergence;
  const DivergenceRows rows = row_kernels().divergence(name.c_str(), call.student_type == ScalarType::Double);
  STD_TORCH_CHECK(rows, "divergence '", name, "' has no CPU kernel");
  const int64_t grain = rows_per_task(call.student_vocab);
  torch::stable::parallel_for(0, call.rows, grain, [&](int64_t begin, int64_t end) { rows(call, begin, end); });
}

std::tuple<Tensor, Tensor, Tensor> divergence(const Tensor& student, const Tensor& teacher,
                                              const std::optional<Tensor>& labels, const std::optional<Tensor>& weight,
                                              const std::optional<Tensor>& alpha_rows, const std::optional<Tensor>& cap,
                                              std::string name, double alpha, double beta, double temperature,
                                              double ce_weight, int64_t ignore_index, bool detach_mixture,
                                              int64_t vocab_size, bool need_gradient, bool need_metrics) {
  const DivergenceTensors t = prepare_divergence(
      student, teacher, labels, weight, alpha_rows, cap,
      {std::move(name), alpha, beta, temperature, ce_weight, ignore_index, detach_mixture, vocab_size},
      need_gradient ? GradientTo::kNewTensor : GradientTo::kNowhere, need_metrics, recycled_empty_like);
  run(t);
  return {t.loss, t.gradient, t.metrics};
}

std::tuple<Tensor, Tensor> divergence_(Tensor student, const Tensor& teacher, const std::optional<Tensor>& labels,
                                       const std::optional<Tensor>& weight, const std::optional<Tensor>& alpha_rows,
                                       const std::optional<Tensor>& cap, std::string name, double alpha, double beta,
                                       double temperature, double ce_weight, int64_t ignore_index, bool detach_mixture,
                                       int64_t vocab_size, bool need_metrics) {
  const DivergenceTensors t = prepare_divergence(
      student, teacher, labels, weight, alpha_rows, cap,
      {std::move(name), alpha, beta, temperature, ce_weight, ignore_index, detach_mixture, vocab_size},
      GradientTo::kStudent, need_metrics);
  run(t);
  return {t.loss, t.metrics};
}

}  // namespace
}  // namespace distillm

STABLE_TORCH_LIBRARY_IMPL(distillm_ext, CPU, m) {
  m.impl("divergence", TORCH_BOX(&distillm::divergence));
  m.impl("divergence_", TORCH_BOX(&distillm::divergence_));
}
