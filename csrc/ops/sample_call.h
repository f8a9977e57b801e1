// Everything that a kernel of `sample_tokens` reads and writes, as raw pointers: no torch, no mathematics.
#pragma once

#include <cstdint>

namespace distillm {

// Sums of this many weights of math/sampling/token_mass.h fit 64 bits; one more would not.
constexpr int64_t kMaxSampledVocabulary = (int64_t{1} << 20) - 1;

// A parameter of every row: one value, or one per row.
template <class T>
struct PerRow {
  const T* rows;  // null: `value` for all
  T value;
};

struct SampleCall {
  const void* logits;
  int64_t rows, vocab, stride;  // stride: elements from row to row
  PerRow<float> temperature, top_p, min_p, penalty;
  PerRow<int64_t> top_k, seed, position;
  const int64_t* bits;      // the draws; null: from seed and position
  const int64_t* previous;  // null when absent, like `banned`
  int64_t previous_count;
  const bool* banned;
  int64_t banned_stride;  // 0: one mask for all rows
  int64_t* token;
  float* logprob;
  float* filtered_logprob;
  bool* valid;
};

}  // namespace distillm
