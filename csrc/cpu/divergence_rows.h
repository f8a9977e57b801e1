// Divergence and gradient of a range of rows on one thread. Included once per instruction set, by divergence_<set>.cpp.
//
// Three passes over a row, tile by tile:
//   1. both sides: exponentials relative to the largest logit so far, kept in scratch, and their sums (online softmax);
//   2. value and sum of G: probabilities are exponentials times one factor per tile; G takes the teacher's place in
//   scratch;
//   3. gradient: (1) of math/divergence.h from G and the student's exponentials, written once.
// The logits come from memory once. Scratch is two rows of the arithmetic type per thread; it replaces the logits in
// the cache, and no exponential, logarithm or division is computed twice.
#pragma once

#include <cstring>
#include <utility>

#include "../math/divergence.h"
#include "../ops/divergence.h"
#include "divergence.h"
#include "exponentials.h"

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
template <class Real, class Functor>
struct RowPass {
  LogitRow<Real> student, teacher;
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

template <class Real>
Real entry_or(const void* values, int64_t row, double fallback) {
  return values ? static_cast<const Real*>(values)[row] : static_cast<Real>(fallback);
}

template <class Real>
LogitRow<Real> logit_row(const void* data, ScalarType type, int64_t row, int64_t stride, int64_t vocab) {
  return {static_cast<const char*>(data) + row * stride * bytes_of(type), type, vocab};
}

template <class Real>
CrossEntropy<Real> cross_entropy_of(const DivergenceCall& call, int64_t row, const LogitRow<Real>& student,
                                    const Softmax<Real>& q) {
  const Real weight = static_cast<Real>(call.options.ce_weight);
  if (weight == 0) return {0, 0, q, false};
  const bool own = call.options.temperature != 1;
  return {weight, call.labels[row], own ? softmax_of(student, static_cast<Real>(kLog2E)) : q, own};
}

// Cross-entropy in nats, NaN for a label outside the vocabulary.
template <class Real>
Real cross_entropy_value(const CrossEntropy<Real>& ce, const LogitRow<Real>& student) {
  if (ce.weight == 0) return 0;
  if (ce.label < 0 || ce.label >= student.vocab) return std::numeric_limits<Real>::quiet_NaN();
  Real buffer[1];
  const Real z = *student.tile(ce.label, 1, buffer);
  return -ce.softmax.log2_probability(z) * static_cast<Real>(kLn2);
}

// Two rows of exponentials and their tile factors in this thread's scratch memory.
template <class Real>
std::pair<Exponentials<Real>, Exponentials<Real>> scratch_rows(int64_t vocab) {
  constexpr int64_t kAlign = 64 / sizeof(Real);
  const int64_t padded = (vocab + kAlign - 1) / kAlign * kAlign, tiles = (vocab + kTile - 1) / kTile;
  Real* data = static_cast<Real*>(thread_scratch(2 * (padded + tiles) * sizeof(Real)));
  return {{data, data + 2 * padded}, {data + padded, data + 2 * padded + tiles}};
}

// One row as the kernel sees it.
template <class Real>
struct RowInputs {
  LogitRow<Real> student, teacher;
  Real weight, cap;
  RowParameters<Real> parameters;
};

template <class Real>
RowInputs<Real> row_inputs(const DivergenceCall& call, int64_t row) {
  return {logit_row<Real>(call.student, call.student_type, row, call.student_stride, call.student_vocab),
          logit_row<Real>(call.teacher, call.teacher_type, row, call.teacher_stride, call.teacher_vocab),
          entry_or<Real>(call.weight, row, 1),
          entry_or<Real>(call.cap, row, std::numeric_limits<double>::infinity()),
          {entry_or<Real>(call.alpha, row, call.options.alpha), static_cast<Real>(call.options.beta),
           call.options.detach_mixture}};
}

template <class Real>
void write_gradient(const DivergenceCall& call, const RowInputs<Real>& in, Exponentials<Real> q, const Real* g,
                    const CrossEntropy<Real>& ce, Real sum_g, const OutputRow<Real>& output) {
  const Real g_scale = in.weight / static_cast<Real>(call.options.temperature);
  const Real ce_scale = in.weight * ce.weight;
  const Real q_scale = (g ? -g_scale * sum_g : Real(0)) + (ce.own_softmax ? Real(0) : ce_scale);
  GradientPass<Real>{in.student, q, g, ce, {g_scale, q_scale, ce_scale}}.write(output);
}

// One row that is not left out: returns its loss and writes its gradient when `output` is there.
template <class Real, class Functor>
Real divergence_row(const DivergenceCall& call, int64_t index, const RowInputs<Real>& in,
                    const OutputRow<Real>* output) {
  constexpr Real kInfinity = std::numeric_limits<Real>::infinity();
  const int64_t vocab = in.student.vocab > in.teacher.vocab ? in.student.vocab : in.teacher.vocab;
  const auto [q, p] = scratch_rows<Real>(vocab);
  const Real scale = static_cast<Real>(kLog2E / call.options.temperature);
  const Softmax<Real> q_softmax = exponentials_of(in.student, vocab, scale, q);
  const Softmax<Real> p_softmax = exponentials_of(in.teacher, vocab, scale, p);
  const RowPass<Real, Functor> row{in.student, in.teacher, q, p, {q_softmax, p_softmax, Functor(in.parameters)}};
  const CrossEntropy<Real> ce = cross_entropy_of(call, index, in.student, q_softmax);
  const Term<double> sums = output ? row.template sums<true>() : row.template sums<false>();
  const Real divergence = static_cast<Real>(sums.value);
  const bool capped = divergence > in.cap;
  Real loss = in.weight * ((capped ? in.cap : divergence) + ce.weight * cross_entropy_value(ce, in.student));
  const bool usable = q_softmax.usable() && p_softmax.usable() && Functor::legal(in.parameters) && in.cap == in.cap;
  if (!usable) loss = std::numeric_limits<Real>::quiet_NaN();
  if (!output) return loss;
  // An infinite divergence has no gradient to follow, a capped one none by definition.
  const bool constant = capped || divergence == kInfinity;
  if (loss != loss || (constant && ce.weight == 0)) {
    fill_row(*output, in.student.vocab, loss != loss ? loss : Real(0));
  } else {
    write_gradient(call, in, q, constant ? nullptr : p.values, ce, static_cast<Real>(sums.g), *output);
  }
  return loss;
}

// AtZero: the divergence that Functor is where its alpha is 0.
template <class Real, class Functor, class AtZero>
void divergence_rows(const DivergenceCall& call, int64_t begin, int64_t end) {
  Real* loss = static_cast<Real*>(call.loss);
  const int64_t row_bytes = call.student_vocab * bytes_of(call.student_type);
  for (int64_t row = begin; row < end; ++row) {
    const OutputRow<Real> target{static_cast<char*>(call.gradient) + row * row_bytes, call.student_type};
    const OutputRow<Real>* output = call.gradient ? &target : nullptr;
    const RowInputs<Real> in = row_inputs<Real>(call, row);
    if (in.weight == 0 || (call.labels && call.labels[row] == call.options.ignore_index)) {
      loss[row] = 0;
      if (output) fill_row(*output, call.student_vocab, Real(0));
    } else {
      const auto one_row = in.parameters.alpha == 0 ? divergence_row<Real, AtZero> : divergence_row<Real, Functor>;
      loss[row] = one_row(call, row, in, output);
    }
  }
}

// The kernel for a divergence's public name, or null.
inline DivergenceRows find_divergence_rows(const char* name, bool float64) {
#define DISTILLM_MATCH(public_name, Functor, AtZero, Any)                     \
  if (!strcmp(name, public_name)) {                                           \
    return float64 ? divergence_rows<double, Functor<double>, AtZero<double>> \
                   : divergence_rows<float, Functor<float>, AtZero<float>>;   \
  }
  DISTILLM_FOR_EACH_DIVERGENCE(DISTILLM_MATCH)
#undef DISTILLM_MATCH
  return nullptr;
}

}  // namespace DISTILLM_ISA
}  // namespace distillm
