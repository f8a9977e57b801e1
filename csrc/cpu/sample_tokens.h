// The CPU kernel of `sample_tokens` for each instruction set.
#pragma once

#include <cstdint>

#include "../ops/sample_tokens.h"

namespace distillm {

// Tokens of the rows [begin, end).
using SampleRows = void (*)(const SampleTensors& tensors, int64_t begin, int64_t end);

void sample_rows_generic(const SampleTensors& tensors, int64_t begin, int64_t end);
#ifdef __x86_64__
void sample_rows_x86_64_v2(const SampleTensors& tensors, int64_t begin, int64_t end);
void sample_rows_x86_64_v3(const SampleTensors& tensors, int64_t begin, int64_t end);
void sample_rows_x86_64_v4(const SampleTensors& tensors, int64_t begin, int64_t end);
#endif

}  // namespace distillm
