// The row kernels for x86-64-v3. Features are listed one by one because older g++ knows no arch=x86-64-v3 there.
#ifdef __x86_64__
#define DISTILLM_ISA x86_64_v3
#define DISTILLM_LANES 8
#define DISTILLM_LANES_AVX2
#include <immintrin.h>

#include "row_kernels.h"  // before the target: row_kernel_list.h tells why

#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi,bmi2,f16c,lzcnt,movbe,popcnt")
#include "row_kernel_list.h"
#pragma GCC pop_options

namespace distillm {
constexpr RowKernels row_kernels_x86_64_v3 = kRowKernels;
}
#endif
