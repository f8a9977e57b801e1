// The kernel for x86-64-v2. Standard and torch headers come before the target pragma: their inline functions must stay
// those of the default target. Weights must have the same bits on every instruction set,
// so products and sums stay apart. Features are listed one by one because older g++ knows no arch=x86-64-v2 there.
#ifdef __x86_64__
#include <cmath>
#include <cstring>
#include <limits>

#include "divergence.h"
#include "sample_tokens.h"

#pragma GCC push_options
#pragma GCC target("sse3,ssse3,sse4.1,sse4.2,popcnt,cx16")
#pragma GCC optimize("fp-contract=off")
#define DISTILLM_ISA x86_64_v2
#include "sample_tokens_rows.h"
#pragma GCC pop_options

namespace distillm {
void sample_rows_x86_64_v2(const SampleTensors& tensors, int64_t begin, int64_t end) {
  x86_64_v2::sample_rows(tensors, begin, end);
}
}  // namespace distillm
#endif
