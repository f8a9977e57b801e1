// Pass 1 of `sample_tokens`: maximum, softmax statistics at T = 1 and the counts in bins, of a block's part of the row
// and then of the row.
#pragma once

#include "sample_bracket.cuh"

namespace distillm {

struct SampleScratch {
  // Of the whole row; here and not in registers, which are few.
  SamplingRule rule;
  ExpSum row_raw;

  PartialExpSums raw;
  PartialSums maximum, first_maximum, first_minimum;
  ExpSum raw_of_block[kMaxCluster];
  float maximum_of_block[kMaxCluster], first_of_block[kMaxCluster];
  SearchScratch search;
};

struct RowStatistics {
  ExpSum raw;     // of the logits as they are, at T = 1
  float maximum;  // after penalty and mask
};

// What pass 1 counts in the bins.
enum class Counted { kNothing, kChunkMaxima, kEntries };

// As many chunks as a list holds the entries of, whatever the order of the row, else a bracket. N: entries of a chunk.
template <int N>
__device__ __forceinline__ Counted counted_by(const SamplingRule& rule, bool limits_count) {
  if (rule.greedy()) return Counted::kNothing;
  if (!limits_count) return rule.top_p < 1 ? Counted::kEntries : Counted::kNothing;
  return rule.top_k > kListed / N ? Counted::kEntries : Counted::kChunkMaxima;
}

// The largest of what the blocks of a cluster have; `of_block` serves one such maximum.
__device__ __forceinline__ float cluster_max(float x, float (&of_block)[kMaxCluster], const Cluster& cluster) {
  if (cluster.size == 1) return x;
  if (threadIdx.x < kWarp) cluster.to_all_blocks(of_block + cluster.rank, x);
  cluster.synchronize();
  for (int block = 0; block < cluster.size; ++block) x = fmaxf(x, of_block[block]);
  return x;
}

__device__ __forceinline__ Range block_range(Range x, SampleScratch& scratch) {
  publish_maximum(x.high, scratch.first_maximum);
  x.low = -block_max(-x.low, scratch.first_minimum);
  return {x.low, collect_maximum(scratch.first_maximum)};
}

// Clears the bins and chooses their reference and width: by the first tiles; by a sample of the row where it is not
// staged, so that no further pass is wanted. Blocks of a cluster need the same bins, and may search: wide ones will do.
template <class T>
__device__ Binning binning_of(const SampleRow<T>& row, float scale, SampleScratch& scratch) {
  for (int i = threadIdx.x; i < kBins; i += blockDim.x) scratch.search.bins()[i] = 0;
  const Range range = block_range(row.staged_whole() ? row.range_of_first() : row.range_of_sample(), scratch);
  const float high = fmaxf(cluster_max(range.high, scratch.first_of_block, row.cluster), -CUDART_MAX_NORMAL_F);
  return Binning::of(high, scale, row.cluster.size == 1 ? high - range.low : CUDART_INF_F);
}

// The statistics of the row out of those of its blocks, and their counts into the leader's bins.
__device__ __forceinline__ RowStatistics combine_blocks(RowStatistics own, bool counted, const Cluster& cluster,
                                                        SampleScratch& scratch) {
  if (cluster.size == 1) return own;
  uint32_t* const own_bins = scratch.search.bins();
  uint32_t* const bins = cluster.in_block(own_bins, 0);
  for (int i = threadIdx.x; counted && cluster.rank > 0 && i < kBins; i += blockDim.x) {
    if (const uint32_t count = own_bins[i]) atomicAdd(bins + i, count);
  }
  if (threadIdx.x < kWarp) cluster.to_all_blocks(scratch.raw_of_block + cluster.rank, own.raw);
  const float maximum = cluster_max(own.maximum, scratch.maximum_of_block, cluster);
  const ExpSum(&of_block)[kMaxCluster] = scratch.raw_of_block;
  ExpSum raw = of_block[0];
  for (int block = 1; block < cluster.size; ++block) raw = raw.with(of_block[block], static_cast<float>(kLog2E));
  return {raw, maximum};
}

// Pass 1.
template <class T>
__device__ RowStatistics row_statistics(const SampleRow<T>& row, Counted counted, const Binning& binning,
                                        SampleScratch& scratch) {
  constexpr int N = SampleRow<T>::N;
  const float scale = static_cast<float>(kLog2E);
  uint32_t* const bins = scratch.search.bins();
  const auto count = [&](float z) {
    if (z > -CUDART_INF_F) atomicAdd(bins + binning.bin(z), 1u);
  };
  ExpSum raw = ExpSum::empty();
  float maximum = -CUDART_INF_F;
  const auto visit = [&](int first, float (&z)[N]) {
    raw.add(z, scale);
    row.adjust(first, z);
    float highest = -CUDART_INF_F;
#pragma unroll
    for (int i = 0; i < N; ++i) highest = fmaxf(highest, z[i]);
    maximum = fmaxf(maximum, highest);
    if (counted == Counted::kChunkMaxima) count(highest);
    if (counted != Counted::kEntries) return;
#pragma unroll
    for (int i = 0; i < N; ++i) count(z[i]);
  };
  row.visit_raw(counted != Counted::kNothing && row.staged_whole(), visit);
  publish(raw, scale, scratch.raw);
  maximum = block_max(maximum, scratch.maximum);
  const RowStatistics own{collect(scratch.raw, scale), maximum};
  return combine_blocks(own, counted != Counted::kNothing, row.cluster, scratch);
}

}  // namespace distillm
