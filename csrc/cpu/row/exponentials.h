// Pass 1 of row kernels: softmax statistics and exponentials of one row of logits, tile by tile.
#pragma once

#include <cmath>
#include <cstring>

#include "tiles.h"

namespace distillm {
inline namespace DISTILLM_ISA {

// Maps a logit to its base-2 log-probability. The maximum is subtracted before scaling, which keeps all digits of large
// logits.
template <class Real>
struct Softmax {
  Real maximum;
  Real scale;     // log2(e) / T
  Real log2_sum;  // NaN for a row that is all -inf or holds a NaN or +inf

  bool usable() const { return log2_sum == log2_sum; }

  DISTILLM_HD Real log2_probability(Real z) const { return (z - maximum) * scale - log2_sum; }
};

template <class Real>
Real tile_maximum(const Real* z, int64_t count) {
  Real maximum = -std::numeric_limits<Real>::infinity();
#pragma omp simd reduction(max : maximum)
  for (int64_t i = 0; i < count; ++i) maximum = z[i] > maximum ? z[i] : maximum;
  return maximum;
}

template <class Real>
Real tile_exp_sum(const Real* z, int64_t count, Real reference, Real scale) {
  Real sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += exp2_fast((z[i] - reference) * scale);
  return sum;
}

// Where pass 1 leaves a side: exp2((z - reference of the tile) * scale), and per tile the reference, later the factor
// that makes probabilities of the exponentials.
template <class Real>
struct Exponentials {
  Real* values;
  Real* tile_factor;
};

// sum of e = 2^x over a tile, sum of e x, which the entropy is made of, and the largest logit.
template <class Real>
struct ExponentialSums {
  Real e, ex, top;
};

// kWeighted: whether the sum of e x is wanted. There x is kept finite: an entry whose exponential is 0 adds 0.
template <bool kWeighted, class Real>
ExponentialSums<Real> tile_exponentials(const Real* z, int64_t count, Real reference, Real scale, Real* out) {
  constexpr Real kLowest = std::numeric_limits<Real>::min_exponent - 2;
  Real sum = 0, weighted = 0, top = -std::numeric_limits<Real>::infinity();
#pragma omp simd reduction(+ : sum, weighted) reduction(max : top)
  for (int64_t i = 0; i < count; ++i) {
    const Real x = (z[i] - reference) * scale, e = exp2_fast(x);
    out[i] = e;
    top = z[i] > top ? z[i] : top;
    sum += e;
    if constexpr (kWeighted) weighted += e * at_least(x, kLowest);
  }
  return {sum, weighted, top};
}

// The online part: largest logit, sum of exponentials and of exponentials times exponents so far.
template <class Real>
struct OnlineSum {
  Real scale;
  Real maximum = -std::numeric_limits<Real>::infinity();
  Real reference = std::numeric_limits<Real>::lowest();  // finite: a masked tile adds 0, not NaN
  double sum = 0, weighted = 0;
  int64_t top_start = 0;  // of the tile with the first of the largest logits

  // Whatever was summed up so far refers to `reference` from here on.
  void raise(Real tile_max, int64_t start) {
    if (!(tile_max > maximum)) return;
    maximum = tile_max;
    top_start = start;
    const Real raised = at_least(tile_max, std::numeric_limits<Real>::lowest());
    const Real shift = (reference - raised) * scale;
    const double factor = exp2_fast(shift);
    // The product of a factor that is 0 must not meet an infinite shift.
    weighted = factor * (weighted + static_cast<double>(at_least(shift, Real(-1e4))) * sum);
    sum *= factor;
    reference = raised;
  }
  void add(ExponentialSums<Real> tile) {
    sum += static_cast<double>(tile.e);
    weighted += static_cast<double>(tile.ex);
  }
  // -sum p log p in nats.
  Real entropy() const {
    const Real nats = static_cast<Real>(kLn2 * (std::log2(sum) - weighted / sum));
    return nats > Real(0) ? nats : Real(0);
  }
  Softmax<Real> softmax() const {
    const bool usable = maximum > -std::numeric_limits<Real>::infinity() && sum == sum;
    return {reference, scale, usable ? static_cast<Real>(std::log2(sum)) : std::numeric_limits<Real>::quiet_NaN()};
  }
};

// Statistics alone.
template <class Real>
Softmax<Real> softmax_of(const LogitRow<Real>& row, Real scale) {
  alignas(64) Real buffer[kTile];
  OnlineSum<Real> online{scale};
  for (int64_t start = 0; start < row.vocab; start += kTile) {
    const int64_t count = row.vocab - start < kTile ? row.vocab - start : kTile;
    const Real* z = row.tile(start, count, buffer);
    online.raise(tile_maximum(z, count), start);
    online.add({tile_exp_sum(z, count, online.reference, scale), 0, 0});
  }
  return online.softmax();
}

template <class Real>
struct SideMetrics {
  Real entropy;  // nats
  int64_t top;   // first entry with the largest logit
};

// Index of the first entry of the tile at `start` that equals `value`, which is one of them.
template <class Real, class Row>
int64_t first_of_tile(const Row& row, int64_t start, int64_t vocab, Real value) {
  alignas(64) Real buffer[kTile];
  const int64_t count = vocab - start < kTile ? vocab - start : kTile;
  const Real* z = row.tile(start, count, buffer);
  int64_t i = 0;
  while (i + 1 < count && z[i] != value) ++i;
  return start + i;
}

// The exponentials of the next tile of a row. A reference that entries exceed by a little will do, and saves a look at
// the tile before the one that computes.
template <bool kWeighted, class Real>
ExponentialSums<Real> online_exponentials(const Real* z, int64_t count, int64_t start, OnlineSum<Real>& online,
                                          Real* out) {
  constexpr Real kHeadroom = 12;
  if (start > 0) {
    const auto sums = tile_exponentials<kWeighted>(z, count, online.reference, online.scale, out);
    if ((sums.top - online.reference) * online.scale < kHeadroom) return sums;
  }
  online.raise(tile_maximum(z, count), start);
  return tile_exponentials<kWeighted>(z, count, online.reference, online.scale, out);
}

// Pass 1 of one side, over `vocab` entries, which may be more than the side has. Row: LogitRow, or what has its tile().
// With `metrics`, entropy and top entry come along, of rows that are usable.
template <bool kMetrics, class Real, class Row>
Softmax<Real> exponentials_with(const Row& row, int64_t vocab, Real scale, Exponentials<Real> out,
                                SideMetrics<Real>* metrics) {
  alignas(64) Real buffer[kTile];
  OnlineSum<Real> online{scale};
  for (int64_t start = 0; start < vocab; start += kTile) {
    const int64_t count = vocab - start < kTile ? vocab - start : kTile;
    const Real* z = row.tile(start, count, buffer);
    const auto sums = online_exponentials<kMetrics>(z, count, start, online, out.values + start);
    online.add(sums);
    out.tile_factor[start / kTile] = online.reference;
    online.raise(sums.top, start);  // for the tiles to come
  }
  const Softmax<Real> softmax = online.softmax();
  const Real inverse_sum = static_cast<Real>(1 / online.sum);
  for (int64_t tile = 0; tile * kTile < vocab; ++tile) {
    out.tile_factor[tile] = exp2_fast((out.tile_factor[tile] - softmax.maximum) * scale) * inverse_sum;
  }
  if constexpr (kMetrics) {
    if (softmax.usable()) {
      *metrics = {online.entropy(), first_of_tile(row, online.top_start, vocab, softmax.maximum)};
    }
  }
  return softmax;
}

template <class Real, class Row>
Softmax<Real> exponentials_of(const Row& row, int64_t vocab, Real scale, Exponentials<Real> out,
                              SideMetrics<Real>* metrics = nullptr) {
  return metrics ? exponentials_with<true>(row, vocab, scale, out, metrics)
                 : exponentials_with<false>(row, vocab, scale, out, metrics);
}

}  // namespace DISTILLM_ISA
}  // namespace distillm
