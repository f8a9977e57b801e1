// The kernel for x86-64-v2. Standard and torch headers come before the target pragma: their inline functions must stay
// those of the default target. Features are listed one by one because older g++ knows no arch=x86-64-v2 there.
#ifdef __x86_64__
#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "divergence.h"
#include "topk_logits.h"

#pragma GCC push_options
#pragma GCC target("sse3,ssse3,sse4.1,sse4.2,popcnt,cx16")
#define DISTILLM_ISA x86_64_v2
#include "topk_logits_rows.h"
#pragma GCC pop_options

namespace distillm {
TopkLogitsRows topk_logits_rows_x86_64_v2(bool float64) { return x86_64_v2::find_topk_logits_rows(float64); }
}  // namespace distillm
#endif
