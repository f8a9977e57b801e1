// The row kernels for x86-64-v2. Features are listed one by one because older g++ knows no arch=x86-64-v2 there.
#ifdef __x86_64__
#define DISTILLM_ISA x86_64_v2
#define DISTILLM_LANES 4
#include <immintrin.h>

#include "row_kernels.h"  // before the target: row_kernel_list.h tells why

#pragma GCC push_options
#pragma GCC target("sse3,ssse3,sse4.1,sse4.2,popcnt,cx16")
#include "row_kernel_list.h"
#pragma GCC pop_options

namespace distillm {
constexpr RowKernels row_kernels_x86_64_v2 = kRowKernels;
}
#endif
