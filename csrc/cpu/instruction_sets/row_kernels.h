// The row kernels of the CPU: what each operator runs on one thread, compiled once per instruction set.
//
// A new operator is a member of RowKernels and a line of row_kernel_list.h. A new instruction set is a file
// row_kernels_<set>.cpp, its declaration below and its line in instruction_set.cpp. The builds take every file of this
// folder.
#pragma once

// Among them is what the listed kernels need of the standard library (row_kernel_list.h tells why).
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "../../ops/divergence.h"
#include "../../ops/few_rows_linear.h"
#include "../../ops/logprob_divergence.h"
#include "../../ops/sample_tokens.h"
#include "../../ops/sparse_divergence.h"
#include "../../ops/topk_logits.h"

namespace distillm {

// Losses, and gradients when asked for, of the rows [begin, end).
using DivergenceRows = void (*)(const DivergenceCall& call, int64_t begin, int64_t end);
using SparseDivergenceRows = void (*)(const SparseDivergenceCall& call, int64_t begin, int64_t end);
using LogprobDivergenceRows = void (*)(const LogprobDivergenceCall& call, int64_t begin, int64_t end);
// Outputs of the rows [begin, end).
using TopkLogitsRows = void (*)(const TopkLogitsCall& call, int64_t begin, int64_t end);
// Tokens of the rows [begin, end).
using SampleRows = void (*)(const SampleTensors& tensors, int64_t begin, int64_t end);
// Columns [begin, end) of the product.
using FewRowsLinearColumns = void (*)(const FewRowsLinearCall& call, int64_t begin, int64_t end);

struct RowKernels {
  // The kernel of a divergence by its public name, null when there is none of that name.
  DivergenceRows (*divergence)(const char* name, bool float64);
  SparseDivergenceRows (*sparse_divergence)(const char* name, Tail tail, bool float64);
  LogprobDivergenceRows (*logprob_divergence)(const char* name, bool probabilities, bool float64);
  TopkLogitsRows (*topk_logits)(bool float64);
  SampleRows sample_tokens;
  FewRowsLinearColumns few_rows_linear;
};

extern const RowKernels row_kernels_generic;
#ifdef __x86_64__
extern const RowKernels row_kernels_x86_64_v2, row_kernels_x86_64_v3, row_kernels_x86_64_v4;
#endif

// Those of this processor.
const RowKernels& row_kernels();

// Several rows per task where rows are short, one where they are long.
inline int64_t rows_per_task(int64_t entries) { return entries < 16384 ? 16384 / (entries > 0 ? entries : 1) : 1; }

}  // namespace distillm
