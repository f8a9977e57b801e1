// The kept entries of one row of a compressed teacher, and pass 1 over the student's logits around them.
#pragma once

#include <cstring>

#include "../../math/sparse_divergence.h"
#include "../../ops/sparse_divergence.h"
#include "../memory/thread_scratch.h"
#include "../row/exponentials.h"

namespace distillm {
inline namespace DISTILLM_ISA {

// A set of ids as bits, a whole number of tiles of them.
struct IdSet {
  static constexpr int64_t kWordsPerTile = kTile / 64;
  uint64_t* words;

  static int64_t words_for(int64_t vocab) { return (vocab + kTile - 1) / kTile * kWordsPerTile; }

  // Whether the id is new.
  bool insert(int64_t id) const {
    uint64_t& word = words[id / 64];
    const uint64_t bit = uint64_t(1) << id % 64;
    const bool added = !(word & bit);
    word |= bit;
    return added;
  }

  bool meets(int64_t tile) const {
    uint64_t any = 0;
    for (int64_t w = 0; w < kWordsPerTile; ++w) any |= words[tile * kWordsPerTile + w];
    return any != 0;
  }

  // values[i] = value for every member tile * kTile + i below tile * kTile + count.
  template <class Real>
  void overwrite(int64_t tile, int64_t count, Real value, Real* values) const {
    for (int64_t w = 0; w * 64 < count; ++w) {
      for (uint64_t word = words[tile * kWordsPerTile + w]; word; word &= word - 1) {
        const int64_t i = w * 64 + __builtin_ctzll(word);
        if (i < count) values[i] = value;
      }
    }
  }
};

// Arrays over the kept entries of a row, padding and duplicates left out.
template <class Real>
struct KeptEntries {
  int64_t count;
  int32_t* ids;
  Real* z;       // the student's logit, -inf beyond its vocabulary
  Real* log2_p;  // of the teacher at the loss's temperature
  Real* share;   // c_i / N of a sampled entry
  Real* g;
  IdSet set;
  bool legal;  // false where the teacher holds a NaN or +inf
};

// A row of exponentials and the arrays of kept entries in this thread's scratch memory.
template <class Real>
struct SparseScratch {
  Exponentials<Real> tail;  // of the entries off S, 0 on S
  KeptEntries<Real> kept;

  static SparseScratch of(const SparseDivergenceCall& call) {
    const int64_t vocab = call.dense.student_vocab,
                  widest = vocab > call.dense.teacher_vocab ? vocab : call.dense.teacher_vocab;
    const int64_t padded = (vocab + kTile - 1) / kTile * kTile, tiles = padded / kTile,
                  kept = (call.kept + 15) / 16 * 16;
    const int64_t words = IdSet::words_for(widest);
    char* data = static_cast<char*>(
        thread_scratch((padded + tiles + 4 * kept) * sizeof(Real) + words * sizeof(uint64_t) + kept * sizeof(int32_t)));
    SparseScratch s{};
    s.kept.set.words = reinterpret_cast<uint64_t*>(data);
    Real* real = reinterpret_cast<Real*>(s.kept.set.words + words);
    s.tail.values = real;
    s.kept.z = real + padded;
    s.kept.log2_p = s.kept.z + kept;
    s.kept.share = s.kept.log2_p + kept;
    s.kept.g = s.kept.share + kept;
    s.tail.tile_factor = s.kept.g + kept;
    s.kept.ids = reinterpret_cast<int32_t*>(s.tail.tile_factor + tiles);
    std::memset(s.kept.set.words, 0, words * sizeof(uint64_t));
    return s;
  }
};

template <class Real>
void divide_by_sum(Real* values, int64_t count) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += values[i];
  for (int64_t i = 0; i < count; ++i) values[i] = static_cast<Real>(values[i] / sum);
}

// Fills the arrays from row `row`. Of equal ids the first counts; a sampled entry needs a count and a probability.
template <class Real>
void collect_kept(const SparseDivergenceCall& call, int64_t row, const LogitRow<Real>& student,
                  KeptEntries<Real>& kept) {
  const int32_t* ids = call.ids + row * call.kept;
  const int32_t* counts = call.counts ? call.counts + row * call.kept : nullptr;
  const Real* logprobs = static_cast<const Real*>(call.logprobs) + row * call.kept;
  const double log_norm = static_cast<const Real*>(call.log_norm)[row];
  const double inverse_temperature = 1 / call.dense.options.temperature;
  kept.count = 0;
  kept.legal = std::isfinite(log_norm);
  for (int64_t k = 0; k < call.kept; ++k) {
    const int64_t id = ids[k], n = kept.count;
    if (id < 0 || id >= call.dense.teacher_vocab) continue;
    const double log2_p = (logprobs[k] * inverse_temperature - log_norm) * kLog2E;
    if (counts && (counts[k] <= 0 || exp2_fast(static_cast<Real>(log2_p)) == 0)) continue;
    if (!kept.set.insert(id)) continue;
    kept.legal = kept.legal && log2_p < std::numeric_limits<double>::infinity();
    Real buffer[1];
    kept.ids[n] = static_cast<int32_t>(id);
    kept.z[n] = id < student.vocab ? *student.tile(id, 1, buffer) : -std::numeric_limits<Real>::infinity();
    kept.log2_p[n] = static_cast<Real>(log2_p);
    kept.share[n] = counts ? static_cast<Real>(counts[k]) : Real(0);
    ++kept.count;
  }
  if (counts) divide_by_sum(kept.share, kept.count);
}

// Exponentials of the entries off S, 0 on S, relative to the largest of their tile and those before it, which
// `tile_factor` is left with.
template <class Real>
OnlineSum<Real> tail_exponentials(const LogitRow<Real>& student, Real scale, const IdSet& set, Exponentials<Real> out) {
  alignas(64) Real buffer[kTile];
  OnlineSum<Real> online{scale};
  for (int64_t start = 0; start < student.vocab; start += kTile) {
    const int64_t count = student.vocab - start < kTile ? student.vocab - start : kTile, tile = start / kTile;
    const Real* z = student.tile(start, count, buffer);
    if (set.meets(tile)) {
      if (z != buffer) std::memcpy(buffer, z, count * sizeof(Real));
      set.overwrite(tile, count, -std::numeric_limits<Real>::infinity(), buffer);
      z = buffer;
    }
    online.raise(tile_maximum(z, count), start);
    online.add(tile_exponentials<false>(z, count, online.reference, scale, out.values + start));
    out.tile_factor[tile] = online.reference;
  }
  return online;
}

template <class Real>
OnlineSum<Real> online_sum_of(const Real* z, int64_t total, Real scale) {
  OnlineSum<Real> online{scale};
  for (int64_t start = 0; start < total; start += kTile) {
    const int64_t count = total - start < kTile ? total - start : kTile;
    online.raise(tile_maximum(z + start, count), start);
    online.add({tile_exp_sum(z + start, count, online.reference, scale), 0, 0});
  }
  return online;
}

// The softmax statistics of the student: off S, on S, and of both together.
template <class Real>
struct SplitSoftmax {
  OnlineSum<Real> off, on, all;

  SplitSoftmax(OnlineSum<Real> off, OnlineSum<Real> on) : off(off), on(on), all(off) {
    all.raise(on.maximum, on.top_start);
    all.sum += on.sum * exp2_of(on, all);
  }

  // log2 of the student's mass off S, from its own exponentials: -inf where there are none, never the log of a
  // difference or of a sum that underflowed.
  double log2_tail() const {
    return std::log2(off.sum) + (double(off.reference) - double(all.reference)) * off.scale - std::log2(all.sum);
  }

 private:
  static double exp2_of(const OnlineSum<Real>& from, const OnlineSum<Real>& to) {
    return std::exp2((double(from.reference) - double(to.reference)) * from.scale);
  }
};

}  // namespace DISTILLM_ISA
}  // namespace distillm
