// `sample_tokens` on the CPU: rows are shared out over torch's threads; each thread runs the kernel of this processor.
#include "sample_tokens.h"

#include <algorithm>

#include "instruction_set.h"

namespace distillm {
namespace {

SampleRows kernel() {
#ifdef __x86_64__
  switch (instruction_set()) {
    case InstructionSet::kX86_64_v4: return sample_rows_x86_64_v4;
    case InstructionSet::kX86_64_v3: return sample_rows_x86_64_v3;
    case InstructionSet::kX86_64_v2: return sample_rows_x86_64_v2;
    case InstructionSet::kGeneric: break;
  }
#endif
  return sample_rows_generic;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sample_tokens(
    const Tensor& logits, const std::optional<Tensor>& temperature_rows, const std::optional<Tensor>& top_k_rows,
    const std::optional<Tensor>& top_p_rows, const std::optional<Tensor>& min_p_rows,
    const std::optional<Tensor>& penalty_rows, const std::optional<Tensor>& seed_rows,
    const std::optional<Tensor>& position_rows, const std::optional<Tensor>& previous,
    const std::optional<Tensor>& banned, const std::optional<Tensor>& bits, double temperature, int64_t top_k,
    double top_p, double min_p, double penalty, int64_t seed, int64_t position) {
  const SampleTensors t = prepare_sample({logits, temperature_rows, top_k_rows, top_p_rows, min_p_rows, penalty_rows,
                                          seed_rows, position_rows, previous, banned, bits},
                                         temperature, top_k, top_p, min_p, penalty, seed, position);
  // Several rows per task where rows are short, one where they are long.
  const int64_t grain = std::max<int64_t>(1, 16384 / t.call.vocab);
  const SampleRows rows = kernel();
  torch::stable::parallel_for(0, t.call.rows, grain, [&](int64_t begin, int64_t end) { rows(t, begin, end); });
  return t.outputs();
}

}  // namespace
}  // namespace distillm

STABLE_TORCH_LIBRARY_IMPL(distillm_ext, CPU, m) { m.impl("sample_tokens", TORCH_BOX(&distillm::sample_tokens)); }
