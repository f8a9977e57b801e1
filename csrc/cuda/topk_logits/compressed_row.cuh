// Sums of exponentials at several temperatures, and the outputs of `topk_logits` for one row: what top-k and sampling
// share.
#pragma once

#include "../row/reduce.cuh"
#include "../row/row_pair.cuh"
#include "candidates.cuh"

namespace distillm {

constexpr int kMaxSlots = 4;  // temperatures per launch: T = 1, always, and three others

struct TopkLogitsArguments {
  const void* logits;
  int64_t stride;  // elements from row to row
  int32_t vocab, k;
  const int64_t* labels;    // null when absent, like the next
  const int64_t* position;  // present: k draws instead of the k largest
  int64_t seed;
  int32_t* ids;
  float* logprobs;
  float* log_norm;  // [rows, temperature_count], like the next
  float* tail_logprob;
  float* label_logprob;
  bool* valid;
  int32_t* counts;
  uint64_t* workspace;  // [rows, capacity] candidates where they do not fit in shared memory, else null
  int32_t capacity;     // of candidates, a power of two
  int32_t temperature_count;
  int32_t first_output, output_count;    // of this launch, among the temperatures
  float inverse_temperature[kMaxSlots];  // slot 0: T = 1
  uint64_t slot_of_output;               // 4 bits each

  __device__ int slot(int output) const { return static_cast<int>(slot_of_output >> (4 * output) & 15); }
};

// Sums of exp2((z - maximum) * scale) per slot over the entries that one thread has seen. An empty one has the lowest
// finite maximum, so that masked entries add 0 and not NaN.
template <int kSlots>
struct ExpSums {
  float maximum, sum[kSlots];

  __device__ static ExpSums empty() {
    ExpSums sums{-FLT_MAX, {}};
    return sums;
  }
  __device__ static float scale(const TopkLogitsArguments& a, int slot) {
    return slot == 0 ? static_cast<float>(kLog2E) : static_cast<float>(kLog2E) * a.inverse_temperature[slot];
  }
  __device__ void raise(const TopkLogitsArguments& a, float higher) {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      sum[slot] = __fmul_rn(sum[slot], exp2_fast((maximum - higher) * scale(a, slot)));
    }
    maximum = higher;
  }
  __device__ void add(const TopkLogitsArguments& a, float z) {
    raise(a, fmaxf(maximum, z));
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) sum[slot] += exp2_fast((z - maximum) * scale(a, slot));
  }
  // The entries whose bit in `kept` is not set.
  template <int N>
  __device__ void add_others(const TopkLogitsArguments& a, const float (&z)[N], uint32_t kept) {
    float higher = maximum;
#pragma unroll
    for (int i = 0; i < N; ++i) higher = kept >> i & 1 ? higher : fmaxf(higher, z[i]);
    raise(a, higher);
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float e = exp2_fast((z[i] - maximum) * scale(a, slot));
        sum[slot] += kept >> i & 1 ? 0.0f : e;
      }
    }
  }
};

template <int kSlots>
struct OutputScratch {
  PartialSums tail_maximum, tail[kSlots], kept[kSlots];
  float log_norm[kSlots], tail_logprob[kSlots];
};

// What a finished row is written from, the same in all threads. Sums are relative to their own maximum.
template <int kSlots>
struct RowSums {
  float largest, tail_maximum;
  float tail[kSlots], total[kSlots];  // total: relative to `largest`

  // Sorted keys of the kept entries, visible to the block; every thread's share of the others.
  __device__ static RowSums of(const TopkLogitsArguments& a, const uint64_t* keys, int32_t size, ExpSums<kSlots> tail,
                               OutputScratch<kSlots>& scratch) {
    RowSums sums;
    sums.largest = size > 0 ? candidate_value(keys[0]) : 0.0f;
    publish_maximum(tail.maximum, scratch.tail_maximum);
    float kept[kSlots] = {};
    for (int32_t i = threadIdx.x; i < size; i += blockDim.x) {
      const float z = candidate_value(keys[i]) - sums.largest;
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) kept[slot] += exp2_fast(z * ExpSums<kSlots>::scale(a, slot));
    }
    __syncthreads();
    sums.tail_maximum = collect_maximum(scratch.tail_maximum);
    tail.raise(a, sums.tail_maximum);
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      publish(tail.sum[slot], scratch.tail[slot]);
      publish(kept[slot], scratch.kept[slot]);
    }
    __syncthreads();
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      sums.tail[slot] = collect(scratch.tail[slot]);
      const float factor = exp2_fast((sums.tail_maximum - sums.largest) * ExpSums<kSlots>::scale(a, slot));
      sums.total[slot] = collect(scratch.kept[slot]) + (sums.tail[slot] == 0 ? 0.0f : sums.tail[slot] * factor);
    }
    return sums;
  }

  __device__ bool valid(int32_t size) const { return size > 0 && largest < kInfinity && total[0] == total[0]; }
  // log(sum of exp((z - largest) / T))
  __device__ float log_total(int slot) const { return static_cast<float>(kLn2) * log2f(total[slot]); }
  __device__ float log_tail(const TopkLogitsArguments& a, int slot) const {
    return static_cast<float>(kLn2) * log2f(tail[slot]) + (tail_maximum - largest) * a.inverse_temperature[slot];
  }
};

// The outputs of a launch pick their slots in shared memory: registers cannot be indexed.
template <int kSlots>
__device__ void write_temperatures(const TopkLogitsArguments& a, int64_t row, const RowSums<kSlots>& sums, bool valid,
                                   OutputScratch<kSlots>& scratch) {
  if (threadIdx.x == 0) {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      const float norm = sums.log_total(slot);
      scratch.log_norm[slot] = valid ? norm - sums.log_total(0) * a.inverse_temperature[slot] : kNaN;
      scratch.tail_logprob[slot] = valid ? sums.log_tail(a, slot) - norm : kNaN;
    }
  }
  __syncthreads();
  for (int32_t i = threadIdx.x; i < a.output_count; i += blockDim.x) {
    const int64_t at = row * a.temperature_count + a.first_output + i;
    a.log_norm[at] = scratch.log_norm[a.slot(i)];
    a.tail_logprob[at] = scratch.tail_logprob[a.slot(i)];
  }
}

template <class T>
__device__ __forceinline__ float label_logprob(const TopkLogitsArguments& a, const LogitRow<T, 16 / sizeof(T)>& logits,
                                               int64_t label, float largest, float log_total) {
  if (label < 0 || label >= a.vocab) return kNaN;
  return logits.entry(static_cast<int>(label)) - largest - log_total;
}

// `keys`: `size` <= k kept entries, sorted and visible to the block, `counts` beside them or null.
template <class T, int kSlots>
__device__ void write_row(const TopkLogitsArguments& a, int64_t row, const LogitRow<T, 16 / sizeof(T)>& logits,
                          const uint64_t* keys, const int32_t* counts, int32_t size, ExpSums<kSlots> tail,
                          OutputScratch<kSlots>& scratch) {
  const RowSums<kSlots> sums = RowSums<kSlots>::of(a, keys, size, tail, scratch);
  const bool valid = sums.valid(size);
  const float log_total = sums.log_total(0);
  for (int32_t i = threadIdx.x; i < a.k; i += blockDim.x) {
    const bool present = valid && i < size;
    const int64_t at = row * a.k + i;
    a.ids[at] = present ? candidate_id(keys[i]) : -1;
    a.logprobs[at] = present ? candidate_value(keys[i]) - sums.largest - log_total : -kInfinity;
    if (a.counts) a.counts[at] = present ? counts[i] : 0;
  }
  write_temperatures(a, row, sums, valid, scratch);
  if (threadIdx.x != 0) return;
  a.valid[row] = valid;
  if (a.labels) {
    a.label_logprob[row] = valid ? label_logprob<T>(a, logits, a.labels[row], sums.largest, log_total) : kNaN;
  }
}

}  // namespace distillm
