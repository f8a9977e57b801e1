// The largest entries of a row by count or by mass: the one selection behind the k largest logits, top-k and top-p of
// token sampling, and the head of adaptive_kl.
//
// Entries are ordered by descending value, equal ones by ascending index. Every entry has a measure, an integer: 1, or
// its mass (math/sampling/token_mass.h). Selected is the shortest prefix of that order that measures `target` or more:
//
//   keys = ordered_key(values), above = 0
//   low, high = the smallest and the largest key
//   while low < high:
//     cut [low, high] into at most 256 buckets as wide as the same power of two
//     sum the measures of the entries of each bucket
//     from the highest bucket down, while above + its sum < target: above += its sum
//     keep the entries of the bucket where that ends; low, high = their smallest and largest key
//   all entries left are equal, of measure m: the first ceil((target - above) / m) of them belong to the prefix
//
// Worked row, with buckets two keys wide at first: keys 1 3 2 3 0, masses 2 8 4 8 1, target 12.
//   [0, 3]: buckets {0, 1} and {2, 3} measure 3 and 20; 20 reaches 12, left are the entries 1, 2 and 3
//   [2, 3]: buckets {2} and {3} measure 4 and 16; 16 reaches 12, left are the entries 1 and 3, both of key 3
//   ceil(12 / 8) = 2 of them: the threshold is the value of key 3 up to index 3
//
// Every step takes 8 bits off the width of the range, so that float takes at most 4 steps and double at most 8. Sums of
// integers do not depend on their order: neither does the result on the instruction set.
#pragma once

#include <cstdint>

#include "../../math/sampling/token_mass.h"

namespace distillm {
inline namespace DISTILLM_ISA {

// Where the selected prefix ends: all entries above `value`, and of those equal to it the ones up to index `last`.
template <class Real>
struct Threshold {
  Real value;
  int64_t last;

  bool selects(Real entry, int64_t index) const { return (entry > value) | ((entry == value) & (index <= last)); }
};

struct CountMeasure {
  uint64_t operator()(int64_t) const { return 1; }
};

// Equal values must have equal weights.
template <class Real>
struct MassMeasure {
  const Real* weights;
  uint64_t operator()(int64_t index) const { return mass_of(weights[index]); }
};

// The entries still searched: keys, and indices in ascending order. Room for all entries.
template <class Real>
struct SelectionScratch {
  using Key = decltype(ordered_key(Real()));
  Key* keys;
  int32_t* indices;
};

template <class Key>
struct KeyRange {
  Key low, high;

  static KeyRange of(const Key* keys, int64_t count) {
    Key low = ~Key{0}, high = 0;
#pragma omp simd reduction(min : low) reduction(max : high)
    for (int64_t i = 0; i < count; ++i) {
      low = keys[i] < low ? keys[i] : low;
      high = keys[i] > high ? keys[i] : high;
    }
    return {low, high};
  }
};

// A range of at least two keys, cut into buckets.
template <class Key>
struct Buckets {
  static constexpr int kBits = 8;
  Key low;
  int shift;

  explicit Buckets(KeyRange<Key> range) : low(range.low) {
    const int width = 64 - __builtin_clzll(range.high - range.low);
    shift = width > kBits ? width - kBits : 0;
  }
  int of(Key key) const { return static_cast<int>((key - low) >> shift); }
};

template <class Real, class Key>
int64_t keep_bucket(SelectionScratch<Real> left, int64_t count, Buckets<Key> buckets, int bucket) {
  int64_t kept = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Key key = left.keys[i];
    left.keys[kept] = key;
    left.indices[kept] = left.indices[i];
    kept += buckets.of(key) == bucket;
  }
  return kept;
}

// No value is NaN; all entries together measure at least `target`, which is at least 1.
template <class Real, class Measure>
Threshold<Real> find_threshold(const Real* values, int64_t count, Measure measure, uint64_t target,
                               SelectionScratch<Real> left) {
  using Key = typename SelectionScratch<Real>::Key;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    left.keys[i] = ordered_key(values[i]);
    left.indices[i] = static_cast<int32_t>(i);
  }
  uint64_t above = 0;
  KeyRange<Key> range = KeyRange<Key>::of(left.keys, count);
  while (range.low < range.high) {
    const Buckets<Key> buckets(range);
    uint64_t sums[1 << Buckets<Key>::kBits] = {};
    for (int64_t i = 0; i < count; ++i) sums[buckets.of(left.keys[i])] += measure(left.indices[i]);
    int bucket = buckets.of(range.high);
    while (above + sums[bucket] < target) above += sums[bucket--];
    count = keep_bucket(left, count, buckets, bucket);
    range = KeyRange<Key>::of(left.keys, count);
  }
  const uint64_t each = measure(left.indices[0]), wanted = (target - above + each - 1) / each;
  return {number_of_key(range.low), left.indices[wanted - 1]};
}

}  // namespace DISTILLM_ISA
}  // namespace distillm
