// One token per row: temperature, top-k, top-p, min-p and an inverse cumulative distribution over the ids.
//
//   logits [R, V], float, bfloat16 or float16, any row stride -> token [R], its two log-probabilities, valid [R]
//
// One block per row; lanes visit chunks of 16 bytes (sample_row.cuh). Pass 1: maximum, softmax statistics at T = 1 and,
// where a filter needs a bound, counts of logits in bins (sample_bracket.cuh). Pass 2:
//   no filter, min-p    masses of tiles of entries, one tile once more;
//   top-k up to 1024    lists the entries that reach the k-th largest chunk maximum; the list is all that is looked at;
//   top-p, larger top-k lists the entries around the threshold, and masses of tiles of those above it.
// A list (up to 1024) that is too short for its entries, which takes many equal or nearly equal logits, and top-k above
// 1024 together with top-p: the threshold by radix search (sample_filter.cuh), 2 to 4 passes per filter.
// Neither weights nor a sorted row nor a mask is ever written. Each logit is read from memory once where the row fits
// in shared memory; of longer rows the first part is kept there and the rest is read once per pass.
//
// Masses are 64-bit integers (math/token_mass.h): the token is the CPU kernel's, bit for bit.
#pragma once

#include "sample_bracket.cuh"

namespace distillm {

constexpr int kSampleThreads = 768;  // which leaves 80 registers to each

struct SampleScratch {
  PartialExpSums raw;
  PartialSums maximum, first_maximum;
  SearchScratch search;
};

struct RowStatistics {
  ExpSum raw;     // of the logits as they are, at T = 1
  float maximum;  // after penalty and mask
};

// What pass 1 counts in the bins.
enum class Counted { kNothing, kChunkMaxima, kEntries };

// Whatever a list or a bracket will serve.
__device__ __forceinline__ Counted counted_by(const SamplingRule& rule, bool limits_count) {
  if (rule.greedy()) return Counted::kNothing;
  if (!limits_count) return rule.top_p < 1 ? Counted::kEntries : Counted::kNothing;
  if (rule.top_k > kListed / 2 && rule.top_p == 1) return Counted::kEntries;
  return rule.top_k <= kListed ? Counted::kChunkMaxima : Counted::kNothing;
}

// Clears the bins; the reference of the bins is the maximum of the first tiles.
template <class T>
__device__ Binning binning_of(const SampleRow<T>& row, float scale, SampleScratch& scratch) {
  for (int i = threadIdx.x; i < kBins; i += blockDim.x) scratch.search.bins()[i] = 0;
  return {fmaxf(block_max(row.largest_of_first(), scratch.first_maximum), -CUDART_MAX_NORMAL_F), scale};
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
  row.visit_raw(counted != Counted::kNothing, visit);
  publish(raw, scale, scratch.raw);
  maximum = block_max(maximum, scratch.maximum);
  return {collect(scratch.raw, scale), maximum};
}

__device__ __forceinline__ unsigned long long list_total(const unsigned long long* mass, int count) {
  unsigned long long total = 0;
  for (int i = threadIdx.x % kWarp; i < count; i += kWarp) total += mass[i];
  return warp_total(total);
}

// Filters and draws among the listed candidates, which hold everything that is kept.
__device__ __forceinline__ void draw_from_list(const SamplingRule& rule, SearchScratch& scratch) {
  const int count = scratch.listed;
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const bool keep = preceding(scratch, scratch.mass, i).count < rule.top_k;
    scratch.sums[i] = keep ? scratch.mass[i] : 0;
  }
  __syncthreads();
  const unsigned long long nucleus = nucleus_mass(rule.top_p, list_total(scratch.sums, count));
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const bool heavy = static_cast<float>(scratch.sums[i]) * static_cast<float>(1 / kMassUnits) >= rule.min_p;
    const bool keep = heavy && preceding(scratch, scratch.sums, i).mass < nucleus;
    scratch.mass[i] = keep ? scratch.sums[i] : 0;
  }
  __syncthreads();
  const unsigned long long total = list_total(scratch.mass, count), point = draw_point(rule.bits, total);
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    unsigned long long below = 0;
    const int id = scratch.id[i];
    for (int j = 0; j < count; ++j) below += scratch.id[j] < id ? scratch.mass[j] : 0;
    if (below <= point && point < below + scratch.mass[i]) {
      scratch.answer = id;
      scratch.part = scratch.mass[i];
      scratch.total = total;
    }
  }
  __syncthreads();
}

// Filters by radix search over the row.
template <class T>
__device__ Kept search_threshold(const SampleRow<T>& row, const SamplingRule& rule, bool limits_count,
                                 Tempering tempering, SearchScratch& scratch) {
  Kept kept{0u, INT32_MAX};
#pragma unroll 1
  for (int filter = 0; filter < 2; ++filter) {
    if (filter == 0 ? limits_count : rule.top_p < 1) {
      kept = row_threshold(row, scratch, tempering, kept, filter == 1, rule.top_k, rule.top_p);
    }
  }
  return kept;
}

// Pass 2 and what may follow it. `binning` is used where pass 1 counted.
template <class T>
__device__ void filter_and_draw(const SampleRow<T>& row, const SamplingRule& rule, Counted counted,
                                const Binning& binning, Tempering tempering, SearchScratch& scratch) {
  const bool limits_count = rule.limits_count(row.vocab);
  if (counted == Counted::kChunkMaxima) {
    const int bin = bin_of_count(scratch, rule.top_k);
    const uint32_t lowest = binning.key(static_cast<float>(bin) - 0.25f);
    list_candidates(row, tempering, scratch, {{lowest, INT32_MAX}, 0u, 0u});
    if (scratch.listed <= kListed) return draw_from_list(rule, scratch);
  }
  Measure measure{tempering, true, {{0u, INT32_MAX}, 0u, 0u}, rule.min_p};
  bool summed = false;
  if (counted == Counted::kEntries) {
    const int bin = limits_count ? max(bin_of_count(scratch, rule.top_k), 0) : 0;
    const Bracket bracket =
        limits_count ? bracket_of(binning, bin, bin) : bracket_of_mass(scratch, binning, tempering.maximum, rule.top_p);
    summed = bracket_threshold(row, rule, !limits_count, tempering, bracket, scratch, measure.inside.within);
  }
  if (!summed) {
    measure.inside.within = search_threshold(row, rule, limits_count, tempering, scratch);
    sum_tiles(row, scratch, measure);
  }
  locate(row, scratch, measure, true, rule.bits);
}

template <class T>
__device__ void take_maximum(const SampleRow<T>& row, float maximum, SearchScratch& scratch) {
  constexpr int N = SampleRow<T>::N;
  if (threadIdx.x == 0) {
    scratch.answer = INT32_MAX;
    scratch.part = scratch.total = 1;
  }
  __syncthreads();
  const auto visit = [&](int first, float (&z)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (z[i] == maximum) atomicMin(&scratch.answer, first + i);
    }
  };
  row.visit(visit, [](int) {});
  __syncthreads();
}

template <class T>
__device__ void write_token(const SampleCall& call, int64_t index, const SampleRow<T>& row, const ExpSum& raw,
                            const SearchScratch& scratch) {
  float z[4 / sizeof(T)];
  Packing<T>::unpack(Packing<T>::load(row.row + scratch.answer), z);
  call.token[index] = scratch.answer;
  call.logprob[index] = (z[0] - raw.maximum) - logf(raw.sum);  // in nats: a change of base could overflow
  call.filtered_logprob[index] = logf(static_cast<float>(scratch.part) / static_cast<float>(scratch.total));
  call.valid[index] = true;
}

__device__ __forceinline__ void write_no_token(const SampleCall& call, int64_t index) {
  call.token[index] = 0;
  call.logprob[index] = call.filtered_logprob[index] = CUDART_NAN_F;
  call.valid[index] = false;
}

// Blocks of whole warps; dynamic shared memory: the bitmaps where there are lists, then 16 bytes per staged chunk;
// grid.x = rows.
template <class T>
__global__ void __launch_bounds__(kSampleThreads, 1) sample_tokens_kernel(const SampleArguments a) {
  __shared__ SampleScratch scratch;
  extern __shared__ uint4 dynamic_shared[];
  const int64_t index = blockIdx.x;
  const SamplingRule rule = rule_of(a.call, index);
  const SampleRow<T> row(a, index, rule.penalty, dynamic_shared);
  const bool legal = rule.legal(), limits_count = rule.limits_count(row.vocab);
  if (!legal) {
    if (threadIdx.x == 0) write_no_token(a.call, index);
    return;
  }
  row.read_lists(a.call, index);
  const float scale = tempering_scale(rule.temperature);
  const Counted counted = counted_by(rule, limits_count);
  Binning binning{0.0f, scale};
  if (counted != Counted::kNothing) binning = binning_of(row, scale, scratch);
  const RowStatistics statistics = row_statistics(row, counted, binning, scratch);
  if (!(statistics.raw.sum > 0) || !(statistics.maximum > -CUDART_INF_F)) {
    if (threadIdx.x == 0) write_no_token(a.call, index);
    return;
  }
  if (rule.greedy()) {
    take_maximum(row, statistics.maximum, scratch.search);
  } else {
    filter_and_draw(row, rule, counted, binning, {statistics.maximum, scale}, scratch.search);
  }
  if (threadIdx.x == 0) write_token(a.call, index, row, statistics.raw, scratch.search);
}

}  // namespace distillm
