// Writes the outputs of `topk_logits` for one row, from its kept entries and the sums of all others.
#pragma once

#include "candidates.h"
#include "exp_sums.h"

namespace distillm {
inline namespace DISTILLM_ISA {

// log(e^a + e^b)
inline double log_add(double a, double b) {
  const double high = a > b ? a : b, low = a > b ? b : a;
  return high + std::log1p(std::exp(low - high));
}

template <class Real>
class RowWriter {
 public:
  RowWriter(const TopkLogitsCall& call, const Slots& slots, int64_t row) : call_(call), slots_(slots), row_(row) {}

  // `kept` in any order that sorts ids upwards, `tail` over all other entries; `scratch` for SortedOrder.
  void write(const LogitRow<Real>& logits, const Candidates<Real>& kept, const ExpSums<Real>& tail_sums,
             void* scratch) const {
    const ExpSums<Real> sums = sums_of(kept);
    const double origin = sums.reference();
    const double tail_at_one = tail_sums.log_sum(0, origin);
    const double norm = log_add(sums.log_sum(0, origin), tail_at_one);  // log sum exp(z - origin)
    if (kept.size == 0 || !(std::abs(norm) < std::numeric_limits<double>::infinity())) return write_invalid();
    write_entries(kept, SortedOrder<Real>(kept, scratch), origin, norm);
    for (int t = 0; t < call_.temperature_count; ++t) {
      const int slot = slots_.of_temperature(t);
      const double tail = tail_sums.log_sum(slot, origin);
      const double norm_t = log_add(sums.log_sum(slot, origin), tail);
      set(call_.log_norm, row_ * call_.temperature_count + t, norm_t - norm * slots_.inverse_temperature(slot));
      set(call_.tail_logprob, row_ * call_.temperature_count + t, tail - norm_t);
    }
    if (call_.labels) set(call_.label_logprob, row_, label_logprob(logits, origin, norm));
    call_.valid[row_] = true;
  }

 private:
  static void set(void* values, int64_t index, double value) {
    static_cast<Real*>(values)[index] = static_cast<Real>(value);
  }
  void write_entries(const Candidates<Real>& kept, const SortedOrder<Real>& order, double origin, double norm) const {
    for (int64_t i = 0; i < kept.size; ++i) {
      const int64_t from = order.index(i), at = row_ * call_.k + i;
      call_.ids[at] = kept.ids[from];
      set(call_.logprobs, at, kept.values[from] - origin - norm);
      if (call_.counts) call_.counts[at] = kept.counts[from];
    }
    pad(kept.size);
  }
  void pad(int64_t from) const {
    const int64_t row = row_ * call_.k;
    for (int64_t i = from; i < call_.k; ++i) {
      call_.ids[row + i] = kPaddingId;
      set(call_.logprobs, row + i, -std::numeric_limits<double>::infinity());
      if (call_.counts) call_.counts[row + i] = 0;
    }
  }
  void write_invalid() const {
    constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
    pad(0);
    for (int t = 0; t < call_.temperature_count; ++t) {
      set(call_.log_norm, row_ * call_.temperature_count + t, kNaN);
      set(call_.tail_logprob, row_ * call_.temperature_count + t, kNaN);
    }
    if (call_.labels) set(call_.label_logprob, row_, kNaN);
    call_.valid[row_] = false;
  }
  ExpSums<Real> sums_of(const Candidates<Real>& kept) const {
    ExpSums<Real> sums(slots_);
    for (int64_t i = 0; i < kept.size; i += kTile) {
      sums.add(kept.values + i, kept.size - i < kTile ? kept.size - i : kTile);
    }
    return sums;
  }
  double label_logprob(const LogitRow<Real>& logits, double origin, double norm) const {
    const int64_t label = call_.labels[row_];
    if (label < 0 || label >= logits.vocab) return std::numeric_limits<double>::quiet_NaN();
    Real buffer[1];
    return *logits.tile(label, 1, buffer) - origin - norm;
  }

  const TopkLogitsCall& call_;
  const Slots& slots_;
  int64_t row_;
};

}  // namespace DISTILLM_ISA
}  // namespace distillm
