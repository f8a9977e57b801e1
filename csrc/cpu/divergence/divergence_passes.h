// The passes over one row that `divergence_rows.h` is made of.
#pragma once

#include <cstring>

#include "../../math/divergence.h"
#include "../row/exponentials.h"

namespace distillm {
inline namespace DISTILLM_ISA {

// Exponentials and logits of one entry -> its Entry -> the divergence's Term.
//
// The simd loops hold this by value (behind a reference the compiler would have to assume that what is being written
// overlaps these constants) and see only scalars (a struct declared inside such a loop becomes an array over the lanes,
// and the loop stays scalar). What value() and g() have in common is computed once, after inlining.
template <class Real, class Functor>
struct EntryTerm {
  Softmax<Real> q_softmax, p_softmax;
  Functor functor;

  DISTILLM_HD Real value(Real q, Real p, Real zs, Real zt) const { return functor(entry(q, p, zs, zt)).value; }
  DISTILLM_HD Real g(Real q, Real p, Real zs, Real zt) const { return functor(entry(q, p, zs, zt)).g; }

 private:
  DISTILLM_HD Entry<Real> entry(Real q, Real p, Real zs, Real zt) const {
    return {p_softmax.log2_probability(zt), q_softmax.log2_probability(zs), p, q};
  }
};

// Pass 2 over one tile: value and sum of G, and with kGradient G in the place of the teacher's exponentials. A functor
// that needs no logarithms is given the exponentials for logits and does not look at them.
template <bool kGradient, class Real, class Functor>
Term<double> tile_terms(EntryTerm<Real, Functor> terms, const Real* q, Real q_factor, Real* p, Real p_factor,
                        const Real* zs, const Real* zt, int64_t count) {
  Real value = 0, g = 0;
#pragma omp simd reduction(+ : value, g)
  for (int64_t i = 0; i < count; ++i) {
    const Real q_i = q[i] * q_factor, p_i = p[i] * p_factor;
    value += terms.value(q_i, p_i, zs[i], zt[i]);
    if constexpr (kGradient) {
      const Real g_i = terms.g(q_i, p_i, zs[i], zt[i]);
      g += g_i;
      p[i] = g_i;
    }
  }
  return {value, g};
}

// What the passes over one row share.
template <class Real, class Functor, class TeacherRow>
struct RowPass {
  LogitRow<Real> student;
  TeacherRow teacher;
  Exponentials<Real> q, p;
  EntryTerm<Real, Functor> terms;

  template <bool kGradient>
  Term<double> sums() const {
    alignas(64) Real student_buffer[kTile], teacher_buffer[kTile];
    Term<double> total{0, 0};
    const int64_t vocab = student.vocab > teacher.vocab ? student.vocab : teacher.vocab;
    for (int64_t start = 0; start < vocab; start += kTile) {
      const int64_t count = vocab - start < kTile ? vocab - start : kTile, tile = start / kTile;
      Real *e_student = q.values + start, *e_teacher = p.values + start;
      const Real *zs = e_student, *zt = e_student;
      if constexpr (Functor::kNeedsLogs) {
        zs = student.tile(start, count, student_buffer);
        zt = teacher.tile(start, count, teacher_buffer);
      }
      const Term<double> here =
          tile_terms<kGradient>(terms, e_student, q.tile_factor[tile], e_teacher, p.tile_factor[tile], zs, zt, count);
      total.value += here.value;
      total.g += here.g;
    }
    return total;
  }
};

// The cross-entropy with the label at T = 1 that rides along. Its G is -1 at the label and 0 elsewhere, so at T = 1 it
// only shifts the sum of G and one entry; at any other T it needs a softmax of its own.
template <class Real>
struct CrossEntropy {
  Real weight;  // 0: absent
  int64_t label;
  Softmax<Real> softmax;
  bool own_softmax;
};

// gradient_v = g G_v + q q_v + ce softmax_v at T = 1 (the last only where the cross-entropy has a softmax of its own).
template <class Real>
struct GradientFactors {
  Real g, q, ce;
};

// Pass 3 over one tile; `g` null stands for zeros.
template <class Real>
void gradient_tile(const Real* g, const Real* q, int64_t count, GradientFactors<Real> factors, Real* out) {
  if (!g) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) out[i] = factors.q * q[i];
    return;
  }
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = factors.g * g[i] + factors.q * q[i];
}

template <class Real>
void add_softmax_tile(const Real* z, int64_t count, Softmax<Real> softmax, Real factor, Real* out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] += factor * exp2_fast(softmax.log2_probability(z[i]));
}

template <class Real>
struct GradientPass {
  LogitRow<Real> student;
  Exponentials<Real> q;
  const Real* g;
  CrossEntropy<Real> ce;
  GradientFactors<Real> factors;

  void write(const OutputRow<Real>& output) const {
    alignas(64) Real logits[kTile], kept_logits[kTile], gradient[kTile];
    for (int64_t start = 0; start < student.vocab; start += kTile) {
      const int64_t count = student.vocab - start < kTile ? student.vocab - start : kTile;
      Real* out = output.tile(start, gradient);
      const Real* z = ce.own_softmax ? student.tile(start, count, logits) : nullptr;
      if (z == out) z = static_cast<const Real*>(std::memcpy(kept_logits, z, count * sizeof(Real)));
      const GradientFactors<Real> here{factors.g, factors.q * q.tile_factor[start / kTile], factors.ce};
      gradient_tile(g ? g + start : nullptr, q.values + start, count, here, out);
      if (z) add_softmax_tile(z, count, ce.softmax, factors.ce, out);
      if (ce.weight != 0 && ce.label >= start && ce.label < start + count) out[ce.label - start] -= factors.ce;
      output.commit(start, count, out);
    }
  }
};

}  // namespace DISTILLM_ISA
}  // namespace distillm
