// The passes of `sample_tokens` that select: candidates into a list, the threshold of a filter over the whole row, and
// the entry that a point of the cumulative sum falls on.
//
// What varies between their uses is data, not a template parameter: the row is walked by few copies of the code.
#pragma once

#include "sample_search.cuh"

namespace distillm {

// What a filter keeps: keys above, and ids up to last_id at the key itself.
struct Kept {
  uint32_t key;
  int32_t last_id;

  __device__ bool operator()(uint32_t k, int id) const { return k > key || (k == key && id <= last_id); }
};

// Kept entries whose key starts with the digits found so far.
struct Undecided {
  Kept within;
  uint32_t mask, digits;

  __device__ bool operator()(uint32_t k, int id) const { return (k & mask) == digits && within(k, id); }
};

// Lists the entries that `inside` names; scratch.listed says how many there are, also where they do not fit.
template <class T>
__device__ void list_candidates(const SampleRow<T>& row, Tempering tempering, SearchScratch& scratch,
                                const Undecided& inside) {
  constexpr int N = SampleRow<T>::N;
  if (threadIdx.x == 0) scratch.listed = 0;
  __syncthreads();
  const auto visit = [&](int first, float (&z)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const uint32_t key = ordered_key(z[i]);
      if (z[i] > -CUDART_INF_F && inside(key, first + i)) append(scratch, key, first + i, tempering.weight(z[i]));
    }
  };
  row.visit(visit, [](int) {});
  __syncthreads();
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

// The sum of the measures of every tile, and of the row into scratch.total.
template <class T>
__device__ void sum_tiles(const SampleRow<T>& row, SearchScratch& scratch, const Measure& measure) {
  constexpr int N = SampleRow<T>::N;
  unsigned long long sum = 0;
  const auto visit = [&](int first, float (&z)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) sum += measure(first + i, z[i]);
  };
  row.visit(visit, [&](int tile) {
    sum = warp_total(sum);
    if (threadIdx.x % kWarp == 0) scratch.sums[tile] = sum;
    sum = 0;
  });
  __syncthreads();
}

// The first entry of one chunk per lane at which the running sum exceeds `point`; writes it and its part.
template <class T>
__device__ bool locate_in_chunks(const SampleRow<T>& row, SearchScratch& scratch, const Measure& measure, int chunk,
                                 unsigned long long point, unsigned long long& before) {
  constexpr int N = SampleRow<T>::N;
  unsigned long long sum = 0;
  row.visit_one(chunk + threadIdx.x, [&](int first, float (&z)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) sum += measure(first + i, z[i]);
  });
  const int lane = warp_locate(sum, point, before);
  if (lane < 0) return false;
  if (threadIdx.x != lane) return true;
  unsigned long long running = before;
  row.visit_one(chunk + lane, [&](int first, float (&z)[N]) {
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

// After sum_tiles, by one warp: the first id at which the running sum exceeds a point, into scratch.answer. The point
// is given, or drawn from the total by `bits`.
template <class T>
__device__ void locate(const SampleRow<T>& row, SearchScratch& scratch, const Measure& measure, bool draws,
                       uint64_t bits_or_point) {
  if (threadIdx.x < kWarp) {
    const int lane = threadIdx.x;
    unsigned long long total = 0, before = 0;
    for (int tile = lane; tile < row.tiles; tile += kWarp) total += scratch.sums[tile];
    total = warp_total(total);
    const unsigned long long point = draws ? draw_point(bits_or_point, total) : bits_or_point;
    int tile = 0, found = -1;
    for (; tile < row.tiles; tile += kWarp) {
      found = warp_locate(tile + lane < row.tiles ? scratch.sums[tile + lane] : 0, point, before);
      if (found >= 0) break;
    }
    const int chunk = (tile + found) * kTileChunks;
#pragma unroll 1
    for (int j = 0; j < kLaneChunks; ++j) {
      if (locate_in_chunks(row, scratch, measure, chunk + j * kWarp, point, before)) break;
    }
    if (lane == 0) scratch.total = total;
  }
  __syncthreads();
}

// Histogram of the digit at `shift` of what the measure admits, with sums per segment; complete on return.
template <class T>
__device__ void digit_histogram(const SampleRow<T>& row, SearchScratch& scratch, int shift, const Measure& measure) {
  constexpr int N = SampleRow<T>::N;
  for (int i = threadIdx.x; i < kDigits; i += blockDim.x) scratch.sums[i] = 0;
  __syncthreads();
  const auto visit = [&](int first, float (&z)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const unsigned long long part = measure(first + i, z[i]);
      if (part > 0) atomicAdd(scratch.sums + (ordered_key(z[i]) >> shift & (kDigits - 1)), part);
    }
  };
  row.visit(visit, [](int) {});
  __syncthreads();
  sum_segments<kDigits>(scratch.sums, scratch);
  __syncthreads();
}

// Of the listed candidates the one that completes the target, on top of `above`; by mass or by count. Where none does,
// scratch.answer stays what it was.
__device__ __forceinline__ Kept complete_in_list(SearchScratch& scratch, bool by_mass, unsigned long long above,
                                                 unsigned long long target) {
  for (int i = threadIdx.x; i < scratch.listed; i += blockDim.x) {
    const Preceding p = preceding(scratch, scratch.mass, i);
    const unsigned long long before = above + (by_mass ? p.mass : p.count), own = by_mass ? scratch.mass[i] : 1;
    if (before < target && target <= before + own) scratch.answer = i;
  }
  __syncthreads();
  const int answer = scratch.answer < 0 ? 0 : scratch.answer;
  const Kept kept{scratch.key[answer], scratch.id[answer]};
  return kept;
}

// The smallest set of largest logits among those kept so far that counts `top_k`, or has p of the mass: three digits of
// the key, a pass each; after the first a list of the undecided takes the place of the others if it holds them.
template <class T>
__device__ Kept row_threshold(const SampleRow<T>& row, SearchScratch& scratch, Tempering tempering, Kept within,
                              bool by_mass, int64_t top_k, float p) {
  Measure measure{tempering, by_mass, {within, 0u, 0u}, 0.0f};
  unsigned long long target = 0, above = 0;
#pragma unroll 1
  for (int step = 0, shift = 21; step < 3; ++step, shift = step == 1 ? 10 : 0) {
    digit_histogram(row, scratch, shift, measure);
    if (step == 0) {
      const unsigned long long total = histogram_total(scratch), count = static_cast<unsigned long long>(top_k);
      target = by_mass ? nucleus_mass(p, total) : count < total ? count : total;
    }
    const Digit d = find_digit<kDigits>(scratch.sums, scratch, target - 1 - above);
    above += d.above;
    measure.inside.digits |= static_cast<uint32_t>(d.digit) << shift;
    measure.inside.mask = ~0u << shift;
    __syncthreads();
    if (step > 0) continue;
    list_candidates(row, tempering, scratch, measure.inside);
    if (scratch.listed > kListed) continue;
    const Kept kept = complete_in_list(scratch, by_mass, above, target);
    __syncthreads();
    return kept;
  }
  // Equal logits measure the same: how many of them complete the target, and the id of the last.
  const uint32_t key = measure.inside.digits;
  const unsigned long long each = measure.whole(number_of_key(key));
  measure.by_mass = false;
  sum_tiles(row, scratch, measure);
  locate(row, scratch, measure, false, (target - above + each - 1) / each - 1);
  const Kept kept{key, scratch.answer};
  __syncthreads();
  return kept;
}

}  // namespace distillm
