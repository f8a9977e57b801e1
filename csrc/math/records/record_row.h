// One record packed or unpacked by one thread; host only. The GPU kernels share record.h and divide these loops among
// the threads of a block.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "record.h"

namespace distillm {
inline namespace DISTILLM_ISA {

inline void load_words(const uint8_t* in, int bytes, std::vector<uint32_t>& words) {
  std::fill(words.begin(), words.end(), 0u);
  for (int i = 0; i < bytes; ++i) words[i >> 2] |= static_cast<uint32_t>(in[i]) << (8 * (i & 3));
}

inline void store_words(const std::vector<uint32_t>& words, int bytes, uint8_t* out) {
  for (int i = 0; i < bytes; ++i) out[i] = byte_of(words.data(), i);
}

class RecordCoder {
 public:
  explicit RecordCoder(const RecordLayout& layout)
      : layout_(layout),
        words_(layout.words),
        keys_(layout.shape.entries),
        ids_(layout.shape.entries),
        values_(layout.shape.entries) {}

  void pack(const RecordInput& row, uint8_t* out) {
    std::fill(words_.begin(), words_.end(), 0u);
    const bool valid = *row.valid;
    const int kept = layout_.exact() ? put_all(row) : put_sorted(row, valid);
    put_row(layout_, words_.data(), valid, kept > 0, row.tail, row.norm, row.label ? *row.label : 0.0f);
    store_words(words_, layout_.bytes, out);
  }

  void unpack(const uint8_t* in, const RecordOutput& row) {
    load_words(in, layout_.bytes, words_);
    const uint32_t* words = words_.data();
    *row.valid = get_bits(words, layout_.valid_at, 1) && (layout_.exact() || tails_are_legal());
    if (layout_.exact()) return get_all(row);
    if (!*row.valid) return write_invalid(row);
    const int kept = read_entries();
    const float shift = value_shift(layout_, words, log_sum(kept, 1.0f));
    for (int i = 0; i < kept; ++i) values_[i] = std::min(values_[i] + shift, 0.0f);
    write_sorted(kept, row);
    int stored = 0;
    for (int t = 0; t < layout_.shape.temperatures; ++t) {
      const float temperature = layout_.shape.temperature[t];
      row.tail[t] = get_tail(layout_, words, t);
      row.norm[t] = get_norm(layout_, words, t, temperature == 1 ? 0 : log_sum(kept, temperature), stored);
    }
    if (row.label) *row.label = get_label(layout_, words);
  }

 private:
  int put_all(const RecordInput& row) {
    for (int i = 0; i < layout_.shape.entries; ++i) {
      put_entry(layout_, words_.data(), i, row.ids[i], row.logprobs[i], row.counts ? row.counts[i] : 0, 0, 0);
    }
    return layout_.shape.entries;
  }

  int put_sorted(const RecordInput& row, bool valid) {
    int kept = 0;
    float largest = -std::numeric_limits<float>::infinity(), smallest = -largest;
    for (int i = 0; valid && i < layout_.shape.entries; ++i) {
      if (!is_kept(layout_, row.ids[i], row.logprobs[i])) continue;
      keys_[kept++] = static_cast<uint64_t>(row.ids[i]) << 32 | static_cast<uint32_t>(i);
      largest = std::max(largest, row.logprobs[i]);
      smallest = std::min(smallest, row.logprobs[i]);
    }
    std::sort(keys_.begin(), keys_.begin() + kept);
    uint32_t* words = words_.data();
    const float scale = kept > 0 ? value_scale(layout_, largest, smallest) : 0.0f;
    if (kept > 0) put_range(layout_, words, largest, smallest);
    for (int i = 0; i < kept; ++i) {
      const uint32_t from = static_cast<uint32_t>(keys_[i]);
      put_entry(layout_, words, i, row.ids[from], row.logprobs[from], row.counts ? row.counts[from] : 0, largest,
                scale);
    }
    for (int i = kept; i < layout_.shape.entries; ++i) put_padding(layout_, words, i);
    return kept;
  }

  bool tails_are_legal() const {
    bool legal = true;
    for (int t = 0; t < layout_.shape.temperatures; ++t) legal &= get_tail(layout_, words_.data(), t) <= 0;
    return legal;
  }

  void get_all(const RecordOutput& row) {
    const uint32_t* words = words_.data();
    for (int i = 0; i < layout_.shape.entries; ++i) {
      row.ids[i] = get_id(layout_, words, i);
      row.logprobs[i] = get_value(layout_, words, i, {});
      if (row.counts) row.counts[i] = get_count(layout_, words, i);
    }
    int stored = 0;
    for (int t = 0; t < layout_.shape.temperatures; ++t) {
      row.tail[t] = get_tail(layout_, words, t);
      row.norm[t] = get_norm(layout_, words, t, 0, stored);
    }
    if (row.label) *row.label = get_label(layout_, words);
  }

  void write_invalid(const RecordOutput& row) {
    constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
    write_padding(0, row);
    std::fill_n(row.tail, layout_.shape.temperatures, kNan);
    std::fill_n(row.norm, layout_.shape.temperatures, kNan);
    if (row.label) *row.label = kNan;
  }

  void write_padding(int first, const RecordOutput& row) {
    for (int i = first; i < layout_.shape.entries; ++i) {
      row.ids[i] = -1;
      row.logprobs[i] = -std::numeric_limits<float>::infinity();
      if (row.counts) row.counts[i] = 0;
    }
  }

  // ids_ and values_ in the order of places; keys_ remembers the place. Returns how many are entries.
  int read_entries() {
    const uint32_t* words = words_.data();
    const ValueCoding coding = get_value_coding(layout_, words);
    int kept = 0;
    const auto read = [&](int i, int32_t id) {
      const float value = get_value(layout_, words, i, coding);
      if (!is_kept(layout_, id, value)) return;
      ids_[kept] = id;
      values_[kept] = value;
      keys_[kept++] = static_cast<uint64_t>(i);
    };
    if (layout_.plain_bits) {
      for (int i = 0; i < layout_.shape.entries; ++i) read(i, get_id(layout_, words, i));
      return kept;
    }
    int i = 0;
    for (int w = 0; w < upper_words(layout_.coding); ++w) {
      for (uint32_t ones = upper_word(words, layout_.upper_at, layout_.coding, w);
           ones != 0 && i < layout_.shape.entries; ones &= ones - 1, ++i) {
        const int position = 32 * w + lowest_one(ones);
        read(i, checked_id(layout_, join_elias_fano(words, layout_.ids_at, layout_.coding, i, position)));
      }
    }
    return kept;
  }

  // log of the sum of exp(value / temperature).
  float log_sum(int kept, float temperature) const {
    if (kept == 0) return -std::numeric_limits<float>::infinity();
    const float largest = *std::max_element(values_.begin(), values_.begin() + kept);
    double sum = 0;
    for (int i = 0; i < kept; ++i) sum += std::exp((values_[i] - largest) / temperature);
    return largest / temperature + static_cast<float>(std::log(sum));
  }

  // Value descending, id ascending on ties, however the shift rounded.
  void write_sorted(int kept, const RecordOutput& row) {
    order_.resize(kept);
    for (int i = 0; i < kept; ++i) order_[i] = i;
    std::sort(order_.begin(), order_.end(), [this](int a, int b) {
      if (values_[a] != values_[b]) return values_[a] > values_[b];
      return ids_[a] != ids_[b] ? ids_[a] < ids_[b] : a < b;
    });
    for (int i = 0; i < kept; ++i) {
      row.ids[i] = ids_[order_[i]];
      row.logprobs[i] = values_[order_[i]];
      if (row.counts) row.counts[i] = get_count(layout_, words_.data(), static_cast<int>(keys_[order_[i]]));
    }
    write_padding(kept, row);
  }

  RecordLayout layout_;
  std::vector<uint32_t> words_;
  std::vector<uint64_t> keys_;
  std::vector<int32_t> ids_;
  std::vector<float> values_;
  std::vector<int> order_;
};

}  // namespace DISTILLM_ISA
}  // namespace distillm
