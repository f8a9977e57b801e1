// Selection among candidates of one row by integer radix search: the largest logits, by count or by mass.
//
// A radix search takes three steps over the bits of the ordered key, and carries on with the candidates that share the
// digits found so far. Equal logits have equal weights, so that the last step is a division.
#pragma once

#include <cstdint>
#include <cstring>

#include "../math/sampling_rule.h"

namespace distillm {
inline namespace DISTILLM_ISA {

// Entries that may be drawn, by ascending id.
struct SampleCandidates {
  float* logit;
  int32_t* id;
  float* weight;
  uint32_t* order;  // scratch of selection
  int64_t count;
};

// Everything above `key`, and the first `ties` candidates at it.
struct Threshold {
  uint32_t key;
  int64_t ties;
};

struct CountOf {
  const SampleCandidates* from;
  uint64_t operator()(int64_t) const { return 1; }
};

struct MassOf {
  const SampleCandidates* from;
  uint64_t operator()(int64_t i) const { return mass_of(from->weight[i]); }
};

// One step of the search: candidates that share the digits above, and where the next digit lies.
struct RadixStep {
  int shift;
  uint32_t digits;  // a power of 2

  uint32_t digit(float z) const { return ordered_key(z) >> shift & (digits - 1); }
};

constexpr uint32_t kMostDigits = 2048;
constexpr RadixStep kRadixSteps[] = {{21, 2048}, {10, 2048}, {0, 1024}};

// Puts the candidates whose digit is the given one into `order`. They come from `order` too, from all in the first
// step.
inline int64_t narrow(const SampleCandidates& from, int64_t count, bool first, RadixStep step, uint32_t digit) {
  int64_t kept = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t candidate = first ? static_cast<uint32_t>(i) : from.order[i];
    from.order[kept] = candidate;
    kept += step.digit(from.logit[candidate]) == digit;
  }
  return kept;
}

// The smallest set of largest logits, lower ids first among equal ones, that measures `target` or more; the measure of
// all candidates is at least `target`, which is at least 1.
template <class Measure>
Threshold radix_threshold(const SampleCandidates& from, uint64_t target) {
  const Measure measure{&from};
  uint64_t sums[kMostDigits], above = 0;
  uint32_t key = 0;
  int64_t count = from.count;
  for (const RadixStep step : kRadixSteps) {
    const bool first = step.shift == kRadixSteps[0].shift;
    std::memset(sums, 0, sizeof(sums));
    for (int64_t i = 0; i < count; ++i) {
      const int64_t candidate = first ? i : from.order[i];
      sums[step.digit(from.logit[candidate])] += measure(candidate);
    }
    uint32_t digit = step.digits - 1;
    for (; digit > 0 && above + sums[digit] < target; --digit) above += sums[digit];
    key |= digit << step.shift;
    count = narrow(from, count, first, step, digit);
  }
  const uint64_t each = measure(from.order[0]);
  return {key, static_cast<int64_t>((target - above + each - 1) / each)};
}

// Keeps what the threshold keeps, in the order of ids.
inline void keep(SampleCandidates& from, Threshold threshold) {
  int64_t kept = 0;
  for (int64_t i = 0; i < from.count; ++i) {
    const uint32_t key = ordered_key(from.logit[i]);
    from.logit[kept] = from.logit[i];
    from.id[kept] = from.id[i];
    from.weight[kept] = from.weight[i];
    const bool tie = key == threshold.key && threshold.ties > 0;
    threshold.ties -= tie;
    kept += key > threshold.key || tie;
  }
  from.count = kept;
}

inline void keep_weight_from(SampleCandidates& from, float lowest) {
  int64_t kept = 0;
  for (int64_t i = 0; i < from.count; ++i) {
    from.logit[kept] = from.logit[i];
    from.id[kept] = from.id[i];
    from.weight[kept] = from.weight[i];
    kept += from.weight[i] >= lowest;
  }
  from.count = kept;
}

inline uint64_t total_mass(const SampleCandidates& from) {
  uint64_t total = 0;
  for (int64_t i = 0; i < from.count; ++i) total += mass_of(from.weight[i]);
  return total;
}

}  // namespace DISTILLM_ISA
}  // namespace distillm
