// adaptive_kl: which entries of a row are the teacher's head.
//
// The head is a prefix of the entries in descending order of the teacher's logit, equal ones by ascending id. No sort:
// the entry at which the mass passes mu is found by a radix selection over ordered keys, kDigitBits at a time, from
// histograms of the mass in fixed point, and among entries of equal logit by the same selection over ids. Integers make
// the sums independent of the order of the threads. Each round looks once at all entries that may lie at the boundary:
// two rounds for bfloat16, four for float, and up to three over ids where equal logits lie on both sides of it.
#pragma once

#include "../math/ordered_key.h"
#include "../math/row_divergence.h"
#include "divergence_row.cuh"

namespace distillm {

using Mass = unsigned long long;

constexpr int kDigitBits = 8;
constexpr int kDigits = 1 << kDigitBits;
constexpr float kMassOfOne = 1125899906842624.0f;  // 2^50: the mass of a row fits, and that of 2^13 more

// Head: larger logits, and of those equal to it the ids up to `last_id`.
struct HeadBoundary {
  float logit;
  int last_id;

  __device__ static HeadBoundary everything() { return {-CUDART_INF_F, INT32_MAX}; }
  __device__ bool holds(float z, int id) const { return z > logit || (z == logit && id <= last_id); }
};

__device__ __forceinline__ Mass fixed(float mass) { return __float2ull_rn(mass * kMassOfOne); }

// Where a running sum over the digits of a histogram passes a target.
struct Crossing {
  int digit;  // kDigits: nowhere
  Mass before, at;
};

// Entries: where they come from (head_entries.cuh). It has
//   kLowestBit            the bits of a float below this one are 0 in every logit
//   mass_of(z)            the teacher's probability
//   vocab()
//   each(use)             use(id, logit) for this thread's entries
//   accumulate(count)     fills the histogram: count(add) calls add(digit, amount); every thread may read it after
//   sum_at(digit)         of the histogram
//   weigh_rest(add)       adds the mass of the entries that each() leaves out
//   whole(), before()     the mass of the row, and of entries that each() leaves out and that come before all others
template <class Entries>
struct HeadSearch {
  static constexpr int kLowestBit = Entries::kLowestBit;
  const Entries& entries;

  // The logit of a selected key, whose bits below kLowestBit are 0.
  __device__ static float logit_of(uint32_t key) {
    return __uint_as_float(__float_as_uint(number_of_key(key)) & ~((1u << kLowestBit) - 1));
  }

  // The first digit at which the sum from digit 0 on exceeds `target`. Every warp finds it for itself.
  __device__ Crossing crossing(Mass target) const {
    constexpr int kOfLane = kDigits / kWarp;
    const int lane = threadIdx.x % kWarp;
    Mass own = 0;
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) own += entries.sum_at(lane * kOfLane + i);
    const Mass through = warp_inclusive(own);
    const unsigned past = __ballot_sync(kAllLanes, through > target);
    if (past == 0) return {kDigits, 0, 0};
    const int first = __ffs(past) - 1;
    Mass before = __shfl_sync(kAllLanes, through - own, first);
    int digit = first * kOfLane;
    while (before + entries.sum_at(digit) <= target) before += entries.sum_at(digit++);
    return {digit, before, entries.sum_at(digit)};
  }

  // The histogram of the highest digits, the largest first, and the mass of the whole row, which rounded probabilities
  // do not add up to one in. Entries lighter than `lightest` are not at the boundary, nor is any after them.
  __device__ void count_highest_digits(float lightest) const {
    entries.accumulate([&](auto add) {
      Mass whole = 0;
      entries.each([&](int, float z) {
        const float mass = entries.mass_of(z);
        whole += fixed(mass);
        if (mass >= lightest) add(kDigits - 1 - (ordered_key(z) >> (32 - kDigitBits)), fixed(mass));
      });
      add(kDigits, whole);
      entries.weigh_rest(add);
    });
  }

  // Extends a key whose bits from `shift` on are known down to `next`.
  __device__ void count_digits(uint32_t key, int shift, int next) const {
    const uint32_t mask = (1u << (shift - next)) - 1;
    entries.accumulate([&](auto add) {
      entries.each([&](int, float z) {
        const uint32_t k = ordered_key(z);
        if ((k ^ key) >> shift == 0) add(mask - (k >> next & mask), fixed(entries.mass_of(z)));
      });
    });
  }

  // The id of the entry number `rank`, from 0 on, of those with this logit.
  __device__ int id_of_rank(float logit, Mass rank) const {
    const int id_bits = 32 - __clz(entries.vocab() - 1 | 1);
    int id = 0;
    for (int shift = (id_bits + kDigitBits - 1) / kDigitBits * kDigitBits; shift > 0; shift -= kDigitBits) {
      entries.accumulate([&](auto add) {
        entries.each([&](int v, float z) {
          if (z == logit && v >> shift == id >> shift) add(v >> (shift - kDigitBits) & (kDigits - 1), 1);
        });
      });
      const Crossing found = crossing(rank);
      id |= found.digit << (shift - kDigitBits);
      rank -= found.before;
    }
    return id;
  }

  // mu < 1. everything() also where the boundary is not among these entries.
  __device__ HeadBoundary boundary(float mu) const {
    // The entry at the boundary and all lighter ones hold more than the rest, so it holds its share of that at least.
    count_highest_digits((1 - mu) / static_cast<float>(entries.vocab()) * 0.999f);
    const Mass target = static_cast<Mass>(static_cast<double>(mu) * static_cast<double>(entries.whole()));
    const Mass passed = entries.before();
    if (target < passed) return HeadBoundary::everything();
    Mass left = target - passed;
    Crossing found = crossing(left);
    if (found.digit == kDigits) return HeadBoundary::everything();
    bool top = passed == 0 && found.before == 0;
    left -= found.before;
    int shift = 32 - kDigitBits;
    uint32_t key = static_cast<uint32_t>(kDigits - 1 - found.digit) << shift;
    while (shift > kLowestBit) {
      const int next = max(shift - kDigitBits, kLowestBit);
      count_digits(key, shift, next);
      found = crossing(left);
      top = top && found.before == 0;
      left -= found.before;
      key |= ((1u << (shift - next)) - 1 - found.digit) << next;
      shift = next;
    }
    const float logit = logit_of(key);
    const Mass of_each = max(fixed(entries.mass_of(logit)), Mass{1});
    const Mass inside = max(left / of_each, Mass{top});  // the top entry belongs to the head whatever its mass
    if (inside == 0) return {logit, -1};
    return {logit, inside * of_each >= found.at ? INT32_MAX : id_of_rank(logit, inside - 1)};
  }
};

}  // namespace distillm
