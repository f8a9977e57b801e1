// The kernel for whatever instruction set the compiler targets by default (NEON on ARM, SSE2 on x86-64).
#define DISTILLM_ISA generic
#include "logprob_divergence_rows.h"

namespace distillm {
LogprobDivergenceRows logprob_divergence_rows_generic(const char* name, bool probabilities, bool float64) {
  return generic::find_logprob_divergence_rows(name, probabilities, float64);
}
}  // namespace distillm
