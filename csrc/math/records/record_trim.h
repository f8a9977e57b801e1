// Records without their padding: sampling draws k times but often meets fewer ids, and a cache need not store the rest.
// A trimmed record is the number n of entries (16 bits, little endian) and the record of the layout for max(n, 1)
// entries. Codes are moved as they are: trimming loses nothing, and back it gives the same bytes.
#pragma once

#include <vector>

#include "record_row.h"

namespace distillm {
inline namespace DISTILLM_ISA {

constexpr int kTrimPrefix = 2;

// Places in use: up to the last one that is not padding.
inline int used_entries(const RecordLayout& layout, const uint32_t* words) {
  int used = stored_entries(layout, words);
  while (layout.plain_bits && used > 0 && get_id(layout, words, used - 1) < 0) --used;
  return used;
}

inline RecordLayout with_entries(const RecordLayout& layout, int entries) {
  RecordShape shape = layout.shape;
  shape.entries = std::max(entries, 1);
  return record_layout(shape);
}

// The fields before the ids are the same in both layouts, which differ in `entries` alone; used <= both of these.
inline void move_record(const RecordLayout& from, const uint32_t* in, const RecordLayout& to, uint32_t* out, int used) {
  for (int at = 0; at < from.ids_at; at += 32) {
    const int width = std::min(32, from.ids_at - at);
    put_bits(out, at, get_bits(in, at, width), width);
  }
  for (int i = 0; i < used; ++i) {
    const int32_t id = get_id(from, in, i);
    if (to.plain_bits) {
      put_bits(out, to.ids_at + i * to.plain_bits, id < 0 ? to.shape.vocab : id, to.plain_bits);
    } else if (id >= 0) {
      put_elias_fano(out, to.ids_at, to.upper_at, to.coding, i, id);
    }
    const int width = from.value_bits, counts = from.count_bits;
    put_bits(out, to.values_at + i * width, get_bits(in, from.values_at + i * width, width), width);
    put_bits(out, to.counts_at + i * counts, get_bits(in, from.counts_at + i * counts, counts), counts);
  }
  for (int i = used; i < to.shape.entries; ++i) put_padding(to, out, i);
}

// Appends the trimmed form of a record.
inline void trim_record(const RecordLayout& layout, const uint8_t* in, std::vector<uint8_t>& out) {
  std::vector<uint32_t> words(layout.words);
  load_words(in, layout.bytes, words);
  const int used = used_entries(layout, words.data());
  const RecordLayout trimmed = with_entries(layout, used);
  std::vector<uint32_t> fewer(trimmed.words);
  move_record(layout, words.data(), trimmed, fewer.data(), used);
  const size_t start = out.size();
  out.resize(start + kTrimPrefix + trimmed.bytes);
  out[start] = static_cast<uint8_t>(used);
  out[start + 1] = static_cast<uint8_t>(used >> 8);
  store_words(fewer, trimmed.bytes, out.data() + start + kTrimPrefix);
}

// The record that trim_record took; false where `size` bytes cannot be one.
inline bool restore_record(const RecordLayout& layout, const uint8_t* in, int64_t size, uint8_t* out) {
  if (size < kTrimPrefix) return false;
  const int used = in[0] | in[1] << 8;
  if (used > layout.shape.entries) return false;
  const RecordLayout trimmed = with_entries(layout, used);
  if (size != kTrimPrefix + trimmed.bytes) return false;
  std::vector<uint32_t> fewer(trimmed.words), words(layout.words);
  load_words(in + kTrimPrefix, trimmed.bytes, fewer);
  if (stored_entries(trimmed, fewer.data()) < used) return false;
  move_record(trimmed, fewer.data(), layout, words.data(), used);
  store_words(words, layout.bytes, out);
  return true;
}

}  // namespace DISTILLM_ISA
}  // namespace distillm
