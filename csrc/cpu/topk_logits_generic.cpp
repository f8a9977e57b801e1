// The kernel for whatever instruction set the compiler targets by default (NEON on ARM, SSE2 on x86-64).
#define DISTILLM_ISA generic
#include "topk_logits_rows.h"

namespace distillm {
TopkLogitsRows topk_logits_rows_generic(bool float64) { return generic::find_topk_logits_rows(float64); }
}  // namespace distillm
