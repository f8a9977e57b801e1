// The CPU kernel of `logprob_divergence` for each instruction set.
#pragma once

#include "../ops/logprob_divergence.h"

namespace distillm {

// Losses, and gradients when asked for, of the rows [begin, end).
using LogprobDivergenceRows = void (*)(const LogprobDivergenceCall& call, int64_t begin, int64_t end);

// The kernel of a divergence by its name, null when there is none.
LogprobDivergenceRows logprob_divergence_rows_generic(const char* name, bool probabilities, bool float64);
#ifdef __x86_64__
LogprobDivergenceRows logprob_divergence_rows_x86_64_v2(const char* name, bool probabilities, bool float64);
LogprobDivergenceRows logprob_divergence_rows_x86_64_v3(const char* name, bool probabilities, bool float64);
LogprobDivergenceRows logprob_divergence_rows_x86_64_v4(const char* name, bool probabilities, bool float64);
#endif

}  // namespace distillm
