// The kernel for x86-64-v3. Standard and torch headers come before the target pragma: their inline functions must stay
// those of the default target. Features are listed one by one because older g++ knows no arch=x86-64-v3 there.
#ifdef __x86_64__
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "logprob_divergence.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi,bmi2,f16c,lzcnt,movbe,popcnt")
#define DISTILLM_ISA x86_64_v3
#include "logprob_divergence_rows.h"
#pragma GCC pop_options

namespace distillm {
LogprobDivergenceRows logprob_divergence_rows_x86_64_v3(const char* name, bool probabilities, bool float64) {
  return x86_64_v3::find_logprob_divergence_rows(name, probabilities, float64);
}
}  // namespace distillm
#endif
