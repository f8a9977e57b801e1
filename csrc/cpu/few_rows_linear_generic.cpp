// The kernel for whatever instruction set the compiler targets by default (NEON on ARM, SSE2 on x86-64).
#define DISTILLM_ISA generic
#define DISTILLM_LANES 4
#include "few_rows_linear_columns.h"

namespace distillm {
void few_rows_linear_generic(const FewRowsLinearCall& call, int64_t begin, int64_t end) {
  generic::few_rows_linear_columns(call, begin, end);
}
}  // namespace distillm
