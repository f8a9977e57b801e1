// `divergence` on the CPU: rows are shared out over torch's threads; each thread runs the kernel of this processor.
#include "divergence.h"

#include <cstdlib>
#include <memory>
#include <new>

#include "huge_pages.h"
#include "instruction_set.h"

namespace distillm {

void* thread_scratch(int64_t bytes) {
  static thread_local std::unique_ptr<void, decltype(&std::free)> memory(nullptr, &std::free);
  static thread_local int64_t held = 0;
  if (bytes > held) {
    held = (bytes + 4095) / 4096 * 4096;
    memory.reset(std::aligned_alloc(4096, held));
    if (!memory) throw std::bad_alloc();
  }
  return memory.get();
}

namespace {

DivergenceRows kernel_for(const std::string& name, bool float64) {
#ifdef __x86_64__
  switch (instruction_set()) {
    case InstructionSet::kX86_64_v4: return divergence_rows_x86_64_v4(name.c_str(), float64);
    case InstructionSet::kX86_64_v3: return divergence_rows_x86_64_v3(name.c_str(), float64);
    case InstructionSet::kX86_64_v2: return divergence_rows_x86_64_v2(name.c_str(), float64);
    case InstructionSet::kGeneric: break;
  }
#endif
  return divergence_rows_generic(name.c_str(), float64);
}

std::tuple<Tensor, Tensor> divergence(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& labels,
                                      const std::optional<Tensor>& weight, const std::optional<Tensor>& alpha_rows,
                                      const std::optional<Tensor>& cap, std::string name, double alpha, double beta,
                                      double temperature, double ce_weight, int64_t ignore_index, bool detach_mixture,
                                      bool need_gradient) {
  const DivergenceTensors t =
      prepare_divergence(student, teacher, labels, weight, alpha_rows, cap,
                         {name, alpha, beta, temperature, ce_weight, ignore_index, detach_mixture, need_gradient});
  const DivergenceRows rows = kernel_for(name, student.scalar_type() == ScalarType::Double);
  STD_TORCH_CHECK(rows, "divergence '", name, "' has no CPU kernel");
  if (need_gradient) prefer_huge_pages(t.call.gradient, t.gradient.numel() * student.element_size());
  // Several rows per task where rows are short, one where they are long.
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, t.call.student_vocab));
  torch::stable::parallel_for(0, t.call.rows, grain, [&](int64_t begin, int64_t end) { rows(t.call, begin, end); });
  return {t.loss, t.gradient};
}

}  // namespace
}  // namespace distillm

STABLE_TORCH_LIBRARY_IMPL(distillm_ext, CPU, m) { m.impl("divergence", TORCH_BOX(&distillm::divergence)); }
