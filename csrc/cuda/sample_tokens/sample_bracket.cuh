// The thresholds of top-k and top-p in two passes over the row: pass 1 counts the logits in bins, which brackets the
// thresholds; pass 2 lists what lies in the brackets and sums what lies above them, exactly.
//
// Bins are 1/128 of a factor 2 in weight wide, so that counts tell masses to 0.3 %, and lie around a reference, the
// maximum of a part of the row: 20 octaves above it and 44 below. Where that part spans little, bins are as much
// narrower. A bracket is a guess: pass 2 proves it. What it holds may be more than the list if it is all equal
// (sample_ties.cuh); else, and where it missed, the search over the row (sample_filter.cuh) takes over. The token is
// the same.
#pragma once

#include "sample_ties.cuh"

namespace distillm {

constexpr float kBinsPerOctave = 128.0f;
constexpr int kReferenceBin = 44 * 128;

struct Binning {
  float reference;  // finite
  float scale;      // octaves of weight per logit
  float per_octave;

  // `range`: of the logits in that part, which are to take half of the bins below the reference.
  __device__ static Binning of(float reference, float scale, float range) {
    const float fitting = kReferenceBin / 2 / (range * scale);
    return {reference, scale, fminf(fmaxf(fitting, kBinsPerOctave), 1e9f)};
  }

  // Never falls where z rises.
  __device__ int bin(float z) const {
    const float at = (z - reference) * scale * per_octave + kReferenceBin;
    return static_cast<int>(fminf(fmaxf(at, 0.0f), kBins - 1.0f));
  }
  // The key at a position among the bins; all keys where the first or last bin, which have no end, is cut.
  __device__ uint32_t key(float position) const {
    if (position < 1) return 0u;
    if (position >= kBins - 1) return ~0u;
    return ordered_key(reference + (position - kReferenceBin) / per_octave / scale);
  }
};

// The counts of pass 1 read as masses, in units of 2^-40 of the maximum's.
struct BinMasses {
  const uint32_t* count;
  int top;  // bin of the maximum
  float per_octave;

  __device__ unsigned long long operator[](int bin) const {
    const float octaves = (static_cast<float>(bin - top) + 0.5f) / per_octave;
    return static_cast<unsigned long long>(static_cast<float>(count[bin]) * exp2_fast(octaves) * 0x1p40f);
  }
};

// A quarter of a bin covers the rounding of its ends.
__device__ __forceinline__ Bracket bracket_of(const Binning& binning, int low, int high) {
  return {binning.key(static_cast<float>(low) - 0.25f), binning.key(static_cast<float>(high) + 1.25f)};
}

// The bin that holds the top_k-th largest of what was counted, and how many lie above it; -1 where fewer were counted.
__device__ __forceinline__ Digit bin_of_count(SearchScratch& scratch, int64_t top_k) {
  const uint32_t* counts = scratch.bins();
  sum_segments<kBins>(counts, scratch);
  __syncthreads();
  return find_digit<kBins>(counts, scratch, static_cast<unsigned long long>(top_k) - 1);
}

// The mass of all bins, or of those above the last and a share of the last: what top-k leaves.
__device__ __forceinline__ float mass_from(const BinMasses& masses, int last, float share) {
  unsigned long long above = 0;
  for (int bin = last + 1 + threadIdx.x % kWarp; bin < kBins; bin += kWarp) above += masses[bin];
  return static_cast<float>(warp_total(above)) + share * static_cast<float>(masses[last]);
}

// Where the mass from the top reaches p of the whole. Masses A above and B below a point that are wrong by a part e
// each, either way, move it by 2 e p (1 - p) of the whole: half a bin, e = 0.35 / bins per octave, and room for
// rounding. Where that much holds more than the list the errors of many counts cancel and a 16th of the room does.
__device__ __forceinline__ Bracket bracket_of_mass(SearchScratch& scratch, const Binning& binning,
                                                   const BinMasses& masses, float whole, float p) {
  int low = 0, high = 0;
#pragma unroll 1
  for (float slack = (1.0f / binning.per_octave + 1e-5f) * p * (1 - p) + 2e-7f, step = 0; step < 2;
       ++step, slack /= 16) {
    high = max(find_digit<kBins>(masses, scratch, static_cast<unsigned long long>((p - slack) * whole)).digit, 0);
    low = max(find_digit<kBins>(masses, scratch, static_cast<unsigned long long>((p + slack) * whole)).digit, 0);
    unsigned long long inside = 0;
    for (int bin = low + threadIdx.x % kWarp; bin <= high; bin += kWarp) inside += masses.count[bin];
    if (warp_total(inside) <= kListed / 2) break;
  }
  return bracket_of(binning, low, high);
}

// Pass 2: what lies in the brackets into the list, and the masses above that of top-p, after min-p, into the sums of
// tiles. Into the scratch, where they begin at 0: the mass above the bracket of top-p, and mass and count above that of
// top-k. The former is not the lower one.
template <class T>
__device__ void bracket_pass(const SampleRow<T>& row, SearchScratch& lead, Tempering tempering, float min_p,
                             Bracket by_count, Bracket by_mass) {
  constexpr int N = SampleRow<T>::N;
  unsigned long long sum = 0, above = 0, within = 0;
  int count = 0;
  const auto visit = [&](int first, float (&z)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (!(z[i] > -CUDART_INF_F)) continue;
      const uint32_t key = ordered_key(z[i]);
      const float weight = tempering.weight(z[i]);
      const unsigned long long mass = mass_of(weight);
      count += key > by_count.high;
      within += key > by_count.high ? mass : 0;
      above += key > by_mass.high ? mass : 0;
      sum += key > by_mass.high && weight >= min_p ? mass : 0;
      if (by_mass.holds(key) || by_count.holds(key)) append(lead, key, first + i, row.tile_of(first + i));
    }
  };
  row.visit(visit, [&](int tile) {
    sum = warp_total(sum);
    if (threadIdx.x % kWarp == 0) lead.sums[tile] = sum;
    sum = 0;
  });
  above = warp_total(above);
  within = warp_total(within);
  count = static_cast<int>(warp_total(count));
  if (threadIdx.x % kWarp == 0) {
    atomicAdd(&lead.above, above);
    atomicAdd(&lead.within, within);
    atomicAdd(&lead.count, count);
  }
  row.cluster.synchronize();
}

// The leader's share of top-k after pass 2: its threshold in the list, which then weighs nothing below, and the mass
// that is left. False where the bracket does not hold the threshold.
__device__ __forceinline__ bool resolve_count(SearchScratch& scratch, int64_t top_k, Kept& kept) {
  const Bracket bracket = scratch.by_count;
  const Kept found = complete_in_list(scratch, false, scratch.count, static_cast<unsigned long long>(top_k), bracket);
  if (scratch.answer >= 0) {
    kept = found;
  } else if (bracket.low > 0) {
    return false;
  }  // else the row has fewer entries than top_k: all are kept
  __syncthreads();
  if (threadIdx.x == 0) scratch.answer = -1;
  for (int i = threadIdx.x; i < scratch.listed; i += blockDim.x) {
    if (!bracket.holds(scratch.key[i])) continue;
    if (kept(scratch.key[i], scratch.id[i])) {
      atomicAdd(&scratch.within, scratch.mass[i]);
    } else {
      scratch.mass[i] = 0;
    }
  }
  __syncthreads();
  return true;
}

// The leader's share after pass 2: the thresholds in the list, and its masses, after min-p, into the sums of tiles.
// False where a bracket does not hold its threshold.
template <class T>
__device__ bool resolve_brackets(const SampleRow<T>& row, const SamplingRule& rule, bool limits_count,
                                 Tempering tempering, SearchScratch& scratch) {
  if (scratch.listed > kListed) return resolve_ties(row, rule, limits_count, tempering, scratch);
  weigh_list(scratch, tempering);
  Kept kept{0u, INT32_MAX};
  if (limits_count && !resolve_count(scratch, rule.top_k, kept)) return false;
  if (rule.top_p < 1) {
    const unsigned long long target = nucleus_mass(rule.top_p, scratch.within);
    kept = complete_in_list(scratch, true, scratch.above, target, scratch.by_mass);
    if (scratch.answer < 0) return false;
  }
  for (int i = threadIdx.x; i < scratch.listed; i += blockDim.x) {
    const bool heavy = static_cast<float>(scratch.mass[i]) * static_cast<float>(1 / kMassUnits) >= rule.min_p;
    if (heavy && kept(scratch.key[i], scratch.id[i])) {
      atomicAdd(scratch.sums + row.tile_of(scratch.id[i]), scratch.mass[i]);
    }
  }
  if (threadIdx.x == 0) scratch.kept = kept;
  return true;
}

}  // namespace distillm
