// Floating-point numbers as unsigned integers of the same order: radix selection and radix sorting compare integers.
#pragma once

#include "exponential.h"

namespace distillm {
inline namespace DISTILLM_ISA {

// -inf < ... < -0 = 0 < ... < inf; NaN has no place.
DISTILLM_HD uint32_t ordered_key(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x + 0.0f);  // -0 becomes 0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
DISTILLM_HD uint64_t ordered_key(double x) {
  const uint64_t bits = bit_cast<uint64_t>(x + 0.0);
  return bits >> 63 ? ~bits : bits | uint64_t{1} << 63;
}

DISTILLM_HD float number_of_key(uint32_t key) { return bit_cast<float>(key & 0x80000000u ? key ^ 0x80000000u : ~key); }
DISTILLM_HD double number_of_key(uint64_t key) { return bit_cast<double>(key >> 63 ? key ^ uint64_t{1} << 63 : ~key); }

}  // namespace DISTILLM_ISA
}  // namespace distillm
