// Elias-Fano coding of up to k non-decreasing ids below V, in a number of bits that k and V alone decide.
//
// The low l bits of id i are stored plainly at i * l. Its high part h = id >> l is stored in unary, as the bit h + i of
// a second field, so that i is known from the number of ones before it. k l + k + ((V - 1) >> l) bits in all; about
// log2(V / k) + 2 bits an id at the best l (Elias 1974, Fano 1971). With fewer than k ids the field holds fewer ones.
#pragma once

#include <cstdint>

#include "bitfield.h"

namespace distillm {
inline namespace DISTILLM_ISA {

struct EliasFano {
  int low_bits;    // l
  int upper_bits;  // length of the unary field
};

constexpr int64_t elias_fano_bits(int64_t k, int64_t vocab, int low_bits) {
  return k * low_bits + k + ((vocab - 1) >> low_bits);
}

// The l with the fewest bits, the smallest of equals.
constexpr EliasFano elias_fano_shape(int64_t k, int64_t vocab) {
  int best = 0;
  for (int low = 1; (vocab >> low) > 0; ++low) {
    if (elias_fano_bits(k, vocab, low) < elias_fano_bits(k, vocab, best)) best = low;
  }
  return {best, static_cast<int>(k + ((vocab - 1) >> best))};
}

// id is the i-th smallest; low_at and upper_at are where the two fields start.
DISTILLM_HD void put_elias_fano(uint32_t* words, int low_at, int upper_at, EliasFano shape, int i, uint32_t id) {
  put_bits(words, low_at + i * shape.low_bits, id & ((1u << shape.low_bits) - 1), shape.low_bits);
  put_bits(words, upper_at + static_cast<int>(id >> shape.low_bits) + i, 1, 1);
}

// Word w of the unary field, shifted so that bit 0 is the field's bit 32 w, without what follows the field.
DISTILLM_HD uint32_t upper_word(const uint32_t* words, int upper_at, EliasFano shape, int w) {
  const int left = shape.upper_bits - 32 * w;
  return get_bits(words, upper_at + 32 * w, left < 32 ? left : 32);
}

DISTILLM_HD int upper_words(EliasFano shape) { return (shape.upper_bits + 31) / 32; }

// How many ids are stored.
DISTILLM_HD int elias_fano_count(const uint32_t* words, int upper_at, EliasFano shape) {
  int count = 0;
  for (int w = 0; w < upper_words(shape); ++w) count += count_ones(upper_word(words, upper_at, shape, w));
  return count;
}

// The high part of id i and the low part put together. Any bits give some number below 2^31, never a bad access.
DISTILLM_HD uint32_t join_elias_fano(const uint32_t* words, int low_at, EliasFano shape, int i, int position) {
  const uint32_t low = get_bits(words, low_at + i * shape.low_bits, shape.low_bits);
  return static_cast<uint32_t>(position - i) << shape.low_bits | low;
}

// Id i < count by itself, for one thread among many: passes over whole words of the unary field.
DISTILLM_HD uint32_t get_elias_fano(const uint32_t* words, int low_at, int upper_at, EliasFano shape, int i) {
  int before = 0, w = 0;
  uint32_t bits = upper_word(words, upper_at, shape, 0);
  for (int ones = count_ones(bits); before + ones <= i; ones = count_ones(bits)) {
    before += ones;
    bits = upper_word(words, upper_at, shape, ++w);
  }
  for (; before < i; ++before) bits &= bits - 1;
  return join_elias_fano(words, low_at, shape, i, 32 * w + lowest_one(bits));
}

}  // namespace DISTILLM_ISA
}  // namespace distillm
