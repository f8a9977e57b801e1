// The passes of `sample_tokens` that select: candidates into a list, the threshold of a filter over the whole row, and
// the entry that a point of the cumulative sum falls on.
//
// What varies between their uses is data, not a template parameter: the row is walked by few copies of the code.
#pragma once

#include "sample_search.cuh"

namespace distillm {

// Kept entries whose key starts with the digits found so far.
struct Undecided {
  Kept within;
  uint32_t mask, digits;

  __device__ bool operator()(uint32_t k, int id) const { return (k & mask) == digits && within(k, id); }
};

// Lists the entries that `inside` names; listed says how many there are, also where they do not fit. The list is empty
// at the start, which all blocks know.
template <class T>
__device__ void list_candidates(const SampleRow<T>& row, SearchScratch& lead, const Undecided& inside) {
  constexpr int N = SampleRow<T>::N;
  const auto visit = [&](int first, float (&z)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const uint32_t key = ordered_key(z[i]);
      if (z[i] > -CUDART_INF_F && inside(key, first + i)) append(lead, key, first + i, row.tile_of(first + i));
    }
  };
  row.visit(visit, [](int) {});
  row.cluster.synchronize();
}

// What an entry adds to a sum: 1 or its mass, if it is kept and weighs at least min_p.
struct Measure {
  Tempering tempering;
  bool by_mass;
  Undecided inside;
  float min_p;

  __device__ unsigned long long whole(float z) const { return by_mass ? mass_of(tempering.weight(z)) : 1; }
  __device__ unsigned long long operator()(int id, float z) const {
    if (!(z > -CUDART_INF_F) || !inside(ordered_key(z), id)) return 0;
    const float weight = by_mass || min_p > 0 ? tempering.weight(z) : 1.0f;
    return weight < min_p ? 0 : by_mass ? mass_of(weight) : 1;
  }
};

// The sum of the measures of every tile.
template <class T>
__device__ void sum_tiles(const SampleRow<T>& row, SearchScratch& lead, const Measure& measure) {
  constexpr int N = SampleRow<T>::N;
  unsigned long long sum = 0;
  const auto visit = [&](int first, float (&z)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) sum += measure(first + i, z[i]);
  };
  row.visit(visit, [&](int tile) {
    sum = warp_total(sum);
    if (threadIdx.x % kWarp == 0) lead.sums[tile] = sum;
    sum = 0;
  });
  row.cluster.synchronize();
}

// The first entry of one chunk per lane at which the running sum exceeds `point`; writes it and its part.
template <class T>
__device__ bool locate_in_chunks(const SampleRow<T>& row, SearchScratch& scratch, const Measure& measure, int tile,
                                 int j, unsigned long long point, unsigned long long& before) {
  constexpr int N = SampleRow<T>::N;
  unsigned long long sum = 0;
  row.visit_one(tile, j, [&](int first, float (&z)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) sum += measure(first + i, z[i]);
  });
  const int lane = warp_locate(sum, point, before);
  if (lane < 0) return false;
  if (threadIdx.x != lane) return true;
  unsigned long long running = before;
  row.visit_one(tile, j, [&](int first, float (&z)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const unsigned long long part = measure(first + i, z[i]);
      const bool crosses = running <= point && running + part > point;
      running += part;
      if (crosses) scratch.answer = first + i;
      if (crosses) scratch.part = part;
    }
  });
  return true;
}

template <class T>
__device__ void locate_in_tile(const SampleRow<T>& row, SearchScratch& scratch, const Measure& measure, int tile,
                               unsigned long long point, unsigned long long before) {
#pragma unroll 1
  for (int j = 0; j < kLaneChunks; ++j) {
    if (locate_in_chunks(row, scratch, measure, tile, j, point, before)) break;
  }
}

// After sum_tiles, by one warp of the leader: the first id at which the running sum exceeds a point, into
// scratch.answer. The point is given, or drawn from the total by `bits`.
template <class T>
__device__ void locate(const SampleRow<T>& row, SearchScratch& scratch, const Measure& measure, bool draws,
                       uint64_t bits_or_point) {
  if (threadIdx.x < kWarp) {
    const int lane = threadIdx.x;
    unsigned long long total = 0, before = 0;
    for (int tile = lane; tile < row.tiles; tile += kWarp) total += scratch.sums[tile];
    total = warp_total(total);
    const unsigned long long point = draws ? draw_point(bits_or_point, total) : bits_or_point;
    const int tile = locate_part(scratch.sums, row.tiles, point, before);
    locate_in_tile(row, scratch, measure, tile, point, before);
    if (lane == 0) scratch.total = total;
  }
  __syncthreads();
}

// Histogram of the digit at `shift` of what the measure admits.
template <class T>
__device__ void digit_histogram(const SampleRow<T>& row, ClusterScratch scratch, int shift, const Measure& measure) {
  constexpr int N = SampleRow<T>::N;
  for (int i = threadIdx.x; row.cluster.rank == 0 && i < kDigits; i += blockDim.x) scratch.own.sums[i] = 0;
  row.cluster.synchronize();
  const auto visit = [&](int first, float (&z)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const unsigned long long part = measure(first + i, z[i]);
      if (part > 0) atomicAdd(scratch.lead.sums + (ordered_key(z[i]) >> shift & (kDigits - 1)), part);
    }
  };
  row.visit(visit, [](int) {});
  row.cluster.synchronize();
}

// Of the listed candidates in a bracket the one that completes the target, on top of `above`; by mass or by count.
// Where none does, scratch.answer stays what it was.
__device__ __forceinline__ Kept complete_in_list(SearchScratch& scratch, bool by_mass, unsigned long long above,
                                                 unsigned long long target, Bracket within = kAllKeys) {
  for (int i = threadIdx.x; i < scratch.listed; i += blockDim.x) {
    if (!within.holds(scratch.key[i])) continue;
    const Preceding p = preceding(scratch, scratch.mass, i, within);
    const unsigned long long before = above + (by_mass ? p.mass : p.count), own = by_mass ? scratch.mass[i] : 1;
    if (before < target && target <= before + own) scratch.answer = i;
  }
  __syncthreads();
  const int answer = scratch.answer < 0 ? 0 : scratch.answer;
  return {scratch.key[answer], scratch.id[answer]};
}

// What a filter is to keep: so many of the largest, or the smallest set of them that has p of the mass.
struct Goal {
  bool by_mass;
  int64_t top_k;
  float p;

  // `total`: the measure of all that there is.
  __device__ unsigned long long target(unsigned long long total) const {
    const unsigned long long count = static_cast<unsigned long long>(top_k);
    return by_mass ? nucleus_mass(p, total) : count < total ? count : total;
  }
};

// The leader's share of a radix step: the digit that completes the target. Target and the sum above are its own.
__device__ __forceinline__ void choose_digit(SearchScratch& scratch, const Goal& goal, int tiles, bool first,
                                             unsigned long long& target, unsigned long long& above) {
  sum_segments<kDigits>(scratch.sums, scratch);
  __syncthreads();
  if (first) target = goal.target(histogram_total(scratch));
  const Digit found = find_digit<kDigits>(scratch.sums, scratch, target - 1 - above);
  above += found.above;
  if (threadIdx.x == 0) scratch.digit = found.digit;
  clear_list(scratch, tiles);
}

// The filter's threshold among those kept so far: three digits of the key, a pass each; after the first a list of the
// undecided takes the place of the others if it holds them.
template <class T>
__device__ Kept row_threshold(const SampleRow<T>& row, ClusterScratch scratch, Tempering tempering, Kept within,
                              const Goal& goal) {
  const bool leads = row.cluster.rank == 0;
  Measure measure{tempering, goal.by_mass, {within, 0u, 0u}, 0.0f};
  unsigned long long target = 0, above = 0;
  bool listed = false;
#pragma unroll 1
  for (int step = 0, shift = 21; step < 3 && !listed; ++step, shift = step == 1 ? 10 : 0) {
    digit_histogram(row, scratch, shift, measure);
    if (leads) choose_digit(scratch.own, goal, row.tiles, step == 0, target, above);
    row.cluster.synchronize();
    measure.inside.digits |= static_cast<uint32_t>(scratch.lead.digit) << shift;
    measure.inside.mask = ~0u << shift;
    if (step > 0) continue;
    list_candidates(row, scratch.lead, measure.inside);
    listed = scratch.lead.listed <= kListed;
  }
  Kept kept{measure.inside.digits, 0};
  if (listed) {
    if (leads) {
      weigh_list(scratch.own, tempering);
      kept = complete_in_list(scratch.own, goal.by_mass, above, target);
    }
  } else {
    // Equal logits measure the same: how many of them complete the target, and the id of the last.
    const unsigned long long each = measure.whole(number_of_key(kept.key));
    measure.by_mass = false;
    sum_tiles(row, scratch.lead, measure);
    if (leads) {
      locate(row, scratch.own, measure, false, (target - above + each - 1) / each - 1);
      kept.last_id = scratch.own.answer;
    }
  }
  if (leads && threadIdx.x == 0) scratch.own.kept = kept;
  row.cluster.synchronize();
  return scratch.lead.kept;
}

}  // namespace distillm
