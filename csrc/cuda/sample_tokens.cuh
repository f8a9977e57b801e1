// One token per row: temperature, top-k, top-p, min-p and an inverse cumulative distribution over the ids.
//
//   logits [R, V], float, bfloat16 or float16, any row stride -> token [R], its two log-probabilities, valid [R]
//
// One block per row; lanes visit chunks of 16 bytes (sample_row.cuh). Pass 1: maximum, softmax statistics at T = 1 and,
// for top-k, a histogram of the chunks' maxima that bounds the k-th logit from below. Then
//   no filter       masses of tiles of entries, one tile once more;
//   top-k, min-p    pass 2 lists the entries above the bound, and the list (up to 1024) is all that is looked at;
//   top-p alone, or a longer list: the threshold by radix search over the row (sample_filter.cuh), 2 to 4 passes per
//                   filter, and the masses of tiles.
// Neither weights nor a sorted row nor a mask is ever written. Each logit is read from memory once where the row fits
// in shared memory; of longer rows the first part is kept there and the rest is read once per pass.
//
// Masses are 64-bit integers (math/token_mass.h): the token is the CPU kernel's, bit for bit.
#pragma once

#include "sample_filter.cuh"

namespace distillm {

constexpr int kSampleThreads = 768;  // 80 registers each; 64 are too few on sm_100

struct SampleScratch {
  PartialExpSums raw;
  float maximum[kMaxWarps];
  SearchScratch search;
};

struct RowStatistics {
  ExpSum raw;     // of the logits as they are, at T = 1
  float maximum;  // after penalty and mask
};

// Pass 1. With `coarse` also the histogram of the chunks' maxima.
template <class T>
__device__ RowStatistics row_statistics(const SampleRow<T>& row, bool coarse, SampleScratch& scratch) {
  constexpr int N = SampleRow<T>::N;
  for (int i = threadIdx.x; coarse && i < kCoarseDigits; i += blockDim.x) scratch.search.counts[i] = 0;
  __syncthreads();
  const float scale = static_cast<float>(kLog2E);
  ExpSum raw = ExpSum::empty();
  float maximum = -CUDART_INF_F;
  const auto visit = [&](int first, float (&z)[N]) {
    raw.add(z, scale);
    row.adjust(first, z);
    float highest = -CUDART_INF_F;
#pragma unroll
    for (int i = 0; i < N; ++i) highest = fmaxf(highest, z[i]);
    maximum = fmaxf(maximum, highest);
    if (coarse && highest > -CUDART_INF_F) atomicAdd(scratch.search.counts + (ordered_key(highest) >> 20), 1u);
  };
  row.visit_raw(visit);
  publish(raw, scale, scratch.raw);
  maximum = warp_max(maximum);
  if (threadIdx.x % kWarp == 0) scratch.maximum[threadIdx.x / kWarp] = maximum;
  __syncthreads();
  const int lane = threadIdx.x % kWarp;
  maximum = warp_max(lane < blockDim.x / kWarp ? scratch.maximum[lane] : -CUDART_INF_F);
  return {collect(scratch.raw, scale), maximum};
}

// The smallest key that can be kept, from pass 1: of top-k the k-th largest chunk maximum, rounded down, of min-p the
// logit with that weight, less a margin for rounding.
__device__ __forceinline__ uint32_t lowest_key(const SamplingRule& rule, bool limits_count, Tempering tempering,
                                               SearchScratch& scratch) {
  if (!limits_count) {
    const float bound = tempering.maximum + (log2f(rule.min_p) - 0.01f) / tempering.scale;
    return ordered_key(nextafterf(fmaxf(bound, -CUDART_MAX_NORMAL_F), -CUDART_INF_F));
  }
  sum_segments<kCoarseDigits>(scratch.counts, scratch);
  __syncthreads();
  const Digit d = find_digit<kCoarseDigits>(scratch.counts, scratch, static_cast<unsigned long long>(rule.top_k) - 1);
  return d.digit < 0 ? 0u : static_cast<uint32_t>(d.digit) << 20;
}

__device__ __forceinline__ unsigned long long list_total(const unsigned long long* mass, int count) {
  unsigned long long total = 0;
  for (int i = threadIdx.x % kWarp; i < count; i += kWarp) total += mass[i];
  return warp_total(total);
}

// Filters and draws among the listed candidates, which hold everything that is kept.
__device__ __forceinline__ void draw_from_list(const SamplingRule& rule, bool limits_count, SearchScratch& scratch) {
  const int count = scratch.listed;
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const bool keep = !limits_count || preceding(scratch, scratch.mass, i).count < rule.top_k;
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

// Filters by radix search over the row, and draws from it.
template <class T>
__device__ void draw_from_row(const SampleRow<T>& row, const SamplingRule& rule, bool limits_count, Tempering tempering,
                              SearchScratch& scratch) {
  Kept kept{0u, INT32_MAX};
#pragma unroll 1
  for (int filter = 0; filter < 2; ++filter) {
    if (filter == 0 ? limits_count : rule.top_p < 1) {
      kept = row_threshold(row, scratch, tempering, kept, filter == 1, rule.top_k, rule.top_p);
    }
  }
  const Measure measure{tempering, true, {kept, 0u, 0u}, rule.min_p};
  sum_tiles(row, scratch, measure);
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
  const float log2_p = (z[0] - raw.maximum) * static_cast<float>(kLog2E) - log2f(raw.sum);
  call.token[index] = scratch.answer;
  call.logprob[index] = log2_p * static_cast<float>(kLn2);
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
  const RowStatistics statistics = row_statistics(row, limits_count && !rule.greedy(), scratch);
  if (!(statistics.raw.sum > 0) || !(statistics.maximum > -CUDART_INF_F)) {
    if (threadIdx.x == 0) write_no_token(a.call, index);
    return;
  }
  SearchScratch& search = scratch.search;
  const Tempering tempering{statistics.maximum, tempering_scale(rule.temperature)};
  bool drawn = rule.greedy();
  if (drawn) take_maximum(row, statistics.maximum, search);
  if (!drawn && (limits_count || (rule.top_p == 1 && rule.min_p > 0))) {
    const uint32_t lowest = lowest_key(rule, limits_count, tempering, search);
    list_candidates(row, tempering, search, {{lowest, INT32_MAX}, 0u, 0u});
    drawn = search.listed <= kListed;
    if (drawn) draw_from_list(rule, limits_count, search);
  }
  if (!drawn) draw_from_row(row, rule, limits_count, tempering, search);
  if (threadIdx.x == 0) write_token(a.call, index, row, statistics.raw, search);
}

}  // namespace distillm
