// The CPU kernel of `sparse_divergence` for each instruction set.
#pragma once

#include "../ops/sparse_divergence.h"

namespace distillm {

// Losses, and gradients when asked for, of the rows [begin, end).
using SparseDivergenceRows = void (*)(const SparseDivergenceCall& call, int64_t begin, int64_t end);

// The kernel of a divergence by its public name, null when there is none of that name for the tail.
SparseDivergenceRows sparse_divergence_rows_generic(const char* name, Tail tail, bool float64);
#ifdef __x86_64__
SparseDivergenceRows sparse_divergence_rows_x86_64_v2(const char* name, Tail tail, bool float64);
SparseDivergenceRows sparse_divergence_rows_x86_64_v3(const char* name, Tail tail, bool float64);
SparseDivergenceRows sparse_divergence_rows_x86_64_v4(const char* name, Tail tail, bool float64);
#endif

}  // namespace distillm
