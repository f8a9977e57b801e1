// Packed records [R, bytes] of compressed logits: ids, logprobs [R, k] and the numbers of each row
// (math/records/record.h).
//
// One block per row; thread t takes the entries t, t + threads, ... The place of an entry among the ids is the number
// of smaller ones, counted in shared memory: k^2 comparisons, little to a GPU at k <= 1024 and free of barriers.
// Fields are joined by atomic OR into the record in shared memory, so the bytes do not depend on the order of threads;
// they are those of the CPU, since each number is made by the same single roundings. Every input is read at most twice,
// every byte written once.
#pragma once

#include <climits>

#include "../../math/records/record.h"
#include "record_block.cuh"

namespace distillm {

struct PackArguments {
  RecordLayout layout;
  RecordInput fields;
  uint8_t* packed;
};

// Ids of entries that are kept, INT_MAX for the others; threads meet before anyone reads them.
struct KeptRange {
  float largest, smallest;
  int count;
};

__device__ __forceinline__ KeptRange collect_kept(const RecordLayout& layout, const RecordInput& row, bool valid,
                                                  int32_t* ids) {
  __shared__ PartialSums largest, smallest, count;
  float high = -INFINITY, low = INFINITY, kept = 0;
  for (int i = threadIdx.x; i < layout.shape.entries; i += blockDim.x) {
    const float logprob = row.logprobs[i];
    const bool keep = valid && is_kept(layout, row.ids[i], logprob);
    ids[i] = keep ? row.ids[i] : INT_MAX;
    high = keep ? fmaxf(high, logprob) : high;
    low = keep ? fminf(low, logprob) : low;
    kept += keep;
  }
  const float top = block_max(high, largest), bottom = -block_max(-low, smallest);
  return {top, bottom, static_cast<int>(block_sum(kept, count))};
}

__device__ __forceinline__ int rank_among(const int32_t* ids, int entries, int i) {
  int rank = 0;
  for (int j = 0; j < entries; ++j) rank += ids[j] < ids[i] || (ids[j] == ids[i] && j < i);
  return rank;
}

__device__ __forceinline__ void put_sorted(const RecordLayout& layout, const RecordInput& row, const int32_t* ids,
                                           KeptRange kept, uint32_t* words) {
  const int entries = layout.shape.entries;
  const float scale = kept.count > 0 ? value_scale(layout, kept.largest, kept.smallest) : 0.0f;
  for (int i = threadIdx.x; i < entries; i += blockDim.x) {
    if (i >= kept.count) put_padding(layout, words, i);
    if (ids[i] == INT_MAX) continue;
    put_entry(layout, words, rank_among(ids, entries, i), ids[i], row.logprobs[i], row.counts ? row.counts[i] : 0,
              kept.largest, scale);
  }
  if (threadIdx.x == 0 && kept.count > 0) put_range(layout, words, kept.largest, kept.smallest);
}

__device__ __forceinline__ void put_in_order(const RecordLayout& layout, const RecordInput& row, uint32_t* words) {
  for (int i = threadIdx.x; i < layout.shape.entries; i += blockDim.x) {
    put_entry(layout, words, i, row.ids[i], row.logprobs[i], row.counts ? row.counts[i] : 0, 0, 0);
  }
}

__global__ void __launch_bounds__(256) pack_logits_kernel(const PackArguments a) {
  const RecordLayout& layout = a.layout;
  const int64_t r = blockIdx.x;
  const RecordInput row = a.fields.row(layout.shape, r);
  const bool valid = *row.valid;
  uint32_t* words = record_words();
  int32_t* ids = reinterpret_cast<int32_t*>(words + layout.words);
  for (int w = threadIdx.x; w < layout.words; w += blockDim.x) words[w] = 0;
  const KeptRange kept = collect_kept(layout, row, valid, ids);  // its barriers also separate the zeros from the fields
  if (layout.exact()) {
    put_in_order(layout, row, words);
  } else {
    put_sorted(layout, row, ids, kept, words);
  }
  if (threadIdx.x == 0) {
    put_row(layout, words, valid, kept.count > 0, row.tail, row.norm, row.label ? *row.label : 0.0f);
  }
  __syncthreads();
  uint8_t* out = a.packed + r * layout.bytes;
  for (int i = threadIdx.x; i < layout.bytes; i += blockDim.x) out[i] = byte_of(words, i);
}

}  // namespace distillm
