// Numbers of a packed record: log-probabilities as steps below the row's largest, and as float16.
//
// Quantised values: with b bits, range = min(largest - smallest, 32) nats rounded to float16, step = range / (2^b - 1),
// value ~ largest - code * step. The largest is exact (code 0), the others off by at most step / 2 (and half a unit in
// the last place of `range`, where that rounded down); what lies more than 32 nats below the largest, a factor of
// 1.3e-14, is stored as 32 nats below it.
//
// Every operation is a single correctly rounded one, so that CPU and GPU give the same code: no product is followed by
// a sum that a compiler could contract.
#pragma once

#include <cmath>
#include <cstdint>

#include "../float16.h"

namespace distillm {
inline namespace DISTILLM_ISA {

constexpr float kWidestRange = 32;
constexpr float kLargestHalf = 65504;
constexpr uint16_t kSmallestNegativeHalf = 0x8001;  // -2^-24

DISTILLM_HD float half_to_float(uint32_t bits) { return to_real(Half{static_cast<uint16_t>(bits)}); }

// Nearest float16. Finite numbers stay finite: a logarithm of -1e5 must not turn into a probability of exactly 0.
DISTILLM_HD uint16_t to_half_bits(float x) {
  const bool finite = x - x == 0;
  const float bounded = x < -kLargestHalf ? -kLargestHalf : x > kLargestHalf ? kLargestHalf : x;
  return FromReal<Half>::convert(finite ? bounded : x).bits;
}

// A log tail mass that stands beside kept entries: float16 rounds magnitudes below 2^-25 to 0, which would leave
// nothing for the kept entries; the smallest negative number stands for it.
DISTILLM_HD uint16_t tail_to_half_bits(float log_tail, bool any_kept) {
  const uint16_t bits = to_half_bits(log_tail);
  return any_kept && (bits & 0x7fffu) == 0 ? kSmallestNegativeHalf : bits;
}

DISTILLM_HD uint16_t range_to_half_bits(float largest, float smallest) {
  const float range = largest - smallest;
  return to_half_bits(range > kWidestRange ? kWidestRange : range);
}

// Codes per nat.
DISTILLM_HD float quantisation_scale(float range, int bits) {
  return range > 0 ? static_cast<float>((1 << bits) - 1) / range : 0.0f;
}

DISTILLM_HD uint32_t quantise(float below_largest, float scale, int bits) {
  const float levels = static_cast<float>((1 << bits) - 1);
  const float code = rintf(below_largest * scale);
  return static_cast<uint32_t>(code < levels ? code : levels);
}

// log(1 - e^x) for x <= 0 (Maechler 2012), without cancellation: x = -inf gives 0, x = 0 gives -inf.
DISTILLM_HD float log_complement(float x) { return x > -0.6931472f ? logf(-expm1f(x)) : log1pf(-expf(x)); }

}  // namespace DISTILLM_ISA
}  // namespace distillm
