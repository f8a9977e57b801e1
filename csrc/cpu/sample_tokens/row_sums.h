// What token sampling needs of a whole row: maxima of its parts, its mass, its sum of exponentials.
//
// Sums of weights are exact: a tile in double, tiles as integers.
#pragma once

#include <cmath>

#include "../row/entry_weights.h"
#include "../row/exponentials.h"

namespace distillm {
inline namespace DISTILLM_ISA {

constexpr int64_t kGroup = 64;

// Maxima of every eighth entry of each whole group, one after the other; returns how many there are.
inline int64_t strand_maxima(const float* z, int64_t vocab, float* out) {
  constexpr int64_t kStrands = 8;
  const int64_t groups = vocab / kGroup;
  for (int64_t group = 0; group < groups; ++group, z += kGroup, out += kStrands) {
#pragma omp simd
    for (int64_t i = 0; i < kStrands; ++i) {
      float maximum = z[i];
      for (int64_t j = kStrands; j < kGroup; j += kStrands) maximum = z[i + j] > maximum ? z[i + j] : maximum;
      out[i] = maximum;
    }
  }
  return groups * kStrands;
}

inline float group_maxima(const float* z, int64_t vocab, float* out) {
  float maximum = -std::numeric_limits<float>::infinity();
  for (int64_t start = 0; start < vocab; start += kGroup) {
    const int64_t count = vocab - start < kGroup ? vocab - start : kGroup;
    const float here = count == kGroup ? tile_maximum(z + start, kGroup) : tile_maximum(z + start, count);
    out[start / kGroup] = here;
    maximum = here > maximum ? here : maximum;
  }
  return maximum;
}

// Mass of the row and of its tiles; 0 where it is not a number.
inline uint64_t row_mass(const float* z, int64_t vocab, Weighing<float> by, uint64_t* tile_mass) {
  uint64_t total = 0;
  for (int64_t start = 0; start < vocab; start += kMassTile) {
    const int64_t count = vocab - start < kMassTile ? vocab - start : kMassTile;
    const double weight = tile_weight(z + start, count, by);
    if (!(weight == weight)) return 0;
    const uint64_t mass = mass_of(weight);
    tile_mass[start / kMassTile] = mass;
    total += mass;
  }
  return total;
}

// Sum of exponentials of a tile in float, in an order that no vector width changes.
inline float tile_exponentials(const float* z, int64_t count, Tempering tempering) {
  constexpr int64_t kLanes = 16;
  const float maximum = tempering.maximum, scale = tempering.scale;
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
#pragma omp simd
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += exp2_portable((z[i + lane] - maximum) * scale);
  }
  float sum = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
  for (; i < count; ++i) sum += exp2_portable((z[i] - maximum) * scale);
  return sum;
}

// log2 of the sum of exponentials of a row, NaN where that is not a number.
inline double log2_sum(const float* z, int64_t vocab, Tempering tempering) {
  double total = 0;
  for (int64_t start = 0; start < vocab; start += kMassTile) {
    const int64_t count = vocab - start < kMassTile ? vocab - start : kMassTile;
    total += static_cast<double>(tile_exponentials(z + start, count, tempering));
  }
  return std::log2(total);
}

}  // namespace DISTILLM_ISA
}  // namespace distillm
