// adaptive_kl: which entries of a row are the teacher's head, by a radix selection over integer masses.
//
// Entries are ordered by descending logit, equal ones by ascending id. The head is all that comes before the first
// entry at which the running mass exceeds mu, and the very first entry in any case. That entry is found without a sort:
//
//   left = mu * (mass of the row)
//   for word in (~ordered_key(logit), id):         smaller words come first
//     prefix = nothing
//     for each digit of the word, 8 bits at a time, from the highest:
//       histogram[d] = mass of the entries whose word begins with `prefix` and then d, for all d
//       d = the first digit at which histogram[0] + ... + histogram[d] > left
//       left -= histogram[0] + ... + histogram[d - 1]
//       append d to `prefix`
//     from here on, count only entries with this word
//   head = the entries before that of these two words; and itself if nothing was taken off `left`
//
// Example: logits 2 1 2 0, probabilities .40 .15 .40 .05, mu = .5. The digits of the logit lead to 2, of which all
// entries weigh .80 > .5; nothing comes before them. Of the ids with that logit, 0 weighs .40 <= .5, which leaves .10,
// and 2 weighs .40 > .10: the entry is number 2, and the head is number 0.
//
// Masses are integers (math/sampling/token_mass.h): their sums, and so the head, do not depend on the numbers of
// threads and blocks, and equal logits have equal masses. Each digit is one visit to the row: two for the logits of a
// bfloat16, three of a half, four of a float, and three for the id of up to 2^24 entries where equal logits lie on both
// sides of the boundary.
//
//   held by    what
//   thread     prefix, left: the same in all threads of the cluster
//   block      own       histogram of its entries, in this round and, all 0, in the next
//              total     the sum of `own` over the blocks of the cluster
//   RowPair    the logits: in shared memory, as far as they fit; the others are read again in each round
#pragma once

#include <cmath>
#include <type_traits>

#include "../../../math/sampling/token_mass.h"
#include "../divergence_row.cuh"

namespace distillm {

using Mass = unsigned long long;

constexpr int kDigitBits = 8;
constexpr int kDigits = 1 << kDigitBits;

// Head: larger logits, and of those equal to it the ids up to `last_id`.
struct HeadBoundary {
  float logit;
  int last_id;

  __device__ static HeadBoundary everything() { return {-CUDART_INF_F, INT32_MAX}; }
  __device__ bool holds(float z, int id) const { return z > logit || (z == logit && id <= last_id); }
};

constexpr int kLight = kDigits;  // counts the entries that are too light to be at the boundary
using MassHistogram = Mass[kDigits + 1];

struct HeadScratch {
  MassHistogram own[2], total;
};

// Adds to a sum in shared memory by halves: the hardware adds 32 bits there at a time, where 64 bits are a loop of
// compare-and-swap. As many carries arrive in the upper half as the lower one overflows, in whichever order.
__device__ __forceinline__ void add_mass(Mass& sum, Mass mass) {
  unsigned* const halves = reinterpret_cast<unsigned*>(&sum);
  const unsigned low = static_cast<unsigned>(mass), before = atomicAdd(halves, low);
  const unsigned high = static_cast<unsigned>(mass >> 32) + (before + low < low ? 1 : 0);
  if (high > 0) atomicAdd(halves + 1, high);
}

// The logits from low to high: those of which the words have a prefix in common.
struct LogitRange {
  float low = -INFINITY, high = INFINITY;  // of the host compiler too, which knows no CUDART_INF_F

  // The first and the last such word. Words beyond those of infinities are of NaN, which fminf and fmaxf pass over.
  __device__ static LogitRange of(uint32_t first, uint32_t last) {
    return {fmaxf(number_of_key(~last), -CUDART_INF_F), fminf(number_of_key(~first), CUDART_INF_F)};
  }
  __device__ bool holds(float z) const { return (low <= z) & (z <= high); }
};

struct WordPrefix {
  uint32_t bits = 0, known = 0;

  __device__ bool begins(uint32_t word) const { return ((word ^ bits) & known) == 0; }
  __device__ void append(int digit, int shift) {
    bits |= static_cast<uint32_t>(digit) << shift;
    known |= static_cast<uint32_t>(kDigits - 1) << shift;
  }
};

// By every thread of the cluster, after the first visit and before anything replaces the logits.
template <class Rows>
struct HeadSearch {
  static constexpr int N = Rows::N;
  // The bits of a float below this one are 0 in every logit of the stored dtype.
  static constexpr int kLowestBit = std::is_same_v<typename Rows::Stored, BFloat16> ? 16
                                    : std::is_same_v<typename Rows::Stored, Half>   ? 13
                                                                                    : 0;
  const Rows& rows;
  const Softmax& p;
  float mu;
  HeadScratch& scratch;
  Mass lightest = 0;      // at the boundary
  Mass left = 0, at = 0;  // at: the mass that begins with all digits found
  bool top = true;        // nothing comes before it
  int round = 0;

  __device__ Mass mass(float z) const { return mass_of(exp2_fast(p.log2_probability(z))); }

  __device__ static void clear(MassHistogram& histogram) {
    for (int digit = threadIdx.x; digit <= kDigits; digit += blockDim.x) histogram[digit] = 0;
  }

  // Of entries with a logit of the range: by digits of the logit, or of the id where that has the prefix.
  template <bool kById>
  __device__ void weigh_own(WordPrefix prefix, LogitRange range, int shift, MassHistogram& own) const {
    Mass light = 0;
    rows.visit(rows.teacher.vocab, [&](Place place) {
      float z[N];
      rows.teacher_logits(place, z);
      bool any = false;
#pragma unroll
      for (int i = 0; i < N; ++i) any |= range.holds(z[i]);
      if (!any) return;  // most chunks, after the first rounds
      const int first = rows.first_entry(place.position);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const uint32_t word = kById ? static_cast<uint32_t>(first + i) : ~ordered_key(z[i]);
        if (!range.holds(z[i]) || (kById && !prefix.begins(word))) continue;
        const Mass of_entry = mass(z[i]);
        if (of_entry < lightest) {
          light += of_entry;
        } else {
          add_mass(own[word >> shift & (kDigits - 1)], of_entry);
        }
      }
    });
    light = warp_total(light);
    if (threadIdx.x % kWarp == 0) add_mass(own[kLight], light);
  }

  // Leaves the histogram of the whole row in `total`, and zeros for the next round.
  template <bool kById>
  __device__ void weigh(WordPrefix prefix, LogitRange range, int shift) {
    MassHistogram& own = scratch.own[round++ % 2];
    weigh_own<kById>(prefix, range, shift, own);
    rows.cluster.synchronize();
    for (int digit = threadIdx.x; digit <= kDigits; digit += blockDim.x) {
      Mass sum = 0;
      for (int block = 0; block < rows.cluster.size; ++block) sum += rows.cluster.in_block(own, block)[digit];
      scratch.total[digit] = sum;
    }
    clear(scratch.own[round % 2]);
    __syncthreads();
  }

  __device__ Mass mass_of_row() const {
    Mass sum = 0;
    for (int digit = threadIdx.x % kWarp; digit <= kDigits; digit += kWarp) sum += scratch.total[digit];
    return warp_total(sum);
  }

  // The digit of `total` at which the running sum exceeds `left`, kDigits where it never does. Every warp finds it.
  __device__ int cross() {
    constexpr int kOfLane = kDigits / kWarp;
    Mass sum = 0;
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) sum += scratch.total[threadIdx.x % kWarp * kOfLane + i];
    const Mass through = warp_inclusive(sum);
    const int lane = __ffs(__ballot_sync(kAllLanes, through > left)) - 1;
    if (lane < 0) return kDigits;
    Mass before = __shfl_sync(kAllLanes, through - sum, lane);
    int digit = lane * kOfLane;
    while (before + scratch.total[digit] <= left) before += scratch.total[digit++];
    top = top && before == 0;
    left -= before;
    at = scratch.total[digit];
    return digit;
  }

  // The logit at the boundary; -inf where none is found.
  __device__ float boundary_logit() {
    WordPrefix prefix;
    LogitRange range;
    // A digit overlaps the one before it where less than a digit is left; those bits are all alike by then.
#pragma unroll 1
    for (int shift = 32 - kDigitBits;; shift = max(shift - kDigitBits, kLowestBit)) {
      weigh<false>(prefix, range, shift);
      if (prefix.known == 0) left = static_cast<Mass>(static_cast<double>(mu) * static_cast<double>(mass_of_row()));
      const int digit = cross();
      if (digit == kDigits) return -CUDART_INF_F;
      prefix.append(digit, shift);
      range = LogitRange::of(prefix.bits, prefix.bits | ~prefix.known);
      if (shift == kLowestBit) return __uint_as_float(__float_as_uint(range.high) & ~0u << kLowestBit);
    }
  }

  // Of the entries with this logit, the one at the boundary.
  __device__ int boundary_id(float logit) {
    const int id_bits = 32 - __clz(rows.teacher.vocab - 1 | 1);
    WordPrefix prefix;
#pragma unroll 1
    for (int shift = max(id_bits - kDigitBits, 0);; shift = max(shift - kDigitBits, 0)) {
      weigh<true>(prefix, {logit, logit}, shift);
      prefix.append(cross(), shift);
      if (shift == 0) return static_cast<int>(prefix.bits);
    }
  }

  // mu: in [0, 1].
  __device__ HeadBoundary boundary() {
    if (mu == 1) return HeadBoundary::everything();
    // The entry at the boundary and all lighter ones hold more than 1 - mu, so it holds its share of that at least.
    lightest = mass_of((1 - mu) / static_cast<float>(rows.teacher.vocab) * 0.999f);
    clear(scratch.own[0]);
    __syncthreads();
    const float logit = boundary_logit();
    // Where logits are so large that masses have no digits left, nothing may be found.
    if (logit == -CUDART_INF_F) return HeadBoundary::everything();
    const Mass of_each = mass(logit);
    if (!top && left < of_each) return {logit, -1};
    if (at == of_each) return {logit, INT32_MAX};  // the only one, on top
    const int id = boundary_id(logit);
    return {logit, top ? id : id - 1};
  }
};

}  // namespace distillm
