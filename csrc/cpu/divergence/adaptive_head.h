// adaptive_kl: which entries are the teacher's head, and how far the sides are apart on it.
//
// The head is what comes before the first entry, in the order of row_selection.h, up to which the teacher's mass
// exceeds mu; or the top entry, where that is the one. Masses are integers; those of floats have the same bits
// on every instruction set. Two walks over the row: its mass; the entries that are not too light for the boundary,
// among which it is searched.
#pragma once

#include "../../math/row_divergence.h"
#include "../row/entry_weights.h"
#include "../row/exponentials.h"
#include "../row/row_selection.h"

namespace distillm {
inline namespace DISTILLM_ISA {

// The masses of a row stay below 2^64 together, however long it is.
template <class Real>
Weighing<Real> weighing_of(const Softmax<Real>& softmax, int64_t vocab) {
  Real lowered = 0;
  while (vocab >> static_cast<int>(lowered) >= int64_t{1} << 20) ++lowered;
  return {softmax.maximum, softmax.scale, lowered};
}

template <class Real>
uint64_t row_mass(const LogitRow<Real>& row, Weighing<Real> by) {
  alignas(64) Real buffer[kTile];
  uint64_t total = 0;
  for (int64_t start = 0; start < row.vocab; start += kTile) {
    const int64_t count = row.vocab - start < kTile ? row.vocab - start : kTile;
    const Real* z = row.tile(start, count, buffer);
    for (int64_t i = 0; i < count; i += kMassTile) {
      total += mass_of(tile_weight(z + i, count - i < kMassTile ? count - i : kMassTile, by));
    }
  }
  return total;
}

// Entries that may be at the boundary, by ascending id, and what the search among them needs.
template <class Real>
struct HeadCandidates {
  Real *logits, *weights;
  int32_t* ids;
  SelectionScratch<Real> selection;
  int64_t count;

  static int64_t bytes(int64_t vocab) { return vocab * static_cast<int64_t>(3 * sizeof(Real) + 2 * sizeof(int32_t)); }

  static HeadCandidates in(void* memory, int64_t vocab) {
    Real* const logits = static_cast<Real*>(memory);
    int32_t* const ids = reinterpret_cast<int32_t*>(logits + 3 * vocab);
    auto* const keys = reinterpret_cast<typename SelectionScratch<Real>::Key*>(logits + 2 * vocab);
    return {logits, logits + vocab, ids, {keys, ids + vocab}, 0};
  }
};

// Appends the entries of the row from `bound` on, and weighs them. Whole pieces below it are passed over.
template <class Real>
void gather(const LogitRow<Real>& row, Real bound, Weighing<Real> by, HeadCandidates<Real>& to) {
  constexpr int64_t kPiece = 64;
  alignas(64) Real buffer[kTile];
  for (int64_t start = 0; start < row.vocab; start += kTile) {
    const int64_t count = row.vocab - start < kTile ? row.vocab - start : kTile;
    const Real* z = row.tile(start, count, buffer);
    for (int64_t piece = 0; piece < count; piece += kPiece) {
      const int64_t end = count - piece < kPiece ? count : piece + kPiece;
      if (tile_maximum(z + piece, end - piece) < bound) continue;
      for (int64_t i = piece; i < end; ++i) {
        to.logits[to.count] = z[i];
        to.ids[to.count] = static_cast<int32_t>(start + i);
        to.count += z[i] >= bound;
      }
    }
  }
  weigh(to.logits, to.count, by, to.weights);
}

// The threshold that selects the head, its `last` an id.
template <class Real>
Threshold<Real> head_threshold(const LogitRow<Real>& row, const Softmax<Real>& softmax, double mu,
                               HeadCandidates<Real> candidates) {
  const Threshold<Real> everything{kMinusInfinity<Real>, INT32_MAX};
  if (!(mu < 1)) return everything;
  const Weighing<Real> by = weighing_of(softmax, row.vocab);
  const uint64_t total = row_mass(row, by), most = static_cast<uint64_t>(mu * static_cast<double>(total));
  if (most >= total) return everything;
  // All entries lighter than that weigh less than the rest together: the boundary is none of them.
  const double lightest = static_cast<double>(total - most) / kMassUnits / static_cast<double>(row.vocab);
  gather(row, logit_below(lightest, by), by, candidates);
  const MassMeasure<Real> mass{candidates.weights};
  const Threshold<Real> boundary =
      find_threshold(candidates.logits, candidates.count, mass, most + 1, candidates.selection);
  const bool top = most < mass_of(exp2_portable(-by.lowered));
  return {boundary.value, candidates.ids[boundary.last] - (top ? 0 : 1)};
}

// sum |p - q| over head and tail.
template <class Real>
struct HeadDistance {
  Real head, tail;
};

// Over a stretch whose ids are all up to last_id (kTiesInside), or all beyond it.
template <bool kTiesInside, class Real>
HeadDistance<Real> stretch_distance(const Real* q, Real q_factor, const Real* p, Real p_factor, const Real* z,
                                    Real boundary, int64_t count) {
  Real head = 0, tail = 0;
#pragma omp simd reduction(+ : head, tail)
  for (int64_t i = 0; i < count; ++i) {
    const Real q_i = q[i] * q_factor, p_i = p[i] * p_factor;
    const Real distance = q_i > p_i ? q_i - p_i : p_i - q_i;
    const Real tie = z[i] == boundary ? (kTiesInside ? distance : Real(0)) : Real(0);
    const Real above = z[i] > boundary ? distance : tie;
    head += above;
    tail += distance - above;
  }
  return {head, tail};
}

template <class Real>
HeadDistance<double> head_distance(const LogitRow<Real>& teacher, int64_t vocab, const Exponentials<Real>& p,
                                   const Exponentials<Real>& q, Threshold<Real> head) {
  alignas(64) Real buffer[kTile];
  HeadDistance<double> sum{0, 0};
  for (int64_t start = 0; start < vocab; start += kTile) {
    const int64_t count = vocab - start < kTile ? vocab - start : kTile, tile = start / kTile;
    const int64_t up_to_last = head.last + 1 - start;
    const int64_t cut = up_to_last < 0 ? 0 : up_to_last < count ? up_to_last : count;
    const Real *e_q = q.values + start, *e_p = p.values + start;
    const Real q_factor = q.tile_factor[tile], p_factor = p.tile_factor[tile];
    const Real* z = teacher.tile(start, count, buffer);
    const auto with_ties = stretch_distance<true>(e_q, q_factor, e_p, p_factor, z, head.value, cut);
    const auto without =
        stretch_distance<false>(e_q + cut, q_factor, e_p + cut, p_factor, z + cut, head.value, count - cut);
    sum.head += static_cast<double>(with_ties.head) + static_cast<double>(without.head);
    sum.tail += static_cast<double>(with_ties.tail) + static_cast<double>(without.tail);
  }
  return sum;
}

}  // namespace DISTILLM_ISA
}  // namespace distillm
