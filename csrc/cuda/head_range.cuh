// adaptive_kl: where the boundary of the teacher's head lies, as a range of log-probabilities with few entries in it.
//
// A first guess comes from the largest logit of every thread, of whose probabilities there is a histogram. Those from
// some log2 p on hold more than mu, all the more do all entries from there on: these contain the head. Where the
// threads of which the largest entry lies there are few, so are the entries, and the range has no upper end.
//
// Otherwise the row is flat, and counted: how many entries fall into each of kBins steps of log2 p between the largest
// and the least that an entry at the boundary can have. The probability at the middle of a step and the count are its
// mass, near enough to choose the step that the boundary falls into, sometimes two. Counts alone: an entry costs a
// multiply-add and an atomic operation on shared memory, and no exponential.
//
// Whatever the range, its entries are listed and summed up exactly, and a boundary that is not among them is found out
// (adaptive_terms.cuh).
#pragma once

#include "head_entries.cuh"

namespace distillm {

// The largest of the teacher's logits that a thread sees.
template <class Stored>
struct LargestSeen {
  static constexpr uint32_t kMissing = Packing<Stored>::kMinusInfinity;
  uint32_t word = sizeof(Stored) == 4 ? kMissing : kMissing << 16 | kMissing;

  template <int N>
  __device__ void add(const Chunk<Stored, N>& teacher) {
#pragma unroll
    for (int w = 0; w < Chunk<Stored, N>::kWords; ++w) word = Packing<Stored>::larger(word, teacher.word[w]);
  }
  __device__ float logit() const {
    float z[4 / sizeof(Stored)];
    Packing<Stored>::unpack(word, z);
    return fmaxf(z[0], z[4 / sizeof(Stored) - 1]);
  }
};

template <class Rows>
struct HeadRangeSearch {
  static constexpr int kSteps = 8;          // of the first histogram, per factor of two in p
  static constexpr float kUnit = 1 << 28;   // its masses': the mass of a row fits
  static constexpr float kMargin = 1.001f;  // for rounding, to the safe side
  static constexpr float kSlack = 0.01f;    // the same for log2 p
  static constexpr int kFewListed = kListed * 3 / 4;
  static constexpr int kOfLane = kDigits / kWarp;
  static constexpr float kShifter = 1 << 23;
  static constexpr uint32_t kShifterBits = 0x4b000000u;

  const Rows& rows;
  const Softmax& p;
  float mu;
  HeadScratch& scratch;

  // By every thread of the cluster, which find the same; `largest`: the logit that this one has seen.
  __device__ HeadRange range(float largest) const {
    add_largest(largest);
    if (threadIdx.x < kWarp) scratch.range = guess();
    __syncthreads();
    const HeadRange wide = scratch.range;
    if (!wide.flat()) return wide;
    rows.cluster.synchronize();  // the others have read this block's histogram, whose place the counts take
    count_entries(wide);
    if (threadIdx.x < kWarp) scratch.range = narrowed(wide);
    __syncthreads();
    return scratch.range;
  }

  __device__ static void clear(unsigned* words, int count) {
#pragma unroll 1
    for (int i = 4 * threadIdx.x; i < count; i += 4 * blockDim.x) {
      *reinterpret_cast<uint4*>(words + i) = make_uint4(0, 0, 0, 0);
    }
  }

  __device__ void add_largest(float largest) const {
    unsigned* const words = &scratch.largest.masses[0];
    clear(words, 2 * kDigits);
    if (threadIdx.x == 0) scratch.listed = 0;
    __syncthreads();
    const float log2_p = p.log2_probability(largest);
    const int step = min(max(static_cast<int>(-kSteps * log2_p), 0), kDigits - 1);
    atomicAdd(&scratch.largest.masses[step], static_cast<unsigned>(exp2_fast(log2_p) * kUnit));
    atomicAdd(&scratch.largest.counts[step], 1u);
    rows.cluster.synchronize();
  }

  // By one warp, like all that follows but count_entries.
  __device__ HeadRange guess() const {
    const int lane = threadIdx.x;
    unsigned mass[kOfLane] = {}, count[kOfLane] = {};
    for (int block = 0; block < rows.cluster.size; ++block) {
      const LargestHistogram* const of_block = rows.cluster.in_block(&scratch.largest, block);
#pragma unroll
      for (int i = 0; i < kOfLane; i += 4) {
        add_four(of_block->masses + lane * kOfLane + i, mass + i);
        add_four(of_block->counts + lane * kOfLane + i, count + i);
      }
    }
    // The first step that holds anything, and the one at which the mass from there on passes mu.
    unsigned own = 0;
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) own += mass[i];
    unsigned through = static_cast<unsigned>(warp_inclusive(own));
    const float target = mu * kMargin * kUnit;
    int first = kDigits, last = kDigits;
#pragma unroll
    for (int i = kOfLane - 1; i >= 0; --i) {
      if (count[i] > 0) first = lane * kOfLane + i;
      if (static_cast<float>(through) > target) last = lane * kOfLane + i;
      through -= mass[i];
    }
    first = __reduce_min_sync(kAllLanes, first);
    last = __reduce_min_sync(kAllLanes, last);
    unsigned threads = 0;
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) threads += lane * kOfLane + i <= last ? count[i] : 0;
    threads = __reduce_add_sync(kAllLanes, threads);
    return last < kDigits - 1 && few_entries(threads) ? HeadRange{-(last + 1.0f) / kSteps - kSlack, CUDART_INF_F}
                                                      : widest(first);
  }
  // If a share x of the threads have such an entry, threads have -log(1 - x) of them on average.
  __device__ bool few_entries(unsigned threads) const {
    const float most = 1 - exp2_fast(-static_cast<float>(kLog2E) * kFewListed / static_cast<float>(blockDim.x));
    return static_cast<float>(threads) <= most * static_cast<float>(rows.cluster.threads());
  }
  // The entry at the boundary and all lighter ones hold more than the rest, so it holds its share of that at least.
  __device__ HeadRange widest(int first_step) const {
    if (!(mu < 1)) return HeadRange::nothing();
    const int vocab = max(rows.student.vocab, rows.teacher.vocab);
    return {log2f((1 - mu) / static_cast<float>(vocab)) - kSlack, -static_cast<float>(first_step) / kSteps + kSlack};
  }

  // --- flat rows

  __device__ static float step_of(HeadRange wide) { return (wide.upper - wide.lower) / (kBins - 1); }

  // Bin b: the log2 p nearest to upper - b * step; what lies beyond the range falls into the bins at its ends.
  __device__ void count_entries(HeadRange wide) const {
    constexpr int N = Rows::N;
    clear(scratch.bins, kBins);
    __syncthreads();
    const float per_width = 1 / (wide.upper - wide.lower), slope = -p.scale * per_width;
    const float at_zero = fmaf(p.reference, p.scale, p.rest + wide.upper) * per_width;
    rows.visit(rows.teacher.vocab, [&](Place place) {
      float teacher_logits[N];
      rows.teacher_logits(place, teacher_logits);
#pragma unroll
      for (int i = 0; i < N; ++i) count_one(saturating_fma(teacher_logits[i], slope, at_zero));
    });
    rows.cluster.synchronize();
  }
  __device__ static float saturating_fma(float x, float y, float z) {
    float result;
    asm("fma.rn.sat.f32 %0, %1, %2, %3;" : "=f"(result) : "f"(x), "f"(y), "f"(z));
    return result;
  }
  // position: of the range, 0 at its upper end, 1 at its lower. 2^23 added to a number leaves its rounded value in the
  // low bits of the sum, which count words from a place so far before the bins.
  __device__ void count_one(float position) const {
    const uint32_t origin = static_cast<uint32_t>(__cvta_generic_to_shared(scratch.bins)) - 4 * kShifterBits;
    asm volatile("{.reg .u32 word; mad.lo.u32 word, %0, 4, %1; red.shared.add.u32 [word], 1;}" ::"r"(
                     __float_as_uint(fmaf(position, kBins - 1, kShifter))),
                 "r"(origin)
                 : "memory");
  }

  // The bins at which the mass from the largest on may pass mu.
  __device__ HeadRange narrowed(HeadRange wide) const {
    const float step = step_of(wide);
    float mass[kBins / kWarp / 4], own = 0;  // of fours of bins
#pragma unroll
    for (int g = 0; g < kBins / kWarp / 4; ++g) {
      own += mass[g] = four_bins(wide, static_cast<int>(threadIdx.x) * (kBins / kWarp) + 4 * g).mass();
    }
    const float before = warp_before(own);
    // Within a step masses differ by half of this either way; the rounding of many entries evens out.
    const float uncertain = mu * 0.35f * step * 0.5f;
    const int first = bin_of(wide, mass, before, mu - uncertain);
    const int last = bin_of(wide, mass, before, mu + uncertain);
    const float rounding = fmaf(fabsf(p.reference), p.scale, 32.0f) * 0x1p-21f + step * 0.51f;
    return {wide.upper - last * step - rounding, wide.upper - first * step + rounding};
  }
  __device__ static void add_four(const unsigned* aligned, unsigned* sums) {
    const uint4 more = *reinterpret_cast<const uint4*>(aligned);
    sums[0] += more.x, sums[1] += more.y, sums[2] += more.z, sums[3] += more.w;
  }
  // Of four bins from `bin` on, by the mass of an entry in the first.
  struct Four {
    float of_first, ratio, count[4];
    __device__ float mass() const {
      return of_first * fmaf(ratio, fmaf(ratio, fmaf(ratio, count[3], count[2]), count[1]), count[0]);
    }
  };
  __device__ Four four_bins(HeadRange wide, int bin) const {
    unsigned count[4] = {};
#pragma unroll 4
    for (int block = 0; block < rows.cluster.size; ++block) {
      add_four(rows.cluster.in_block(&scratch.bins[0], block) + bin, count);
    }
    const float step = step_of(wide);
    return {
        exp2_fast(wide.upper - bin * step),
        exp2_fast(-step),
        {__uint2float_rn(count[0]), __uint2float_rn(count[1]), __uint2float_rn(count[2]), __uint2float_rn(count[3])}};
  }
  // The sum over the lanes before this one.
  __device__ static float warp_before(float own) {
    float through = own;
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const float lower = __shfl_up_sync(kAllLanes, through, step);
      if (threadIdx.x % kWarp >= step) through += lower;
    }
    const float before = __shfl_up_sync(kAllLanes, through, 1);
    return threadIdx.x % kWarp == 0 ? 0.0f : before;
  }
  // The bin at which the mass passes `target`. Every lane has the masses of its bins by fours.
  template <int kGroups>
  __device__ int bin_of(HeadRange wide, const float (&mass)[kGroups], float before, float target) const {
    float through = before, passed = before;
    int group = 0;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      through += mass[g];
      if (through <= target && g + 1 < kGroups) passed = through, group = g + 1;
    }
    const unsigned past = __ballot_sync(kAllLanes, through > target);
    const int lane = past == 0 ? kWarp - 1 : __ffs(past) - 1;
    int bin = (static_cast<int>(threadIdx.x) * kGroups + group) * 4;
    if (static_cast<int>(threadIdx.x) == lane) {
      const Four four = four_bins(wide, bin);
      float of_each = four.of_first;
#pragma unroll
      for (int i = 0; i < 3; ++i) {
        passed = fmaf(of_each, four.count[i], passed);
        bin += passed <= target ? 1 : 0;
        of_each *= four.ratio;
      }
    }
    return __shfl_sync(kAllLanes, bin, lane);
  }
};

}  // namespace distillm
