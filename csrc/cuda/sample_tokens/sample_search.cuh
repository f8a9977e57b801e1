// Integer searches of `sample_tokens` over shared memory: a digit of a histogram, a position in the tiles of a row, a
// threshold among listed candidates. Sums of integers only: the result does not depend on the order of threads.
//
// All blocks of a row's cluster add to the memory of the first one, the leader, which alone searches there.
#pragma once

#include <cstddef>

#include "sample_row.cuh"

namespace distillm {

constexpr int kDigits = 2048;  // of a radix step, with 64-bit sums
constexpr int kBins = 8192;    // of the counts of pass 1 (sample_bracket.cuh)
constexpr int kListed = 1024;  // candidates that are ranked by comparing each with each
constexpr int kSegments = kWarp;
constexpr int kMostTiles = 2064;  // of the longest row: 2^20 entries, 4 per chunk, 128 chunks per tile

// What a filter keeps: keys above, and ids up to last_id at the key itself.
struct Kept {
  uint32_t key;
  int32_t last_id;

  __device__ bool operator()(uint32_t k, int id) const { return k > key || (k == key && id <= last_id); }
};

// Keys above `high` are kept for sure, keys below `low` are not. {0, 0} is the bracket of no filter: it holds no entry.
struct Bracket {
  uint32_t low, high;

  __device__ bool holds(uint32_t key) const { return low <= key && key <= high; }
};

// What the searches share. `sums` holds a histogram, the masses of the tiles, or the masses of kept candidates. The
// bins of pass 1 lie over it and the list, which come later. While a list is made `overflow` counts per tile what it
// has no room for; then come the masses of what is listed.
struct SearchScratch {
  unsigned long long sums[kMostTiles];
  union {
    unsigned long long mass[kListed];
    uint32_t overflow[kMostTiles];
  };
  uint32_t key[kListed];
  int32_t id[kListed];
  unsigned long long segment[kSegments];
  unsigned long long above, within, total, part;  // above, within: of pass 2 (sample_bracket.cuh)
  int32_t count;                                  // likewise
  int32_t listed;                                 // how many candidates there were, listed or not
  uint32_t lowest, highest;                       // keys among those not listed
  int32_t answer;
  // What the leader found out, for all blocks.
  int32_t digit;
  bool resolved;
  Bracket by_count, by_mass;
  Kept kept;

  __device__ uint32_t* bins() { return reinterpret_cast<uint32_t*>(sums); }
  __device__ const uint32_t* bins() const { return reinterpret_cast<const uint32_t*>(sums); }
};
static_assert(offsetof(SearchScratch, segment) >= kBins * sizeof(uint32_t), "the bins fit");

// A block's own scratch and the leader's. In the leader they are the same; what only the leader does goes by its own,
// which the compiler knows to be near.
struct ClusterScratch {
  SearchScratch& own;
  SearchScratch& lead;
};

// The first lane at which the running sum of a warp, on top of `before`, exceeds `point`; -1 where none does. `before`
// becomes the sum up to that lane, or of all.
__device__ __forceinline__ int warp_locate(unsigned long long x, unsigned long long point, unsigned long long& before) {
  const unsigned long long running = before + warp_inclusive(x);
  const int lane = __ffs(__ballot_sync(kAllLanes, running > point)) - 1;
  before = __shfl_sync(kAllLanes, lane < 0 ? running : running - x, lane < 0 ? kWarp - 1 : lane);
  return lane;
}

// The highest digit at which the sum from the top exceeds `point`, and the sum above it.
struct Digit {
  int digit;  // -1: the whole histogram does not exceed it
  unsigned long long above;
};

// Sums per segment of the histogram; the histogram is complete. Followed by a barrier, then every thread may search.
template <int kSize, class Histogram>
__device__ void sum_segments(const Histogram& histogram, SearchScratch& scratch) {
  constexpr int kPerSegment = kSize / kSegments;
  const int lane = threadIdx.x % kWarp;
  for (int s = threadIdx.x / kWarp; s < kSegments; s += blockDim.x / kWarp) {
    unsigned long long sum = 0;
    for (int i = 0; i < kPerSegment; i += kWarp) sum += histogram[s * kPerSegment + i + lane];
    sum = warp_total(sum);
    if (lane == 0) scratch.segment[s] = sum;
  }
}

__device__ __forceinline__ unsigned long long histogram_total(const SearchScratch& scratch) {
  return warp_total(scratch.segment[threadIdx.x % kWarp]);
}

// Every warp searches for itself.
template <int kSize, class Histogram>
__device__ Digit find_digit(const Histogram& histogram, const SearchScratch& scratch, unsigned long long point) {
  constexpr int kPerSegment = kSize / kSegments;
  const int lane = threadIdx.x % kWarp;
  unsigned long long above = 0;
  const int from_top = warp_locate(scratch.segment[kSegments - 1 - lane], point, above);
  if (from_top < 0) return {-1, above};
  const int top = (kSegments - from_top) * kPerSegment - 1;
  for (int i = 0; i < kPerSegment; i += kWarp) {
    const int found = warp_locate(histogram[top - i - lane], point, above);
    if (found >= 0) return {top - i - found, above};
  }
  return {-1, above};  // unreachable: the segment exceeds the point
}

// The leader empties the list of a row of so many tiles, before a barrier of the cluster.
__device__ __forceinline__ void clear_list(SearchScratch& scratch, int tiles) {
  for (int tile = threadIdx.x; tile < tiles; tile += blockDim.x) scratch.overflow[tile] = 0;
  if (threadIdx.x > 0) return;
  scratch.listed = 0;
  scratch.lowest = ~0u;
  scratch.highest = 0;
  scratch.answer = -1;
}

// Appends an entry to the list, whose order does not matter.
__device__ __forceinline__ void append(SearchScratch& scratch, uint32_t key, int id, int tile) {
  const int at = atomicAdd(&scratch.listed, 1);
  if (at < kListed) {
    scratch.key[at] = key;
    scratch.id[at] = id;
    return;
  }
  atomicAdd(scratch.overflow + tile, 1u);
  atomicMin(&scratch.lowest, key);
  atomicMax(&scratch.highest, key);
}

// The leader's share once the list is complete and holds all.
__device__ __forceinline__ void weigh_list(SearchScratch& scratch, Tempering tempering) {
  for (int i = threadIdx.x; i < scratch.listed; i += blockDim.x) {
    scratch.mass[i] = mass_of(tempering.weight(number_of_key(scratch.key[i])));
  }
  __syncthreads();
}

// The first of so many parts, in order, at which the running sum exceeds `point`, by one warp; `before`: the sum before
// it. One of them does.
template <class Part>
__device__ int locate_part(const Part* part, int count, unsigned long long point, unsigned long long& before) {
  const int lane = threadIdx.x;
  before = 0;
  for (int first = 0; first < count; first += kWarp) {
    const int found = warp_locate(first + lane < count ? part[first + lane] : 0, point, before);
    if (found >= 0) return first + found;
  }
  return count - 1;  // unreachable
}

// Of the listed candidates in a bracket those before i in the order of selection: larger logits first, lower ids among
// equal ones.
struct Preceding {
  int count;
  unsigned long long mass;
};

constexpr Bracket kAllKeys{0u, ~0u};

__device__ __forceinline__ Preceding preceding(const SearchScratch& scratch, const unsigned long long* mass, int i,
                                               Bracket within = kAllKeys) {
  Preceding sum{0, 0};
  const uint32_t key = scratch.key[i];
  const int id = scratch.id[i];
  for (int j = 0; j < scratch.listed; ++j) {
    const bool larger = scratch.key[j] > key && scratch.key[j] <= within.high;
    const bool before = larger || (scratch.key[j] == key && scratch.id[j] < id);
    sum.count += before;
    sum.mass += before ? mass[j] : 0;
  }
  return sum;
}

}  // namespace distillm
