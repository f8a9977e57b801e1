// The kernel for x86-64-v4. Standard and torch headers come before the target pragma: their inline functions must stay
// those of the default target. Features are listed one by one because older g++ knows no arch=x86-64-v4 there.
#ifdef __x86_64__
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "logprob_divergence.h"

#pragma GCC push_options
#pragma GCC target( \
    "avx2,fma,bmi,bmi2,f16c,lzcnt,movbe,popcnt,avx512f,avx512bw,avx512cd,avx512dq,avx512vl,prefer-vector-width=512")
#define DISTILLM_ISA x86_64_v4
#include "logprob_divergence_rows.h"
#pragma GCC pop_options

namespace distillm {
LogprobDivergenceRows logprob_divergence_rows_x86_64_v4(const char* name, bool probabilities, bool float64) {
  return x86_64_v4::find_logprob_divergence_rows(name, probabilities, float64);
}
}  // namespace distillm
#endif
