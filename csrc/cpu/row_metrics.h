// Entropies and top-1 agreement of one row from the exponentials that pass 1 left in the cache.
#pragma once

#include "exponentials.h"

namespace distillm {
inline namespace DISTILLM_ISA {

// sum p log2 p. A probability that is 0 has a logarithm that counts as finite, so that its product is 0.
template <class Real>
Real tile_negative_entropy(const Real* e, const Real* z, int64_t count, Real factor, Softmax<Real> softmax) {
  Real sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += e[i] * factor * at_least(softmax.log2_probability(z[i]), Real(-1e4));
  return sum;
}

template <class Real>
int64_t tile_count_of(const Real* z, int64_t count, Real value) {
  int32_t found = 0;
#pragma omp simd reduction(+ : found)
  for (int64_t i = 0; i < count; ++i) found += z[i] == value ? 1 : 0;
  return found;
}

template <class Real>
struct SideMetrics {
  Real entropy;  // nats
  int64_t top;   // first entry with the largest logit
};

template <class Real>
SideMetrics<Real> side_metrics(const LogitRow<Real>& row, Softmax<Real> softmax, Exponentials<Real> p) {
  alignas(64) Real buffer[kTile];
  double negative_entropy = 0;
  int64_t top = -1;
  for (int64_t start = 0; start < row.vocab; start += kTile) {
    const int64_t count = row.vocab - start < kTile ? row.vocab - start : kTile;
    const Real* z = row.tile(start, count, buffer);
    negative_entropy += tile_negative_entropy(p.values + start, z, count, p.tile_factor[start / kTile], softmax);
    if (top < 0 && tile_count_of(z, count, softmax.maximum) > 0) {
      for (top = start; z[top - start] != softmax.maximum;) ++top;
    }
  }
  const Real entropy = static_cast<Real>(-kLn2 * negative_entropy);
  return {entropy > Real(0) ? entropy : Real(0), top};
}

// [teacher entropy, student entropy, top-1 agreement]
template <class Real>
void write_metrics(const SideMetrics<Real>& teacher, const SideMetrics<Real>& student, Real* out) {
  out[0] = teacher.entropy;
  out[1] = student.entropy;
  out[2] = teacher.top == student.top ? Real(1) : Real(0);
}

}  // namespace DISTILLM_ISA
}  // namespace distillm
