// Gathered entries of a row: selection of the k largest and the final sort. Both are integer bisection and radix
// passes: nothing branches on the data, which costs more than the arithmetic at these sizes.
#pragma once

#include <cstring>

#include "../math/ordered_key.h"

namespace distillm {
inline namespace DISTILLM_ISA {

// Entries in the order of their ids, none of them NaN. Structure of arrays, so that selection vectorises.
template <class Real>
struct Candidates {
  Real* values;
  int32_t* ids;
  int32_t* counts;  // how often each was drawn, null in top-k
  int64_t size;
};

template <class Real>
int64_t count_at_least(const Real* values, int64_t n, Real bound) {
  using Count = decltype(bit_cast<std::conditional_t<sizeof(Real) == 4, int32_t, int64_t>>(Real()));
  Count count = 0;
#pragma omp simd reduction(+ : count)
  for (int64_t i = 0; i < n; ++i) count += values[i] >= bound ? 1 : 0;
  return count;
}

// The k-th largest of n >= k >= 1 values, none of them NaN: the largest number that k values reach, bit by bit.
template <class Real>
Real kth_largest(const Real* values, int64_t n, int64_t k) {
  using Key = decltype(ordered_key(Real()));
  const Key lowest = ordered_key(-std::numeric_limits<Real>::infinity());  // below it are no numbers
  const auto number = [lowest](Key key) { return number_of_key(key > lowest ? key : lowest); };
  Key key = 0;
  for (Key bit = Key{1} << (8 * sizeof(Key) - 1); bit != 0; bit >>= 1) {
    if (count_at_least(values, n, number(key | bit)) >= k) key |= bit;
  }
  return number(key);
}

// Cuts the candidates to the k largest, lower ids first among equals, in their order; returns the k-th largest. The
// values of the others go to `dropped`, which may not overlap.
template <class Real>
Real keep_largest(Candidates<Real>& candidates, int64_t k, Real* dropped) {
  const Real kth = kth_largest(candidates.values, candidates.size, k);
  int64_t above = 0;
  for (int64_t i = 0; i < candidates.size; ++i) above += candidates.values[i] > kth;
  int64_t ties = k - above, kept = 0, left = 0;
  for (int64_t i = 0; i < candidates.size; ++i) {
    const Real value = candidates.values[i];
    const bool tie = (value == kth) & (ties > 0), keep = (value > kth) | tie;
    ties -= tie;
    candidates.values[kept] = value;
    candidates.ids[kept] = candidates.ids[i];
    dropped[left] = value;
    kept += keep;
    left += !keep;
  }
  candidates.size = kept;
  return kth;
}

// Keys and indices of candidates, sorted by radix passes of 8 bits, which keep the order of equals: value descending,
// ids ascending among equals, -0 equal to 0.
template <class Real>
class SortedOrder {
 public:
  using Key = decltype(ordered_key(Real()));
  struct Item {
    Key key;
    int32_t index;
  };
  static int64_t bytes(int64_t size) { return 2 * size * static_cast<int64_t>(sizeof(Item)); }

  SortedOrder(const Candidates<Real>& candidates, void* scratch) : items_(static_cast<Item*>(scratch)) {
    const int64_t n = candidates.size;
    Item* other = items_ + n;
    for (int64_t i = 0; i < n; ++i) items_[i] = {~ordered_key(candidates.values[i]), static_cast<int32_t>(i)};
    for (int shift = 0; shift < static_cast<int>(8 * sizeof(Key)); shift += 8) {
      radix_pass(items_, n, shift, other);
      Item* const sorted = other;
      other = items_;
      items_ = sorted;
    }
  }
  int32_t index(int64_t place) const { return items_[place].index; }

 private:
  static void radix_pass(const Item* in, int64_t n, int shift, Item* out) {
    int32_t ends[257] = {};
    for (int64_t i = 0; i < n; ++i) ++ends[1 + (in[i].key >> shift & 0xff)];
    for (int digit = 0; digit < 256; ++digit) ends[digit + 1] += ends[digit];
    for (int64_t i = 0; i < n; ++i) out[ends[in[i].key >> shift & 0xff]++] = in[i];
  }

  Item* items_;
};

}  // namespace DISTILLM_ISA
}  // namespace distillm
