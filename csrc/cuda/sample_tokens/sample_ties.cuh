// Thresholds among equal logits: what the brackets hold is more than the list, but all of it is one value, so that its
// number per tile says all. Rows of few values, as bfloat16 makes them, need no further pass for that.
#pragma once

#include "sample_filter.cuh"

namespace distillm {

// The leader completes the numbers per tile, and says whether all candidates have the same key.
template <class T>
__device__ bool all_equal(const SampleRow<T>& row, SearchScratch& scratch) {
  for (int i = threadIdx.x; i < kListed; i += blockDim.x) {
    atomicAdd(scratch.overflow + row.tile_of(scratch.id[i]), 1u);
    atomicMin(&scratch.lowest, scratch.key[i]);
    atomicMax(&scratch.highest, scratch.key[i]);
  }
  __syncthreads();
  return scratch.lowest == scratch.highest;
}

// How many of the equal candidates, each of the given mass, are kept; 0 where the thresholds lie elsewhere.
__device__ __forceinline__ unsigned long long kept_ties(const SamplingRule& rule, bool limits_count,
                                                        unsigned long long each, const SearchScratch& scratch) {
  const uint32_t key = scratch.highest;
  unsigned long long kept = scratch.listed, within = scratch.within;
  if (limits_count) {
    const int64_t open = rule.top_k - scratch.count;
    if (!scratch.by_count.holds(key) || open < 1 || open > scratch.listed) return 0;
    kept = open;
    within += kept * each;
  }
  if (rule.top_p < 1) {
    const unsigned long long target = nucleus_mass(rule.top_p, within);
    if (!scratch.by_mass.holds(key) || target <= scratch.above || each == 0) return 0;
    const unsigned long long needed = (target - scratch.above + each - 1) / each;
    kept = needed > kept ? 0 : needed;
  }
  return kept;
}

// The leader's share after a pass whose list overflowed: the last kept id, and the masses of tiles, after min-p. False
// where the candidates are not equal or do not hold the threshold.
template <class T>
__device__ bool resolve_ties(const SampleRow<T>& row, const SamplingRule& rule, bool limits_count, Tempering tempering,
                             SearchScratch& scratch) {
  if (!all_equal(row, scratch)) return false;
  const uint32_t key = scratch.highest;
  const float weight = tempering.weight(number_of_key(key));
  const unsigned long long each = mass_of(weight), kept = kept_ties(rule, limits_count, each, scratch);
  if (kept == 0) return false;
  if (threadIdx.x < kWarp) {
    unsigned long long before = 0;
    const int last = locate_part(scratch.overflow, row.tiles, kept - 1, before);
    const Measure equal{tempering, false, {{0u, INT32_MAX}, ~0u, key}, 0.0f};
    locate_in_tile(row, scratch, equal, last, kept - 1, before);
    const unsigned long long share = weight >= rule.min_p ? each : 0;
    for (int tile = threadIdx.x; tile <= last; tile += kWarp) {
      scratch.sums[tile] += (tile < last ? scratch.overflow[tile] : kept - before) * share;
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) scratch.kept = {key, scratch.answer};
  return true;
}

}  // namespace distillm
