// Bit fields of up to 32 bits at any bit of a row of 32-bit words, least significant bit first. Byte i of a row is its
// bits 8 i to 8 i + 7.
//
// Fields are written by OR into words that start as zero, on the GPU atomically: the threads of a block write one row
// together, in any order, with one result. Both functions touch the word after the one where a field starts, so a row
// of n bits needs n / 32 + 2 words.
#pragma once

#include <cstdint>

#include "../target.h"

namespace distillm {
inline namespace DISTILLM_ISA {

DISTILLM_HD void or_word(uint32_t* word, uint32_t bits) {
#ifdef __CUDA_ARCH__
  atomicOr(word, bits);
#else
  *word |= bits;
#endif
}

// value < 2^width, width in 0..32.
DISTILLM_HD void put_bits(uint32_t* words, int at, uint32_t value, int width) {
  const int shift = at & 31;
  or_word(words + (at >> 5), value << shift);
  if (shift + width > 32) or_word(words + (at >> 5) + 1, value >> (32 - shift));
}

DISTILLM_HD uint32_t get_bits(const uint32_t* words, int at, int width) {
  const uint64_t both = words[at >> 5] | static_cast<uint64_t>(words[(at >> 5) + 1]) << 32;
  return static_cast<uint32_t>((both >> (at & 31)) & ((uint64_t{1} << width) - 1));
}

DISTILLM_HD uint8_t byte_of(const uint32_t* words, int i) {
  return static_cast<uint8_t>(words[i >> 2] >> (8 * (i & 3)));
}

DISTILLM_HD int count_ones(uint32_t x) {
#ifdef __CUDA_ARCH__
  return __popc(x);
#else
  return __builtin_popcount(x);
#endif
}

DISTILLM_HD int lowest_one(uint32_t x) {  // x != 0
#ifdef __CUDA_ARCH__
  return __ffs(x) - 1;
#else
  return __builtin_ctz(x);
#endif
}

// Smallest width with value < 2^width.
constexpr int bit_width(uint32_t value) {
  int width = 0;
  for (; value != 0; value >>= 1) ++width;
  return width;
}

}  // namespace DISTILLM_ISA
}  // namespace distillm
