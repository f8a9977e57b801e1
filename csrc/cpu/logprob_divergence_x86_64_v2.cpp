// The kernel for x86-64-v2. Standard and torch headers come before the target pragma: their inline functions must stay
// those of the default target. Features are listed one by one because older g++ knows no arch=x86-64-v2 there.
#ifdef __x86_64__
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "logprob_divergence.h"

#pragma GCC push_options
#pragma GCC target("sse3,ssse3,sse4.1,sse4.2,popcnt,cx16")
#define DISTILLM_ISA x86_64_v2
#include "logprob_divergence_rows.h"
#pragma GCC pop_options

namespace distillm {
LogprobDivergenceRows logprob_divergence_rows_x86_64_v2(const char* name, bool probabilities, bool float64) {
  return x86_64_v2::find_logprob_divergence_rows(name, probabilities, float64);
}
}  // namespace distillm
#endif
