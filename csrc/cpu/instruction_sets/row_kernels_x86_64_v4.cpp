// The row kernels for x86-64-v4. Features are listed one by one because older g++ knows no arch=x86-64-v4 there.
#ifdef __x86_64__
#define DISTILLM_ISA x86_64_v4
#define DISTILLM_LANES 16
#define DISTILLM_LANES_AVX512
#include <immintrin.h>

#include "row_kernels.h"  // before the target: row_kernel_list.h tells why

#pragma GCC push_options
#pragma GCC target( \
    "avx2,fma,bmi,bmi2,f16c,lzcnt,movbe,popcnt,avx512f,avx512bw,avx512cd,avx512dq,avx512vl,prefer-vector-width=512")
#include "row_kernel_list.h"
#pragma GCC pop_options

namespace distillm {
constexpr RowKernels row_kernels_x86_64_v4 = kRowKernels;
}
#endif
