// `logprob_divergence` on the CPU: rows are shared out over torch's threads; each thread runs the kernel of this
// processor.
#include "../instruction_sets/row_kernels.h"
#include "../memory/gradient_memory.h"

namespace distillm {
namespace {

std::tuple<Tensor, Tensor> logprob_divergence(const Tensor& student, const Tensor& teacher,
                                              const std::optional<Tensor>& weight, std::string name, double beta,
                                              std::optional<double> probability_floor, bool need_gradient) {
  const LogprobDivergenceTensors t = prepare_logprob_divergence(student, teacher, weight, std::move(name), beta,
                                                                probability_floor, need_gradient, recycled_empty_like);
  const LogprobDivergenceCall& call = t.call;
  const LogprobDivergenceRows rows = row_kernels().logprob_divergence(call.divergence.c_str(), call.probabilities,
                                                                      call.student_type == ScalarType::Double);
  STD_TORCH_CHECK(rows, "divergence '", call.divergence, "' is none of forward_kl, reverse_kl, generalized_js");
  torch::stable::parallel_for(0, call.rows, rows_per_task(call.vocab),
                              [&](int64_t begin, int64_t end) { rows(call, begin, end); });
  return {t.loss, t.gradient};
}

}  // namespace
}  // namespace distillm

STABLE_TORCH_LIBRARY_IMPL(distillm_ext, CPU, m) {
  m.impl("logprob_divergence", TORCH_BOX(&distillm::logprob_divergence));
}
