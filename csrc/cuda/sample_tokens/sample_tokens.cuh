// One token per row: temperature, top-k, top-p, min-p and an inverse cumulative distribution over the ids.
//
//   logits [R, V], float, bfloat16 or float16, any row stride -> token [R], its two log-probabilities, valid [R]
//
// One cluster of blocks per row, mostly of one block; lanes visit chunks of 16 bytes (sample_row.cuh). Pass 1: maximum,
// softmax statistics at T = 1 and, where a filter needs a bound, counts of logits in bins (sample_bracket.cuh). Pass 2:
//   no filter, min-p    masses of tiles of entries, one tile once more;
//   small top-k         lists the entries that reach the k-th largest chunk maximum; the list is all that is looked at;
//   top-p, larger top-k lists the entries around the thresholds, and masses of tiles of those above them.
// A list (up to 1024) that is too short for its entries, unless they are all equal (sample_ties.cuh), or a bracket that
// missed: the threshold by radix search (sample_filter.cuh), 2 to 5 passes per filter.
// Neither weights nor a sorted row nor a mask is ever written. Each logit is read from memory once where the row fits
// in the shared memory of a block or, from compute capability 9.0 on, of a cluster (fp32: V <= 390,000 at 227 KB);
// of longer rows the first part is kept there and the rest is read once per pass: twice in all, but for the search.
//
// Masses are 64-bit integers (math/sampling/token_mass.h): the token is the CPU kernel's, bit for bit.
#pragma once

#include "sample_statistics.cuh"

namespace distillm {

constexpr int kSampleThreads = 640;  // which leaves 96 registers to each

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
                                 Tempering tempering, ClusterScratch scratch) {
  Kept kept{0u, INT32_MAX};
#pragma unroll 1
  for (int filter = 0; filter < 2; ++filter) {
    if (filter == 0 ? limits_count : rule.top_p < 1) {
      kept = row_threshold(row, scratch, tempering, kept, {filter == 1, rule.top_k, rule.top_p});
    }
  }
  return kept;
}

// The leader's share between pass 1 and pass 2: where the thresholds lie, as the counts tell. Without top-p the bracket
// of top-k serves for both.
__device__ __forceinline__ void open_brackets(const SamplingRule& rule, Counted counted, bool limits_count,
                                              const Binning& binning, float maximum, int tiles,
                                              SearchScratch& scratch) {
  Bracket by_count{0u, 0u};
  int last = 0;
  float share = 1;
  if (limits_count) {
    const Digit found = bin_of_count(scratch, rule.top_k);
    last = max(found.digit, 0);
    by_count = bracket_of(binning, last, last);
    if (found.digit < 0) by_count.low = 0;
    if (counted == Counted::kChunkMaxima) by_count.high = ~0u;
    share = static_cast<float>(rule.top_k - static_cast<int64_t>(found.above)) / scratch.bins()[last];
    __syncthreads();
  }
  Bracket by_mass = by_count;
  if (counted == Counted::kEntries && rule.top_p < 1) {
    const BinMasses masses{scratch.bins(), binning.bin(maximum), binning.per_octave};
    sum_segments<kBins>(masses, scratch);
    __syncthreads();
    const float whole =
        limits_count ? mass_from(masses, last, fminf(share, 1.0f)) : static_cast<float>(histogram_total(scratch));
    by_mass = bracket_of_mass(scratch, binning, masses, whole, rule.top_p);
  }
  __syncthreads();  // the list lies over the bins
  clear_list(scratch, tiles);
  for (int tile = threadIdx.x; tile < tiles; tile += blockDim.x) scratch.sums[tile] = 0;
  if (threadIdx.x > 0) return;
  scratch.by_count = by_count;
  scratch.by_mass = {by_mass.low, max(by_mass.high, by_count.high)};
  scratch.count = 0;
  scratch.above = scratch.within = 0;
}

// Pass 2 over the listed entries alone. False where they are too many.
template <class T>
__device__ bool draw_among_listed(const SampleRow<T>& row, const SamplingRule& rule, Tempering tempering,
                                  ClusterScratch scratch) {
  list_candidates(row, scratch.lead, {{scratch.lead.by_count.low, INT32_MAX}, 0u, 0u});
  const bool all = scratch.lead.listed <= kListed;
  if (all && row.cluster.rank == 0) {
    weigh_list(scratch.own, tempering);
    draw_from_list(rule, scratch.own);
  }
  return all;
}

// Pass 2 with brackets, or what is left to do where the list of candidates overflowed. False where a bracket misses.
template <class T>
__device__ bool filter_by_brackets(const SampleRow<T>& row, const SamplingRule& rule, bool limits_count,
                                   Tempering tempering, bool listed, ClusterScratch scratch) {
  if (!listed) bracket_pass(row, scratch.lead, tempering, rule.min_p, scratch.lead.by_count, scratch.lead.by_mass);
  if (row.cluster.rank == 0) {
    const bool resolved = resolve_brackets(row, rule, limits_count, tempering, scratch.own);
    if (threadIdx.x == 0) scratch.own.resolved = resolved;
  }
  row.cluster.synchronize();
  return scratch.lead.resolved;
}

// Pass 2 and what may follow it. `binning` is used where pass 1 counted.
template <class T>
__device__ void filter_and_draw(const SampleRow<T>& row, const SamplingRule& rule, Counted counted,
                                const Binning& binning, Tempering tempering, ClusterScratch scratch) {
  const bool limits_count = rule.limits_count(row.vocab), leads = row.cluster.rank == 0;
  if (counted != Counted::kNothing) {
    if (leads) open_brackets(rule, counted, limits_count, binning, tempering.maximum, row.tiles, scratch.own);
    row.cluster.synchronize();
  }
  const bool lists = counted == Counted::kChunkMaxima;
  if (lists && draw_among_listed(row, rule, tempering, scratch)) return;
  Measure measure{tempering, true, {{0u, INT32_MAX}, 0u, 0u}, rule.min_p};
  if (counted != Counted::kNothing && filter_by_brackets(row, rule, limits_count, tempering, lists, scratch)) {
    measure.inside.within = scratch.lead.kept;
  } else {
    measure.inside.within = search_threshold(row, rule, limits_count, tempering, scratch);
    sum_tiles(row, scratch.lead, measure);
  }
  if (leads) locate(row, scratch.own, measure, true, rule.bits);
}

template <class T>
__device__ void take_maximum(const SampleRow<T>& row, float maximum, ClusterScratch scratch) {
  constexpr int N = SampleRow<T>::N;
  if (row.cluster.thread() == 0) {
    scratch.own.answer = INT32_MAX;
    scratch.own.part = scratch.own.total = 1;
  }
  row.cluster.synchronize();
  const auto visit = [&](int first, float (&z)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (z[i] == maximum) atomicMin(&scratch.lead.answer, first + i);
    }
  };
  row.visit(visit, [](int) {});
  row.cluster.synchronize();
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

// Blocks of whole warps, in clusters; grid.x = rows * blocks of a cluster; dynamic shared memory: the bitmaps where
// there are lists, then 16 bytes per staged chunk.
template <class T>
__global__ void __launch_bounds__(kSampleThreads, 1) sample_tokens_kernel(const SampleArguments a) {
  __shared__ SampleScratch scratch;
  extern __shared__ uint4 dynamic_shared[];
  const Cluster cluster = Cluster::current();
  const int index = cluster.row();
  if (threadIdx.x == 0) scratch.rule = rule_of(a.call, index);
  __syncthreads();
  const SamplingRule& rule = scratch.rule;
  const bool writes = cluster.thread() == 0;
  if (!rule.legal()) {
    if (writes) write_no_token(a.call, index);
    return;
  }
  cluster.arrive();
  const SampleRow<T> row(a, index, rule.penalty, cluster, dynamic_shared);
  row.read_lists(a.call, index);
  const float scale = tempering_scale(rule.temperature);
  const Counted counted = counted_by<SampleRow<T>::N>(rule, rule.limits_count(row.vocab));
  cluster.wait();
  Binning binning{0.0f, scale, kBinsPerOctave};
  if (counted != Counted::kNothing) binning = binning_of(row, scale, scratch);
  const RowStatistics statistics = row_statistics(row, counted, binning, scratch);
  if (!(statistics.raw.sum > 0) || !(statistics.maximum > -CUDART_INF_F)) {
    if (writes) write_no_token(a.call, index);
    return;
  }
  if (threadIdx.x == 0) scratch.row_raw = statistics.raw;
  const ClusterScratch search{scratch.search, *cluster.in_block(&scratch.search, 0)};
  if (rule.greedy()) {
    take_maximum(row, statistics.maximum, search);
  } else {
    filter_and_draw(row, rule, counted, binning, {statistics.maximum, scale}, search);
  }
  if (writes) write_token(a.call, index, row, scratch.row_raw, scratch.search);
  if (cluster.size > 1) cluster.synchronize();  // until then the leader reads what other blocks stage
}

}  // namespace distillm
