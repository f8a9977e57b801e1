// Fixed-width bit fields in a row of bytes, least significant bit first.
#pragma once

#include <cstdint>

#include "target.h"

namespace distillm {
inline namespace DISTILLM_ISA {

DISTILLM_HD int64_t packed_bytes(int64_t count, int bits) { return (count * bits + 7) / 8; }

// values[i] < 2^bits, bits in 1..31. Writes packed_bytes(count, bits) bytes; spare high bits of the last one are 0.
DISTILLM_HD void pack_row(const int32_t* values, int64_t count, int bits, uint8_t* out) {
  uint64_t pending = 0;
  int filled = 0;
  for (int64_t i = 0; i < count; ++i) {
    pending |= static_cast<uint64_t>(static_cast<uint32_t>(values[i])) << filled;
    for (filled += bits; filled >= 8; filled -= 8, pending >>= 8) *out++ = static_cast<uint8_t>(pending);
  }
  if (filled > 0) *out = static_cast<uint8_t>(pending);
}

DISTILLM_HD void unpack_row(const uint8_t* in, int64_t count, int bits, int32_t* values) {
  const uint64_t mask = (uint64_t{1} << bits) - 1;
  uint64_t pending = 0;
  int filled = 0;
  for (int64_t i = 0; i < count; ++i) {
    for (; filled < bits; filled += 8) pending |= static_cast<uint64_t>(*in++) << filled;
    values[i] = static_cast<int32_t>(pending & mask);
    pending >>= bits;
    filled -= bits;
  }
}

}  // namespace DISTILLM_ISA
}  // namespace distillm
