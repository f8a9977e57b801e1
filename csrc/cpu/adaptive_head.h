// adaptive_kl: which entries are the teacher's head, and how far the sides are apart on it.
//
// The head is a prefix of the entries ordered by descending logit, equal ones by ascending id. No sort: entries too
// light to be at the boundary are passed over by their exponentials, and among the others the boundary is found by a
// radix selection over ordered keys, kDigitBits at a time, with the mass of each digit in double.
#pragma once

#include "../math/row_divergence.h"
#include "exponentials.h"

namespace distillm {
inline namespace DISTILLM_ISA {

constexpr int kDigitBits = 11;
constexpr int kDigits = 1 << kDigitBits;

// The teacher's exponentials with the logits that they came from.
template <class Real>
struct MassRow {
  LogitRow<Real> row;
  Exponentials<Real> p;
  int64_t vocab;

  double mass(int32_t id) const { return static_cast<double>(p.values[id]) * p.tile_factor[id / kTile]; }
};

template <class Real>
struct KeyOf;
template <>
struct KeyOf<float> {
  using type = uint32_t;
};
template <>
struct KeyOf<double> {
  using type = uint64_t;
};

// Entries that may be at the boundary, in order of their ids, in scratch memory.
template <class Real>
struct HeadCandidates {
  using Key = typename KeyOf<Real>::type;
  Key* keys;
  int32_t* ids;
  int64_t count;

  static int64_t bytes(int64_t vocab) { return vocab * static_cast<int64_t>(sizeof(Key) + sizeof(int32_t)); }
};

// Head: logits above `logit`, and of those equal to it the ids up to `last_id`.
template <class Real>
struct HeadBoundary {
  Real logit;
  int32_t last_id;
};

template <class Real>
Real tile_sum(const Real* e, int64_t count) {
  Real sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += e[i];
  return sum;
}

template <class Real>
double total_mass(const MassRow<Real>& teacher) {
  double total = 0;
  for (int64_t start = 0; start < teacher.vocab; start += kTile) {
    const int64_t count = teacher.vocab - start < kTile ? teacher.vocab - start : kTile;
    total += static_cast<double>(tile_sum(teacher.p.values + start, count)) * teacher.p.tile_factor[start / kTile];
  }
  return total;
}

template <class Real>
int32_t tile_count_above(const Real* e, int64_t count, Real bound) {
  int32_t above = 0;
#pragma omp simd reduction(+ : above)
  for (int64_t i = 0; i < count; ++i) above += e[i] >= bound ? 1 : 0;
  return above;
}

// The entry at the boundary and all lighter ones hold more than `rest`, so it holds at least rest / vocab itself.
template <class Real>
void find_candidates(const MassRow<Real>& teacher, double rest, HeadCandidates<Real>& out) {
  alignas(64) Real buffer[kTile];
  const double lightest = rest / static_cast<double>(teacher.vocab) * (1 - 1e-4);
  out.count = 0;
  for (int64_t start = 0; start < teacher.vocab; start += kTile) {
    const int64_t count = teacher.vocab - start < kTile ? teacher.vocab - start : kTile;
    const Real* e = teacher.p.values + start;
    const Real bound = static_cast<Real>(lightest / static_cast<double>(teacher.p.tile_factor[start / kTile]));
    if (tile_count_above(e, count, bound) == 0) continue;
    const Real* z = teacher.row.tile(start, count, buffer);
    for (int64_t i = 0; i < count; ++i) {
      out.keys[out.count] = ordered_key(z[i]);
      out.ids[out.count] = static_cast<int32_t>(start + i);
      out.count += e[i] >= bound ? 1 : 0;
    }
  }
}

// One digit of the selection: keeps the candidates of the digit in which the mass passes `target`; `above`, the mass
// before them, grows. False when it never does.
template <class Real>
bool narrow(const MassRow<Real>& teacher, int shift, double target, double& above, HeadCandidates<Real>& kept) {
  double digit_mass[kDigits] = {};
  const auto digit_of = [&](int64_t i) { return static_cast<int>(kept.keys[i] >> shift) & (kDigits - 1); };
  for (int64_t i = 0; i < kept.count; ++i) digit_mass[digit_of(i)] += teacher.mass(kept.ids[i]);
  int digit = kDigits - 1;
  while (digit >= 0 && !(above + digit_mass[digit] > target)) above += digit_mass[digit--];
  if (digit < 0) return false;
  int64_t count = 0;
  for (int64_t i = 0; i < kept.count; ++i) {
    const bool here = digit_of(i) == digit;
    kept.keys[count] = kept.keys[i];
    kept.ids[count] = kept.ids[i];
    count += here ? 1 : 0;
  }
  kept.count = count;
  return true;
}

template <class Real>
HeadBoundary<Real> head_boundary(const MassRow<Real>& teacher, double mu, HeadCandidates<Real> candidates) {
  constexpr int kKeyBits = 8 * sizeof(typename HeadCandidates<Real>::Key);
  const HeadBoundary<Real> everything{kMinusInfinity<Real>, INT32_MAX};
  const double total = total_mass(teacher), target = mu * total;
  if (!(mu < 1)) return everything;
  find_candidates(teacher, total - target, candidates);
  double above = 0;
  for (int shift = kKeyBits - kDigitBits; shift > -kDigitBits; shift -= kDigitBits) {
    // The last digit overlaps the one before it, whose bits are all alike by then.
    if (!narrow(teacher, shift > 0 ? shift : 0, target, above, candidates)) return everything;
  }
  // Equal logits are left. The top token of the row belongs to the head whatever its mass.
  int64_t inside = above == 0 ? 1 : 0;
  double mass = above + (inside ? teacher.mass(candidates.ids[0]) : 0);
  while (inside < candidates.count && mass + teacher.mass(candidates.ids[inside]) <= target) {
    mass += teacher.mass(candidates.ids[inside++]);
  }
  Real buffer[1];
  return {*teacher.row.tile(candidates.ids[0], 1, buffer), inside > 0 ? candidates.ids[inside - 1] : -1};
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
HeadDistance<double> head_distance(const MassRow<Real>& teacher, const Exponentials<Real>& q,
                                   HeadBoundary<Real> boundary) {
  alignas(64) Real buffer[kTile];
  HeadDistance<double> sum{0, 0};
  for (int64_t start = 0; start < teacher.vocab; start += kTile) {
    const int64_t count = teacher.vocab - start < kTile ? teacher.vocab - start : kTile, tile = start / kTile;
    const int64_t up_to_last = boundary.last_id + int64_t(1) - start;
    const int64_t cut = up_to_last < 0 ? 0 : up_to_last < count ? up_to_last : count;
    const Real *e_q = q.values + start, *e_p = teacher.p.values + start;
    const Real q_factor = q.tile_factor[tile], p_factor = teacher.p.tile_factor[tile];
    const Real* z = teacher.row.tile(start, count, buffer);
    const auto with_ties = stretch_distance<true>(e_q, q_factor, e_p, p_factor, z, boundary.logit, cut);
    const auto without =
        stretch_distance<false>(e_q + cut, q_factor, e_p + cut, p_factor, z + cut, boundary.logit, count - cut);
    sum.head += static_cast<double>(with_ties.head) + static_cast<double>(without.head);
    sum.tail += static_cast<double>(with_ties.tail) + static_cast<double>(without.tail);
  }
  return sum;
}

}  // namespace DISTILLM_ISA
}  // namespace distillm
