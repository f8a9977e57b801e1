// Conversions between float and the 16-bit formats, by integer arithmetic without branches: they vectorise on every
// instruction set. Rounding is to nearest, ties to even; infinities, NaN and subnormal numbers are kept.
#pragma once

#include "exponential.h"

namespace distillm {
inline namespace DISTILLM_ISA {

// Storage formats. Tags with the bits inside, so that templates tell them from plain integers.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

DISTILLM_HD float to_real(float x) { return x; }
DISTILLM_HD double to_real(double x) { return x; }

DISTILLM_HD float to_real(BFloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

DISTILLM_HD float to_real(Half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  // The exponent is biased by 15 there and by 127 here; the product also normalises subnormal numbers.
  const uint32_t finite = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 5.192296858534828e33f);  // 2^112
  return bit_cast<float>((magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : finite) | sign);
}

template <class Storage>
struct FromReal;

template <>
struct FromReal<float> {
  DISTILLM_HD static float convert(float x) { return x; }
};

template <>
struct FromReal<double> {
  DISTILLM_HD static double convert(double x) { return x; }
};

template <>
struct FromReal<BFloat16> {
  DISTILLM_HD static BFloat16 convert(float x) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const uint32_t quiet_nan = (bits >> 16) | 0x40u;
    return {static_cast<uint16_t>(x == x ? rounded : quiet_nan)};
  }
};

template <>
struct FromReal<Half> {
  DISTILLM_HD static Half convert(float x) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    const uint32_t magnitude = bits & 0x7fffffffu;
    const uint32_t normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
    // Below 2^-14: adding 0.5 aligns the mantissa to multiples of 2^-24 and rounds.
    const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
    const uint32_t special = x == x ? 0x7c00u : 0x7e00u;
    const uint32_t small = magnitude < 0x38800000u ? subnormal : normal;
    const uint32_t result = magnitude >= 0x47800000u ? special : small;
    return {static_cast<uint16_t>(result | ((bits >> 16) & 0x8000u))};
  }
};

}  // namespace DISTILLM_ISA
}  // namespace distillm
