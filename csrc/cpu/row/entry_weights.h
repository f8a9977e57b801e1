// Weights of several entries at once (math/sampling/token_mass.h), with the same bits on every instruction set:
// products and sums stay apart here, whatever the file that includes this lets the compiler do elsewhere.
#pragma once

#include <cmath>
#include <limits>

#include "../../math/sampling/token_mass.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")
#endif

namespace distillm {
inline namespace DISTILLM_ISA {

// Entry z weighs 2^((z - maximum) * scale - lowered), and never more than 2^-lowered.
template <class Real>
struct Weighing {
  Real maximum;
  Real scale;    // log2(e) / T
  Real lowered;  // an integer: 0, but where the sum of a row's weights could reach 2^20
};

template <class Real>
void weigh(const Real* z, int64_t count, Weighing<Real> by, Real* weights) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) weights[i] = exp2_portable((z[i] - by.maximum) * by.scale - by.lowered);
}

// Up to this many weights, multiples of 2^-44 up to 1, have an exact sum in double.
constexpr int64_t kMassTile = 256;

template <class Real>
double tile_weight(const Real* z, int64_t count, Weighing<Real> by) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) {
    sum += static_cast<double>(exp2_portable((z[i] - by.maximum) * by.scale - by.lowered));
  }
  return sum;
}

// Entries with a lower logit weigh less than `weight`, as rounded to units of 2^-44 and summed: the margins are for
// that rounding, by half a unit, and for those of exponential and logarithm.
template <class Real>
Real logit_below(double weight, Weighing<Real> by) {
  constexpr Real kLowest = std::numeric_limits<Real>::lowest();
  const double bound = by.maximum + (std::log2(weight - 2 / kMassUnits) + by.lowered - 0.01) / by.scale;
  return bound > kLowest ? std::nextafter(static_cast<Real>(bound), kLowest) : kLowest;
}

}  // namespace DISTILLM_ISA
}  // namespace distillm

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC pop_options
#endif
