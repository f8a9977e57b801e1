// The kernel for whatever instruction set the compiler targets by default (NEON on ARM, SSE2 on x86-64).
#define DISTILLM_ISA generic
#include "divergence_rows.h"

namespace distillm {
DivergenceRows divergence_rows_generic(const char* name, bool float64) {
  return generic::find_divergence_rows(name, float64);
}
}  // namespace distillm
