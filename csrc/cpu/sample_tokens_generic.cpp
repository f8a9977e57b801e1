// The kernel for whatever instruction set the compiler targets by default (NEON on ARM, SSE2 on x86-64). Weights must
// have the same bits on every instruction set, so products and sums stay apart.
#include <cmath>
#include <cstring>
#include <limits>

#include "divergence.h"
#include "sample_tokens.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=off")
#endif
#define DISTILLM_ISA generic
#include "sample_tokens_rows.h"

namespace distillm {
void sample_rows_generic(const SampleTensors& tensors, int64_t begin, int64_t end) {
  generic::sample_rows(tensors, begin, end);
}
}  // namespace distillm
