// The packed record of one position: what `CompressedLogits` holds, in a number of bytes that the layout alone decides.
//
// Fields in this order, bit by bit, least significant first, the last byte filled with zeros:
//
//   tail      temperatures x float16 (exact: float32)   log tail mass per temperature
//   label     float16 (float32), if there are labels    log-probability of the label
//   norm      float32 per temperature (exact); float16 per temperature other than 1 (method sample); else absent
//   range     float16 (q4, q6, q8)                      see quantise.h
//   top       float16 (q4, q6, q8 without T = 1)        largest log-probability
//   valid     1 bit
//   ids       k entries; Elias-Fano in the order of ids, or plain numbers of bit_width(V) bits where that is not longer
//             and in the codec "exact"; the plain number V is padding
//   values    k x 4, 6, 8 bits (codes), 16 (float16 log-probability) or 32 (float32), in the order of ids
//   counts    k x bit_width(draws), method sample only
//
// exact keeps entries in the given order, every bit of them; the other codecs sort by id, and drop entries that are
// padding or have no finite log-probability. log_norm of "topk" is not stored but follows from values and tail, since
// both sum to 1 at every temperature; the values themselves are shifted so that they do at T = 1, where T = 1 is there.
#pragma once

#include <cstdint>

#include "../limits.h"
#include "elias_fano.h"
#include "quantise.h"

namespace distillm {
inline namespace DISTILLM_ISA {

enum class Codec : int32_t { kQ4, kQ6, kQ8, kFp16, kExact };

struct RecordShape {
  int32_t vocab;  // ids lie in [0, vocab)
  int32_t entries;
  int32_t draws;  // the largest count that can be stored, 0 without counts
  Codec codec;
  bool has_labels;
  int32_t temperatures;
  float temperature[kMaxTemperatures];
};

// Where everything is, in bits from the start of the record.
struct RecordLayout {
  RecordShape shape;
  int32_t unit;  // index of the temperature 1, or -1
  int32_t number_bits, value_bits, count_bits;
  int32_t norms;       // stored ones
  int32_t plain_bits;  // of an id; 0: Elias-Fano
  EliasFano coding;
  int32_t label_at, norm_at, range_at, top_at, valid_at, ids_at, upper_at, values_at, counts_at;
  int32_t bytes, words;  // words as bitfield.h wants them

  DISTILLM_HD bool exact() const { return shape.codec == Codec::kExact; }
  DISTILLM_HD bool quantised() const { return value_bits < 16; }
  DISTILLM_HD bool has_top() const { return quantised() && unit < 0; }
  DISTILLM_HD bool has_counts() const { return shape.draws > 0; }
};

inline int value_bits(Codec codec) {
  constexpr int kBits[] = {4, 6, 8, 16, 32};
  return kBits[static_cast<int>(codec)];
}

inline void choose_ids(RecordLayout& layout) {
  const RecordShape& shape = layout.shape;
  layout.coding = elias_fano_shape(shape.entries, shape.vocab);
  const int64_t plain = bit_width(static_cast<uint32_t>(shape.vocab));
  const bool shorter = elias_fano_bits(shape.entries, shape.vocab, layout.coding.low_bits) < plain * shape.entries;
  layout.plain_bits = shorter && !layout.exact() ? 0 : static_cast<int32_t>(plain);
}

// shape must be within the limits above, entries >= 1, vocab in 1..2^30.
inline RecordLayout record_layout(const RecordShape& shape) {
  RecordLayout layout{};
  layout.shape = shape;
  layout.unit = -1;
  for (int t = shape.temperatures - 1; t >= 0; --t) layout.unit = shape.temperature[t] == 1 ? t : layout.unit;
  layout.value_bits = value_bits(shape.codec);
  layout.number_bits = layout.exact() ? 32 : 16;
  layout.count_bits = bit_width(static_cast<uint32_t>(shape.draws));
  for (int t = 0; t < shape.temperatures; ++t) {
    layout.norms += layout.exact() || (layout.has_counts() && shape.temperature[t] != 1);
  }
  choose_ids(layout);
  int at = shape.temperatures * layout.number_bits;
  const auto field = [&at](int bits) { return (at += bits) - bits; };
  layout.label_at = field(shape.has_labels ? layout.number_bits : 0);
  layout.norm_at = field(layout.norms * layout.number_bits);
  layout.range_at = field(layout.quantised() ? 16 : 0);
  layout.top_at = field(layout.has_top() ? 16 : 0);
  layout.valid_at = field(1);
  layout.ids_at = field(shape.entries * (layout.plain_bits ? layout.plain_bits : layout.coding.low_bits));
  layout.upper_at = field(layout.plain_bits ? 0 : layout.coding.upper_bits);
  layout.values_at = field(shape.entries * layout.value_bits);
  layout.counts_at = field(shape.entries * layout.count_bits);
  layout.bytes = (at + 7) / 8;
  layout.words = at / 32 + 2;
  return layout;
}

// The fields of one position. Null: absent.
template <class Id, class Real, class Flag>
struct RecordFields {
  Id* ids;         // [entries]
  Real* logprobs;  // [entries]
  Real* norm;      // [temperatures]
  Real* tail;      // [temperatures]
  Real* label;     // one number
  Flag* valid;     // one flag
  Id* counts;      // [entries]

  // The fields of a position further on, where all are contiguous.
  DISTILLM_HD RecordFields row(const RecordShape& shape, int64_t r) const {
    const int64_t k = r * shape.entries, t = r * shape.temperatures;
    return {
        ids + k, logprobs + k, norm + t, tail + t, label ? label + r : label, valid + r, counts ? counts + k : counts};
  }
};
using RecordInput = RecordFields<const int32_t, const float, const bool>;
using RecordOutput = RecordFields<int32_t, float, bool>;

// ---- Writing. Every function writes fields of its own, so that threads can share out the calls.

// Whether an entry of a valid row is stored by the codecs that drop padding.
DISTILLM_HD bool is_kept(const RecordLayout& layout, int32_t id, float logprob) {
  return id >= 0 && id < layout.shape.vocab && logprob - logprob == 0;
}

DISTILLM_HD uint32_t number_bits_of(const RecordLayout& layout, float x) {
  return layout.exact() ? bit_cast<uint32_t>(x) : to_half_bits(x);
}

// tail and norm [temperatures] and the label (unless there are none) of a row.
DISTILLM_HD void put_row(const RecordLayout& layout, uint32_t* words, bool valid, bool any_kept, const float* tail,
                         const float* norm, float label) {
  const int width = layout.number_bits;
  int stored = 0;
  for (int t = 0; t < layout.shape.temperatures; ++t) {
    put_bits(words, t * width, layout.exact() ? bit_cast<uint32_t>(tail[t]) : tail_to_half_bits(tail[t], any_kept),
             width);
    if (layout.norms == 0 || (!layout.exact() && layout.shape.temperature[t] == 1)) continue;
    put_bits(words, layout.norm_at + stored++ * width, number_bits_of(layout, norm[t]), width);
  }
  if (layout.shape.has_labels) put_bits(words, layout.label_at, number_bits_of(layout, label), width);
  put_bits(words, layout.valid_at, valid, 1);
}

// Range and largest value of the quantised codecs; the scale for put_value. Nothing for the others.
DISTILLM_HD void put_range(const RecordLayout& layout, uint32_t* words, float largest, float smallest) {
  if (!layout.quantised()) return;
  put_bits(words, layout.range_at, range_to_half_bits(largest, smallest), 16);
  if (layout.has_top()) put_bits(words, layout.top_at, to_half_bits(largest), 16);
}

DISTILLM_HD float value_scale(const RecordLayout& layout, float largest, float smallest) {
  if (!layout.quantised()) return 0;
  return quantisation_scale(half_to_float(range_to_half_bits(largest, smallest)), layout.value_bits);
}

// The entry of place i: the i-th smallest id, or the i-th given one (exact).
DISTILLM_HD void put_entry(const RecordLayout& layout, uint32_t* words, int i, int32_t id, float logprob, int32_t count,
                           float largest, float scale) {
  const int width = layout.value_bits;
  if (layout.plain_bits) {
    const bool inside = id >= 0 && id < layout.shape.vocab;
    put_bits(words, layout.ids_at + i * layout.plain_bits, inside ? id : layout.shape.vocab, layout.plain_bits);
  } else {
    put_elias_fano(words, layout.ids_at, layout.upper_at, layout.coding, i, id);
  }
  const uint32_t value = layout.exact()       ? bit_cast<uint32_t>(logprob)
                         : layout.quantised() ? quantise(largest - logprob, scale, width)
                                              : to_half_bits(logprob);
  put_bits(words, layout.values_at + i * width, value, width);
  if (!layout.has_counts()) return;
  const int32_t bounded = count < 0 ? 0 : count < layout.shape.draws ? count : layout.shape.draws;
  put_bits(words, layout.counts_at + i * layout.count_bits, bounded, layout.count_bits);
}

// Marks a place without an entry: id V where ids are plain, and -inf where values are stored bit by bit.
DISTILLM_HD void put_padding(const RecordLayout& layout, uint32_t* words, int i) {
  if (layout.plain_bits) put_bits(words, layout.ids_at + i * layout.plain_bits, layout.shape.vocab, layout.plain_bits);
  if (layout.exact()) put_bits(words, layout.values_at + i * 32, 0xff800000u, 32);
}

// ---- Reading. Any bytes are safe to read: what cannot be an entry becomes padding.

DISTILLM_HD float get_number(const RecordLayout& layout, const uint32_t* words, int at) {
  return layout.exact() ? bit_cast<float>(get_bits(words, at, 32)) : half_to_float(get_bits(words, at, 16));
}

DISTILLM_HD float get_tail(const RecordLayout& layout, const uint32_t* words, int t) {
  return get_number(layout, words, t * layout.number_bits);
}

DISTILLM_HD float get_label(const RecordLayout& layout, const uint32_t* words) {
  return get_number(layout, words, layout.label_at);
}

// Entries in a row of Elias-Fano coded ids; plain ids tell padding one by one.
DISTILLM_HD int stored_entries(const RecordLayout& layout, const uint32_t* words) {
  if (layout.plain_bits) return layout.shape.entries;
  const int count = elias_fano_count(words, layout.upper_at, layout.coding);
  return count < layout.shape.entries ? count : layout.shape.entries;
}

DISTILLM_HD int32_t checked_id(const RecordLayout& layout, uint32_t id) {
  return id < static_cast<uint32_t>(layout.shape.vocab) ? static_cast<int32_t>(id) : -1;
}

// -1 for padding; i < stored_entries.
DISTILLM_HD int32_t get_id(const RecordLayout& layout, const uint32_t* words, int i) {
  if (layout.plain_bits)
    return checked_id(layout, get_bits(words, layout.ids_at + i * layout.plain_bits, layout.plain_bits));
  return checked_id(layout, get_elias_fano(words, layout.ids_at, layout.upper_at, layout.coding, i));
}

struct ValueCoding {
  float top, step;
};

DISTILLM_HD ValueCoding get_value_coding(const RecordLayout& layout, const uint32_t* words) {
  if (!layout.quantised()) return {0, 0};
  const float levels = static_cast<float>((1 << layout.value_bits) - 1);
  const float top = layout.has_top() ? half_to_float(get_bits(words, layout.top_at, 16)) : 0.0f;
  return {top, half_to_float(get_bits(words, layout.range_at, 16)) / levels};
}

// Log-probability of place i, before the shift.
DISTILLM_HD float get_value(const RecordLayout& layout, const uint32_t* words, int i, ValueCoding coding) {
  const int width = layout.value_bits;
  const uint32_t bits = get_bits(words, layout.values_at + i * width, width);
  if (layout.quantised()) return coding.top - static_cast<float>(bits) * coding.step;
  return width == 32 ? bit_cast<float>(bits) : half_to_float(bits);
}

DISTILLM_HD int32_t get_count(const RecordLayout& layout, const uint32_t* words, int i) {
  return static_cast<int32_t>(get_bits(words, layout.counts_at + i * layout.count_bits, layout.count_bits));
}

// What the log-probabilities get added so that the kept ones and the tail sum to 1; log_sum is that of the kept ones.
DISTILLM_HD float value_shift(const RecordLayout& layout, const uint32_t* words, float log_sum) {
  if (layout.exact() || layout.unit < 0) return 0;
  return log_complement(get_tail(layout, words, layout.unit)) - log_sum;
}

// log_norm at temperature t: stored, 0 at T = 1, or what makes kept entries and tail sum to 1. log_sum is that of the
// kept log-probabilities divided by T. Call with t = 0, 1, ...: `stored` counts the stored ones passed.
DISTILLM_HD float get_norm(const RecordLayout& layout, const uint32_t* words, int t, float log_sum, int& stored) {
  if (!layout.exact() && layout.shape.temperature[t] == 1) return 0;
  if (layout.norms > 0) return get_number(layout, words, layout.norm_at + stored++ * layout.number_bits);
  return log_sum - log_complement(get_tail(layout, words, t));
}

}  // namespace DISTILLM_ISA
}  // namespace distillm
