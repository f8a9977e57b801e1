// The kernel for x86-64-v3. Standard and torch headers come before the target pragma: their inline functions must stay
// those of the default target. Features are listed one by one because older g++ knows no arch=x86-64-v3 there.
#ifdef __x86_64__
#include <cstring>

#include "few_rows_linear.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi,bmi2,f16c,lzcnt,movbe,popcnt")
#define DISTILLM_ISA x86_64_v3
#define DISTILLM_LANES 8
#include "few_rows_linear_columns.h"
#pragma GCC pop_options

namespace distillm {
void few_rows_linear_x86_64_v3(const FewRowsLinearCall& call, int64_t begin, int64_t end) {
  x86_64_v3::few_rows_linear_columns(call, begin, end);
}
}  // namespace distillm
#endif
