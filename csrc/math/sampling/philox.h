// Counter-based randomness: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
//
// A draw is a function of (seed, position, purpose) and of nothing else: no state, no order of calls. key = the 64-bit
// seed, counter = (position, purpose, 0). Integer arithmetic only, so that host and device agree bit for bit.
#pragma once

#include <cstdint>

#include "../target.h"

namespace distillm {
inline namespace DISTILLM_ISA {

// What a draw is for. Two purposes never share a random number.
enum class Draw : uint32_t { kSampleToken = 0, kSampleTeacher = 1 };

struct PhiloxBlock {
  uint32_t word[4];
};

// One round: two 32x32 -> 64 bit products, halves exchanged and mixed with the key.
DISTILLM_HD PhiloxBlock philox_round(PhiloxBlock c, uint32_t key0, uint32_t key1) {
  const uint64_t product0 = uint64_t{0xD2511F53u} * c.word[0];
  const uint64_t product1 = uint64_t{0xCD9E8D57u} * c.word[2];
  return {{static_cast<uint32_t>(product1 >> 32) ^ c.word[1] ^ key0, static_cast<uint32_t>(product1),
           static_cast<uint32_t>(product0 >> 32) ^ c.word[3] ^ key1, static_cast<uint32_t>(product0)}};
}

DISTILLM_HD PhiloxBlock philox4x32_10(PhiloxBlock counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    counter = philox_round(counter, key0, key1);
    key0 += 0x9E3779B9u;  // the golden ratio
    key1 += 0xBB67AE85u;  // the square root of 3, less 1
  }
  return counter;
}

// 64 random bits.
DISTILLM_HD uint64_t random_bits(int64_t seed, int64_t position, Draw purpose) {
  const uint64_t key = static_cast<uint64_t>(seed), at = static_cast<uint64_t>(position);
  const PhiloxBlock counter = {
      {static_cast<uint32_t>(at), static_cast<uint32_t>(at >> 32), static_cast<uint32_t>(purpose), 0u}};
  const PhiloxBlock block = philox4x32_10(counter, static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32));
  return static_cast<uint64_t>(block.word[1]) << 32 | block.word[0];
}

// A multiple of 2^-53 in the open interval (0, 1); the lowest cell, where 0 would be, is resolved to 2^-64. Every value
// is exact: the usual (k + 1/2) 2^-53 rounds to 1 at the upper end.
DISTILLM_HD double open_uniform(uint64_t bits) {
  const uint64_t top = bits >> 11;
  const double lowest_cell = (static_cast<double>(bits & 0x7ffu) + 0.5) * 0x1p-64;
  return top ? static_cast<double>(top) * 0x1p-53 : lowest_cell;
}

DISTILLM_HD double open_uniform(int64_t seed, int64_t position, Draw purpose) {
  return open_uniform(random_bits(seed, position, purpose));
}

}  // namespace DISTILLM_ISA
}  // namespace distillm
