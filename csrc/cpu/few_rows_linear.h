// The CPU kernel of `few_rows_linear` for each instruction set: the columns [begin, end) of the result.
#pragma once

#include "../ops/few_rows_linear.h"

namespace distillm {

void few_rows_linear_generic(const FewRowsLinearCall& call, int64_t begin, int64_t end);
#ifdef __x86_64__
void few_rows_linear_x86_64_v2(const FewRowsLinearCall& call, int64_t begin, int64_t end);
void few_rows_linear_x86_64_v3(const FewRowsLinearCall& call, int64_t begin, int64_t end);
void few_rows_linear_x86_64_v4(const FewRowsLinearCall& call, int64_t begin, int64_t end);
#endif

}  // namespace distillm
