// Compressed logits of packed records [R, bytes] (math/records/record.h), so that packed bytes and nothing more cross
// PCIe.
//
// One block per row; thread t takes the entries t, t + threads, ... of the record in shared memory. An Elias-Fano id is
// found by itself, by counting ones over whole words; the place of an entry in the output is the number of entries that
// come before it. Every byte is read once and every output written once. Any bytes are safe.
#pragma once

#include "../../math/records/record.h"
#include "record_block.cuh"

namespace distillm {

struct UnpackArguments {
  RecordLayout layout;
  const uint8_t* packed;
  RecordOutput fields;
};

// A row in shared memory. An entry is kept where its id is not -1.
struct SharedRow {
  const uint32_t* words;
  float* values;
  int32_t* ids;
};

__device__ __forceinline__ void load_record(const uint8_t* in, const RecordLayout& layout, uint32_t* words) {
  for (int w = threadIdx.x; w < layout.words; w += blockDim.x) {
    uint32_t word = 0;
    for (int b = 0; b < 4 && 4 * w + b < layout.bytes; ++b) word |= static_cast<uint32_t>(in[4 * w + b]) << (8 * b);
    words[w] = word;
  }
  __syncthreads();
}

__device__ __forceinline__ bool tails_are_legal(const RecordLayout& layout, const uint32_t* words) {
  bool legal = true;
  for (int t = 0; t < layout.shape.temperatures; ++t) legal &= get_tail(layout, words, t) <= 0;
  return legal;
}

__device__ __forceinline__ void write_padding(const RecordLayout& layout, const RecordOutput& row, int i) {
  row.ids[i] = -1;
  row.logprobs[i] = -INFINITY;
  if (row.counts) row.counts[i] = 0;
}

__device__ __forceinline__ void write_invalid(const RecordLayout& layout, const RecordOutput& row) {
  for (int i = threadIdx.x; i < layout.shape.entries; i += blockDim.x) write_padding(layout, row, i);
  for (int t = threadIdx.x; t < layout.shape.temperatures; t += blockDim.x) row.tail[t] = row.norm[t] = NAN;
  if (threadIdx.x == 0 && row.label) *row.label = NAN;
}

__device__ __forceinline__ void read_in_order(const RecordLayout& layout, const uint32_t* words,
                                              const RecordOutput& row) {
  for (int i = threadIdx.x; i < layout.shape.entries; i += blockDim.x) {
    row.ids[i] = get_id(layout, words, i);
    row.logprobs[i] = get_value(layout, words, i, {});
    if (row.counts) row.counts[i] = get_count(layout, words, i);
  }
}

struct KeptValues {
  float largest, count;
};

__device__ __forceinline__ KeptValues read_entries(const RecordLayout& layout, const SharedRow& shared) {
  __shared__ PartialSums largest, count;
  const int stored = stored_entries(layout, shared.words);
  const ValueCoding coding = get_value_coding(layout, shared.words);
  float high = -INFINITY, kept = 0;
  for (int i = threadIdx.x; i < layout.shape.entries; i += blockDim.x) {
    const int32_t id = i < stored ? get_id(layout, shared.words, i) : -1;
    const float value = get_value(layout, shared.words, i, coding);
    const bool keep = is_kept(layout, id, value);
    shared.ids[i] = keep ? id : -1;
    shared.values[i] = value;
    high = keep ? fmaxf(high, value) : high;
    kept += keep;
  }
  const float top = block_max(high, largest);
  return {top, block_sum(kept, count)};
}

// log of the sum of exp(value / temperature) over the kept entries, whose largest is given.
__device__ __forceinline__ float log_sum(const RecordLayout& layout, const SharedRow& shared, float largest,
                                         float temperature, PartialSums& partial) {
  float sum = 0;
  for (int i = threadIdx.x; i < layout.shape.entries; i += blockDim.x) {
    if (shared.ids[i] >= 0) sum += expf((shared.values[i] - largest) / temperature);
  }
  return largest / temperature + logf(block_sum(sum, partial));
}

// Value descending, id ascending on ties.
__device__ __forceinline__ int rank_among(const SharedRow& shared, int entries, int i) {
  int rank = 0;
  const float value = shared.values[i];
  const int32_t id = shared.ids[i];
  for (int j = 0; j < entries; ++j) {
    const bool tied = shared.values[j] == value;
    const bool first = shared.values[j] > value || (tied && (shared.ids[j] < id || (shared.ids[j] == id && j < i)));
    rank += shared.ids[j] >= 0 && first;
  }
  return rank;
}

__device__ __forceinline__ void write_sorted(const RecordLayout& layout, const SharedRow& shared, int kept,
                                             const RecordOutput& row) {
  for (int i = threadIdx.x; i < layout.shape.entries; i += blockDim.x) {
    if (i >= kept) write_padding(layout, row, i);
    if (shared.ids[i] < 0) continue;
    const int rank = rank_among(shared, layout.shape.entries, i);
    row.ids[rank] = shared.ids[i];
    row.logprobs[rank] = shared.values[i];
    if (row.counts) row.counts[rank] = get_count(layout, shared.words, i);
  }
}

__device__ __forceinline__ void write_entries(const RecordLayout& layout, const SharedRow& shared,
                                              const RecordOutput& row) {
  __shared__ PartialSums sums;
  const KeptValues kept = read_entries(layout, shared);
  const float shift = value_shift(layout, shared.words, log_sum(layout, shared, kept.largest, 1, sums));
  for (int i = threadIdx.x; i < layout.shape.entries; i += blockDim.x) {
    shared.values[i] = fminf(shared.values[i] + shift, 0.0f);
  }
  __syncthreads();
  write_sorted(layout, shared, static_cast<int>(kept.count), row);
  int stored = 0;
  for (int t = 0; t < layout.shape.temperatures; ++t) {
    const float temperature = layout.shape.temperature[t];
    const float sum =
        temperature == 1 ? 0 : log_sum(layout, shared, fminf(kept.largest + shift, 0.0f), temperature, sums);
    const float norm = get_norm(layout, shared.words, t, sum, stored);
    if (threadIdx.x == 0) row.norm[t] = norm;
    __syncthreads();  // before `sums` is used again
  }
}

__global__ void __launch_bounds__(256) unpack_logits_kernel(const UnpackArguments a) {
  const RecordLayout& layout = a.layout;
  const int64_t r = blockIdx.x;
  const RecordOutput row = a.fields.row(layout.shape, r);
  uint32_t* words = record_words();
  float* values = reinterpret_cast<float*>(words + layout.words);
  load_record(a.packed + r * layout.bytes, layout, words);
  const bool valid = get_bits(words, layout.valid_at, 1) && (layout.exact() || tails_are_legal(layout, words));
  if (threadIdx.x == 0) *row.valid = valid;
  if (!valid && !layout.exact()) return write_invalid(layout, row);
  if (layout.exact()) {
    read_in_order(layout, words, row);
    int stored = 0;
    for (int t = 0; t < layout.shape.temperatures && threadIdx.x == 0; ++t) {
      row.norm[t] = get_norm(layout, words, t, 0, stored);
    }
  } else {
    write_entries(layout, {words, values, reinterpret_cast<int32_t*>(values + layout.shape.entries)}, row);
  }
  for (int t = threadIdx.x; t < layout.shape.temperatures; t += blockDim.x) row.tail[t] = get_tail(layout, words, t);
  if (threadIdx.x == 0 && row.label) *row.label = get_label(layout, words);
}

}  // namespace distillm
