// Sums of exponentials of logits at several temperatures at once, relative to one of the largest.
#pragma once

#include "../../ops/topk_logits.h"
#include "../row/exponentials.h"

namespace distillm {
inline namespace DISTILLM_ISA {

// The entries that a threshold leaves over: those not above it, NaN among them.
template <class Real>
Real tile_maximum_below(const Real* z, int64_t count, Real threshold) {
  constexpr Real kNone = -std::numeric_limits<Real>::infinity();
  Real maximum = kNone;
#pragma omp simd reduction(max : maximum)
  for (int64_t i = 0; i < count; ++i) {
    const Real left = z[i] > threshold ? kNone : z[i];
    maximum = left > maximum ? left : maximum;
  }
  return maximum;
}

template <class Real>
Real tile_exp_sum_below(const Real* z, int64_t count, Real threshold, Real reference, Real scale) {
  Real sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) {
    const Real e = exp2_fast((z[i] - reference) * scale);
    sum += z[i] > threshold ? Real(0) : e;
  }
  return sum;
}

// Slot 0 is T = 1; slot s > 0 the s-th of the call's temperatures.
struct Slots {
  const double* temperatures;
  int count;

  explicit Slots(const TopkLogitsCall& call)
      : temperatures(call.temperatures), count(1 + static_cast<int>(call.temperature_count)) {}
  double inverse_temperature(int slot) const { return slot == 0 ? 1.0 : 1 / temperatures[slot - 1]; }
  // The slot to read for a temperature of the call: T = 1 is summed once.
  int of_temperature(int index) const { return temperatures[index] == 1 ? 0 : index + 1; }
  bool needed(int slot) const { return slot == 0 || temperatures[slot - 1] != 1; }
};

template <class Real>
class ExpSums {
 public:
  explicit ExpSums(const Slots& slots) : slots_(slots), steepest_(0) {
    for (int slot = 0; slot < slots.count; ++slot) steepest_ = scale(slot) > steepest_ ? scale(slot) : steepest_;
  }

  // Entries of a tile that are not above `threshold`. A threshold a little above the reference bounds them well enough:
  // their sum, at most 2^10 2^kHeadroom, is far from overflow, and the look for the largest is saved.
  void add_below(const Real* z, int64_t count, Real threshold) {
    if (!((threshold - reference_) * steepest_ < kHeadroom)) raise(tile_maximum_below(z, count, threshold));
    for (int slot = 0; slot < slots_.count; ++slot) {
      if (slots_.needed(slot)) sums_[slot] += tile_exp_sum_below(z, count, threshold, reference_, scale(slot));
    }
  }
  void add(const Real* z, int64_t count) { add_below(z, count, std::numeric_limits<Real>::infinity()); }

  // About the largest entry; the lowest number where there was none.
  double reference() const { return reference_; }

  // log(sum of exp((z - origin) / T)); -inf where nothing was added, NaN with a NaN.
  double log_sum(int slot, double origin) const {
    return std::log(sums_[slot]) + (reference_ - origin) * slots_.inverse_temperature(slot);
  }

 private:
  Real scale(int slot) const { return static_cast<Real>(kLog2E * slots_.inverse_temperature(slot)); }
  void raise(Real maximum) {
    if (!(maximum > reference_)) return;
    for (int slot = 0; slot < slots_.count; ++slot) sums_[slot] *= exp2_fast((reference_ - maximum) * scale(slot));
    reference_ = maximum;
  }

  static constexpr Real kHeadroom = 40;
  Slots slots_;
  Real steepest_;                                         // the largest scale
  Real reference_ = std::numeric_limits<Real>::lowest();  // finite: masked entries add 0, not NaN
  double sums_[kMaxTemperatures + 1] = {};
};

}  // namespace DISTILLM_ISA
}  // namespace distillm
