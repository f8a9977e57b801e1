// Divergence and gradient of a range of rows on one thread. Included once per instruction set, by divergence_<set>.cpp.
//
// A row is read three times, from memory once and from the cache twice:
//   1. statistics: maximum and sum of exponentials of both sides, tile by tile (online softmax);
//   2. value and sum of G: Entry -> functor -> Term;
//   3. gradient: the terms again, combined by (1) of math/divergence.h, written once.
// Probabilities are recomputed rather than kept: an exponential costs less than a second row-sized buffer in the cache.
#pragma once

#include <cstring>

#include "../math/divergence.h"
#include "../ops/divergence.h"
#include "divergence.h"
#include "tiles.h"

namespace distillm {
inline namespace DISTILLM_ISA {

// Maps a logit to its base-2 log-probability. The maximum is subtracted before scaling, which keeps all digits of large
// logits.
template <class Real>
struct Softmax {
  Real maximum;
  Real scale;     // log2(e) / T
  Real log2_sum;  // NaN for a row that is all -inf or holds a NaN or +inf

  bool usable() const { return log2_sum == log2_sum; }

  DISTILLM_HD Real log2_probability(Real z) const { return (z - maximum) * scale - log2_sum; }
};

template <class Real>
Real tile_maximum(const Real* z, int64_t count) {
  Real maximum = -std::numeric_limits<Real>::infinity();
#pragma omp simd reduction(max : maximum)
  for (int64_t i = 0; i < count; ++i) maximum = z[i] > maximum ? z[i] : maximum;
  return maximum;
}

template <class Real>
Real tile_exp_sum(const Real* z, int64_t count, Real reference, Real scale) {
  Real sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += exp2_fast((z[i] - reference) * scale);
  return sum;
}

template <class Real>
Softmax<Real> softmax_of(const LogitRow<Real>& row, Real scale) {
  alignas(64) Real buffer[kTile];
  Real maximum = -std::numeric_limits<Real>::infinity();
  Real reference = std::numeric_limits<Real>::lowest();  // finite: a masked tile adds 0, not NaN
  double sum = 0;
  for (int64_t start = 0; start < row.vocab; start += kTile) {
    const int64_t count = row.vocab - start < kTile ? row.vocab - start : kTile;
    const Real* z = row.tile(start, count, buffer);
    const Real here = tile_maximum(z, count);
    if (here > maximum) {
      maximum = here;
      const Real raised = at_least(here, std::numeric_limits<Real>::lowest());
      sum *= exp2_fast((reference - raised) * scale);
      reference = raised;
    }
    sum += tile_exp_sum(z, count, reference, scale);
  }
  const bool usable = maximum > -std::numeric_limits<Real>::infinity() && sum == sum;
  return {reference, scale, usable ? static_cast<Real>(std::log2(sum)) : std::numeric_limits<Real>::quiet_NaN()};
}

// The logits of one entry -> its Entry -> the divergence's Term.
//
// The simd loops below hold this by value (behind a reference the compiler would have to assume that the gradient being
// written overlaps these constants) and see only scalars (a struct declared inside such a loop becomes an array over
// the lanes, and the loop stays scalar). What value() and g() have in common is computed once, after inlining.
template <class Real, class Functor>
struct EntryTerm {
  Softmax<Real> q, p;
  Functor functor;

  DISTILLM_HD Real student_probability(Real zs) const { return exp2_fast(q.log2_probability(zs)); }
  DISTILLM_HD Real value(Real zs, Real zt) const { return functor(entry(zs, zt)).value; }
  DISTILLM_HD Real g(Real zs, Real zt) const { return functor(entry(zs, zt)).g; }

 private:
  DISTILLM_HD Entry<Real> entry(Real zs, Real zt) const {
    const Real log2_q = q.log2_probability(zs);
    const Real log2_p = p.log2_probability(zt);
    return {log2_p, log2_q, exp2_fast(log2_p), exp2_fast(log2_q)};
  }
};

// What the passes over one row share.
template <class Real, class Functor>
struct RowPass {
  LogitRow<Real> student, teacher;
  EntryTerm<Real, Functor> terms;

  Term<double> sums() const {
    alignas(64) Real student_buffer[kTile], teacher_buffer[kTile];
    const EntryTerm<Real, Functor> local = terms;
    Term<double> total{0, 0};
    const int64_t vocab = student.vocab > teacher.vocab ? student.vocab : teacher.vocab;
    for (int64_t start = 0; start < vocab; start += kTile) {
      const int64_t count = vocab - start < kTile ? vocab - start : kTile;
      const Real* zs = student.tile(start, count, student_buffer);
      const Real* zt = teacher.tile(start, count, teacher_buffer);
      Real value = 0, g = 0;
#pragma omp simd reduction(+ : value, g)
      for (int64_t i = 0; i < count; ++i) {
        value += local.value(zs[i], zt[i]);
        g += local.g(zs[i], zt[i]);
      }
      total.value += value;
      total.g += g;
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

template <bool kOwnSoftmax, class Real, class Functor>
void gradient_tile(const Real* zs, const Real* zt, int64_t count, EntryTerm<Real, Functor> terms, Softmax<Real> unit,
                   GradientFactors<Real> factors, Real* out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    Real gradient = factors.g * terms.g(zs[i], zt[i]) + factors.q * terms.student_probability(zs[i]);
    if constexpr (kOwnSoftmax) gradient += factors.ce * exp2_fast(unit.log2_probability(zs[i]));
    out[i] = gradient;
  }
}

template <class Real, class Functor>
struct GradientPass {
  RowPass<Real, Functor> row;
  CrossEntropy<Real> ce;
  GradientFactors<Real> factors;

  void write(const OutputRow<Real>& output) const {
    alignas(64) Real student_buffer[kTile], teacher_buffer[kTile], gradient_buffer[kTile];
    const int64_t vocab = row.student.vocab;
    for (int64_t start = 0; start < vocab; start += kTile) {
      const int64_t count = vocab - start < kTile ? vocab - start : kTile;
      const Real* zs = row.student.tile(start, count, student_buffer);
      const Real* zt = row.teacher.tile(start, count, teacher_buffer);
      Real* out = output.tile(start, gradient_buffer);
      (ce.own_softmax ? gradient_tile<true, Real, Functor>
                      : gradient_tile<false, Real, Functor>)(zs, zt, count, row.terms, ce.softmax, factors, out);
      if (ce.weight != 0 && ce.label >= start && ce.label < start + count) out[ce.label - start] -= factors.ce;
      output.commit(start, count, out);
    }
  }
};

template <class Real>
void fill_row(const OutputRow<Real>& output, int64_t vocab, Real value) {
  alignas(64) Real buffer[kTile];
  for (int64_t start = 0; start < vocab; start += kTile) {
    const int64_t count = vocab - start < kTile ? vocab - start : kTile;
    Real* out = output.tile(start, buffer);
    for (int64_t i = 0; i < count; ++i) out[i] = value;
    output.commit(start, count, out);
  }
}

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

template <class Real, class Functor>
void write_gradient(const DivergenceCall& call, const RowPass<Real, Functor>& row, const CrossEntropy<Real>& ce,
                    Real weight, Real sum_g, const OutputRow<Real>& output) {
  const Real g_scale = weight / static_cast<Real>(call.options.temperature);
  const Real ce_scale = weight * ce.weight;
  const Real q_scale = -g_scale * sum_g + (ce.own_softmax ? Real(0) : ce_scale);
  GradientPass<Real, Functor>{row, ce, {g_scale, q_scale, ce_scale}}.write(output);
}

// A row whose divergence is infinite or capped: only the cross-entropy, if any, has a gradient.
template <class Real>
void write_constant_gradient(const LogitRow<Real>& student, const Softmax<Real>& q, const CrossEntropy<Real>& ce,
                             Real weight, const OutputRow<Real>& output) {
  if (ce.weight == 0) return fill_row(output, student.vocab, Real(0));
  const Real ce_scale = weight * ce.weight;
  const RowPass<Real, ForwardKl<Real>> finite{student, student, {q, q, ForwardKl<Real>({})}};
  GradientPass<Real, ForwardKl<Real>>{finite, ce, {0, ce.own_softmax ? Real(0) : ce_scale, ce_scale}}.write(output);
}

// One row: returns its loss and writes its gradient when `output` is there.
template <class Real, class Functor>
Real divergence_row(const DivergenceCall& call, int64_t index, const OutputRow<Real>* output) {
  constexpr Real kInfinity = std::numeric_limits<Real>::infinity();
  const Real weight = entry_or<Real>(call.weight, index, 1);
  if (weight == 0 || (call.labels && call.labels[index] == call.options.ignore_index)) {
    if (output) fill_row(*output, call.student_vocab, Real(0));
    return 0;
  }
  const RowParameters<Real> parameters{entry_or<Real>(call.alpha, index, call.options.alpha),
                                       call.options.detach_mixture};
  const auto student = logit_row<Real>(call.student, call.student_type, index, call.student_stride, call.student_vocab);
  const auto teacher = logit_row<Real>(call.teacher, call.teacher_type, index, call.teacher_stride, call.teacher_vocab);
  const Real scale = static_cast<Real>(kLog2E / call.options.temperature);
  const Softmax<Real> q = softmax_of(student, scale);
  const RowPass<Real, Functor> row{student, teacher, {q, softmax_of(teacher, scale), Functor(parameters)}};
  const CrossEntropy<Real> ce = cross_entropy_of(call, index, student, q);
  const Term<double> sums = row.sums();
  const Real divergence = static_cast<Real>(sums.value);
  const Real cap = entry_or<Real>(call.cap, index, kInfinity);
  const bool capped = divergence > cap;
  Real loss = weight * ((capped ? cap : divergence) + ce.weight * cross_entropy_value(ce, student));
  const bool usable = row.terms.q.usable() && row.terms.p.usable() && Functor::legal(parameters) && cap == cap;
  if (!usable) loss = std::numeric_limits<Real>::quiet_NaN();
  if (!output) return loss;
  if (loss != loss) {
    fill_row(*output, student.vocab, loss);
  } else if (capped || divergence == kInfinity) {
    write_constant_gradient(student, q, ce, weight, *output);
  } else {
    write_gradient(call, row, ce, weight, static_cast<Real>(sums.g), *output);
  }
  return loss;
}

template <class Real, class Functor>
void divergence_rows(const DivergenceCall& call, int64_t begin, int64_t end) {
  Real* loss = static_cast<Real*>(call.loss);
  const int64_t row_bytes = call.student_vocab * bytes_of(call.student_type);
  for (int64_t row = begin; row < end; ++row) {
    const OutputRow<Real> output{static_cast<char*>(call.gradient) + row * row_bytes, call.student_type};
    loss[row] = divergence_row<Real, Functor>(call, row, call.gradient ? &output : nullptr);
  }
}

// The kernel for a divergence's public name, or null.
inline DivergenceRows find_divergence_rows(const char* name, bool float64) {
#define DISTILLM_MATCH(public_name, Functor) \
  if (!strcmp(name, public_name))            \
    return float64 ? divergence_rows<double, Functor<double>> : divergence_rows<float, Functor<float>>;
  DISTILLM_FOR_EACH_DIVERGENCE(DISTILLM_MATCH)
#undef DISTILLM_MATCH
  return nullptr;
}

}  // namespace DISTILLM_ISA
}  // namespace distillm
