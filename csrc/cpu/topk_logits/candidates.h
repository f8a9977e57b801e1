// Gathered entries of a row: the cut to the k largest and the final sort. Nothing branches on the data, which would
// cost more than the arithmetic at these sizes.
#pragma once

#include <cstring>

#include "../row/row_selection.h"

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

// Cuts the candidates to the k largest, lower ids first among equals, in their order; returns the k-th largest. The
// values of the others go to `dropped`, which may not overlap.
template <class Real>
Real keep_largest(Candidates<Real>& candidates, int64_t k, Real* dropped, SelectionScratch<Real> scratch) {
  const Threshold<Real> kth =
      find_threshold(candidates.values, candidates.size, CountMeasure{}, static_cast<uint64_t>(k), scratch);
  int64_t kept = 0, left = 0;
  for (int64_t i = 0; i < candidates.size; ++i) {
    const Real value = candidates.values[i];
    const bool keep = kth.selects(value, i);
    candidates.values[kept] = value;
    candidates.ids[kept] = candidates.ids[i];
    dropped[left] = value;
    kept += keep;
    left += !keep;
  }
  candidates.size = kept;
  return kth.value;
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
