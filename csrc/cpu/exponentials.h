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

template <class Real>
Real tile_exponentials(const Real* z, int64_t count, Real reference, Real scale, Real* out) {
  Real sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) {
    const Real e = exp2_fast((z[i] - reference) * scale);
    out[i] = e;
    sum += e;
  }
  return sum;
}

// The online part: largest logit and sum of exponentials so far.
template <class Real>
struct OnlineSum {
  Real scale;
  Real maximum = -std::numeric_limits<Real>::infinity();
  Real reference = std::numeric_limits<Real>::lowest();  // finite: a masked tile adds 0, not NaN
  double sum = 0;

  void raise(Real tile_max) {
    if (!(tile_max > maximum)) return;
    maximum = tile_max;
    const Real raised = at_least(tile_max, std::numeric_limits<Real>::lowest());
    sum *= exp2_fast((reference - raised) * scale);
    reference = raised;
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
    online.raise(tile_maximum(z, count));
    online.sum += tile_exp_sum(z, count, online.reference, scale);
  }
  return online.softmax();
}

// Pass 1 of one side, over `vocab` entries, which may be more than the side has. Row: LogitRow, or what has its tile().
template <class Real, class Row>
Softmax<Real> exponentials_of(const Row& row, int64_t vocab, Real scale, Exponentials<Real> out) {
  alignas(64) Real buffer[kTile];
  OnlineSum<Real> online{scale};
  for (int64_t start = 0; start < vocab; start += kTile) {
    const int64_t count = vocab - start < kTile ? vocab - start : kTile;
    const Real* z = row.tile(start, count, buffer);
    online.raise(tile_maximum(z, count));
    online.sum += tile_exponentials(z, count, online.reference, scale, out.values + start);
    out.tile_factor[start / kTile] = online.reference;
  }
  const Softmax<Real> softmax = online.softmax();
  const Real inverse_sum = static_cast<Real>(1 / online.sum);
  for (int64_t tile = 0; tile * kTile < vocab; ++tile) {
    out.tile_factor[tile] = exp2_fast((out.tile_factor[tile] - softmax.maximum) * scale) * inverse_sum;
  }
  return softmax;
}

}  // namespace DISTILLM_ISA
}  // namespace distillm
