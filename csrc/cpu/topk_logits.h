// The CPU kernel of `topk_logits` for each instruction set.
#pragma once

#include <cstdint>

#include "../ops/topk_logits.h"

namespace distillm {

// Outputs of the rows [begin, end).
using TopkLogitsRows = void (*)(const TopkLogitsCall& call, int64_t begin, int64_t end);

TopkLogitsRows topk_logits_rows_generic(bool float64);
#ifdef __x86_64__
TopkLogitsRows topk_logits_rows_x86_64_v2(bool float64);
TopkLogitsRows topk_logits_rows_x86_64_v3(bool float64);
TopkLogitsRows topk_logits_rows_x86_64_v4(bool float64);
#endif

}  // namespace distillm
