// The kernel for whatever instruction set the compiler targets by default (NEON on ARM, SSE2 on x86-64).
#define DISTILLM_ISA generic
#include "sparse_divergence_rows.h"

namespace distillm {
SparseDivergenceRows sparse_divergence_rows_generic(const char* name, Tail tail, bool float64) {
  return generic::find_sparse_divergence_rows(name, tail, float64);
}
}  // namespace distillm
