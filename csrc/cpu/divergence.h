// The CPU kernel of `divergence` for each instruction set.
#pragma once

#include <cstdint>

#include "../ops/divergence.h"

namespace distillm {

// At least `bytes` of memory that belong to the calling thread until its next call, aligned to a cache line. Kept from
// call to call, so that kernels allocate nothing.
void* thread_scratch(int64_t bytes);

// Losses, and gradients when asked for, of the rows [begin, end).
using DivergenceRows = void (*)(const DivergenceCall& call, int64_t begin, int64_t end);

// The kernel of a divergence by its public name, null when there is none of that name.
DivergenceRows divergence_rows_generic(const char* name, bool float64);
#ifdef __x86_64__
DivergenceRows divergence_rows_x86_64_v2(const char* name, bool float64);
DivergenceRows divergence_rows_x86_64_v3(const char* name, bool float64);
DivergenceRows divergence_rows_x86_64_v4(const char* name, bool float64);
#endif

}  // namespace distillm
