// The row kernels for whatever instruction set the compiler targets by default (NEON on ARM, SSE2 on x86-64).
#define DISTILLM_ISA generic
#define DISTILLM_LANES 4
#include "row_kernel_list.h"
#include "row_kernels.h"

namespace distillm {
constexpr RowKernels row_kernels_generic = kRowKernels;
}
