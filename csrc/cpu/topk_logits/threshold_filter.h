// The k largest entries of a row in one pass: every tile is compared with a value that the k-th largest is known to
// exceed or equal, and the few entries above it are gathered. When the gathered ones are many, they are cut to k, and
// the k-th of them is the new threshold.
#pragma once

#include "../row/tiles.h"
#include "candidates.h"

#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace distillm {
inline namespace DISTILLM_ISA {

constexpr int64_t kFilterLanes = 32;

// Bit i: z[i] > threshold. NaN is not above anything.
template <class Real>
uint32_t lanes_above(const Real* z, Real threshold) {
  uint32_t mask = 0;
  for (int i = 0; i < kFilterLanes; ++i) mask |= static_cast<uint32_t>(z[i] > threshold) << i;
  return mask;
}

// Chosen by the file that includes this: g++ 12 does not define __AVX2__ after a target pragma.
#if defined(DISTILLM_LANES_AVX512)
inline uint32_t lanes_above(const float* z, float threshold) {
  const __m512 t = _mm512_set1_ps(threshold);
  const uint32_t low = _mm512_cmp_ps_mask(_mm512_loadu_ps(z), t, _CMP_GT_OQ);
  const uint32_t high = _mm512_cmp_ps_mask(_mm512_loadu_ps(z + 16), t, _CMP_GT_OQ);
  return low | high << 16;
}
#elif defined(DISTILLM_LANES_AVX2)
inline uint32_t lanes_above(const float* z, float threshold) {
  const __m256 t = _mm256_set1_ps(threshold);
  uint32_t mask = 0;
  for (int i = 0; i < 4; ++i) {
    const __m256 above = _mm256_cmp_ps(_mm256_loadu_ps(z + 8 * i), t, _CMP_GT_OQ);
    mask |= static_cast<uint32_t>(_mm256_movemask_ps(above)) << (8 * i);
  }
  return mask;
}
#elif defined(__SSE2__)
inline uint32_t lanes_above(const float* z, float threshold) {
  const __m128 t = _mm_set1_ps(threshold);
  uint32_t mask = 0;
  for (int i = 0; i < 8; ++i) {
    const __m128 above = _mm_cmpgt_ps(_mm_loadu_ps(z + 4 * i), t);
    mask |= static_cast<uint32_t>(_mm_movemask_ps(above)) << (4 * i);
  }
  return mask;
}
#endif

// Appends the entries of a tile above `threshold`; `candidates` has room for all.
template <class Real>
void append_above(const Real* z, int64_t count, int64_t first_id, Real threshold, Candidates<Real>& candidates) {
  Real* values = candidates.values;
  int32_t* ids = candidates.ids;
  int64_t size = candidates.size, i = 0;
  for (; i + kFilterLanes <= count; i += kFilterLanes) {
    for (uint32_t mask = lanes_above(z + i, threshold); mask != 0; mask &= mask - 1) {
      const int64_t at = i + __builtin_ctz(mask);
      values[size] = z[at];
      ids[size++] = static_cast<int32_t>(first_id + at);
    }
  }
  for (; i < count; ++i) {
    values[size] = z[i];
    ids[size] = static_cast<int32_t>(first_id + i);
    size += z[i] > threshold;
  }
  candidates.size = size;
}

// While one tile is in the arithmetic, the next one is on its way: the two would else take turns.
template <class Real>
void prefetch(const LogitRow<Real>& row, int64_t start, int64_t count) {
  constexpr int64_t kLine = 64;
  const int64_t size = bytes_of(row.type), end = start + count < row.vocab ? start + count : row.vocab;
  for (int64_t byte = start * size; byte < end * size; byte += kLine) __builtin_prefetch(row.data + byte);
}

// A threshold to start with, from the first entries of a row: of G groups of about 16 entries each has a largest one,
// and the k-th largest of those is not above the k-th largest of all. With G = 4k some 1.15 k of the 64 k entries lie
// above it. -inf where the row is too short to be worth it.
template <class Real>
Real first_threshold(const LogitRow<Real>& row, int64_t k, Real* group_maxima, SelectionScratch<Real> scratch) {
  constexpr Real kNone = -std::numeric_limits<Real>::infinity();
  constexpr int64_t kLanes = kTile / 4;
  const int64_t groups = (4 * k + kLanes - 1) / kLanes * kLanes, sample = 16 * groups;
  if (row.vocab < sample) return kNone;
  alignas(64) Real buffer[kTile];
  for (int64_t g = 0; g < groups; ++g) group_maxima[g] = kNone;
  for (int64_t start = 0; start < sample; start += kTile) {
    const Real* z = row.tile(start, kTile, buffer);
    for (int64_t part = 0; part < kTile; part += kLanes) {
      Real* maxima = group_maxima + (start + part) % groups;
#pragma omp simd
      for (int64_t i = 0; i < kLanes; ++i) maxima[i] = z[part + i] > maxima[i] ? z[part + i] : maxima[i];
    }
  }
  // A little lower, so that the k-th largest itself is above it, whatever the processor does with subnormal numbers.
  const Real kth = find_threshold(group_maxima, groups, CountMeasure{}, static_cast<uint64_t>(k), scratch).value;
  return kth - std::abs(kth) * Real(1e-6) - Real(1e-30);
}

}  // namespace DISTILLM_ISA
}  // namespace distillm
