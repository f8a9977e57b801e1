// Divergence of log-probabilities and its gradient for a range of rows on one thread. Included once per instruction
// set, by row_kernel_list.h.
//
// One pass: an entry's gradient depends on that entry alone (math/logprob_divergence.h), so that nothing of a row is
// kept and both sides are read once.
#pragma once

#include <cstring>

#include "../../math/logprob_divergence.h"
#include "../instruction_sets/row_kernels.h"
#include "../row/tiles.h"

namespace distillm {
inline namespace DISTILLM_ISA {

// The sum of one tile's values, and its gradient where there is an `out`.
template <bool kGradient, class Real, class Terms>
Real logprob_tile(Terms terms, const Real* x, const Real* y, int64_t count, Real weight, Real* out) {
  Real value = 0;
#pragma omp simd reduction(+ : value)
  for (int64_t i = 0; i < count; ++i) {
    const Real x_i = x[i], y_i = y[i];
    value += terms.value(x_i, y_i);
    if constexpr (kGradient) out[i] = weight * terms.g(x_i, y_i);
  }
  return value;
}

template <class Real>
struct LogprobRow {
  LogitRow<Real> student, teacher;
  Real weight;
  const OutputRow<Real>* output;  // null when the gradient is not asked for

  template <class Terms>
  Real loss(Terms terms) const {
    alignas(64) Real student_buffer[kTile], teacher_buffer[kTile], gradient[kTile];
    double sum = 0;
    for (int64_t start = 0; start < student.vocab; start += kTile) {
      const int64_t count = student.vocab - start < kTile ? student.vocab - start : kTile;
      const Real* x = student.tile(start, count, student_buffer);
      const Real* y = teacher.tile(start, count, teacher_buffer);
      if (!output) {
        sum += logprob_tile<false, Real>(terms, x, y, count, weight, nullptr);
        continue;
      }
      Real* out = output->tile(start, gradient);
      sum += logprob_tile<true, Real>(terms, x, y, count, weight, out);
      output->commit(start, count, out);
    }
    return weight * static_cast<Real>(sum);
  }
};

template <class Real, class Terms>
void logprob_divergence_rows(const LogprobDivergenceCall& call, int64_t begin, int64_t end) {
  const Terms terms(static_cast<Real>(call.beta), static_cast<Real>(call.floor));
  const auto row_of = [&](const void* data, ScalarType type, int64_t offset) {
    return LogitRow<Real>{static_cast<const char*>(data) + offset * bytes_of(type), type, call.vocab};
  };
  for (int64_t row = begin; row < end; ++row) {
    const Real weight = call.weight ? static_cast<const Real*>(call.weight)[row] : Real(1);
    char* gradient = static_cast<char*>(call.gradient);
    if (gradient) gradient += row * call.vocab * bytes_of(call.student_type);
    const OutputRow<Real> output{gradient, call.student_type};
    Real& loss = static_cast<Real*>(call.loss)[row];
    if (weight == 0) {
      loss = 0;
      if (gradient) fill_row(output, 0, call.vocab, Real(0));
      continue;
    }
    loss = LogprobRow<Real>{row_of(call.student, call.student_type, call.student_rows.offset(row)),
                            row_of(call.teacher, call.teacher_type, call.teacher_rows.offset(row)), weight,
                            gradient ? &output : nullptr}
               .loss(terms);
  }
}

// The kernel for a divergence's name, or null.
inline LogprobDivergenceRows find_logprob_divergence_rows(const char* name, bool probabilities, bool float64) {
#define DISTILLM_MATCH(known_name, Functor, kProbabilities)                                                 \
  if (!strcmp(name, known_name) && probabilities == kProbabilities) {                                       \
    return float64 ? logprob_divergence_rows<double, LogprobTerms<double, Functor<double>, kProbabilities>> \
                   : logprob_divergence_rows<float, LogprobTerms<float, Functor<float>, kProbabilities>>;   \
  }
  DISTILLM_FOR_EACH_LOGPROB_DIVERGENCE(DISTILLM_MATCH)
#undef DISTILLM_MATCH
  return nullptr;
}

}  // namespace DISTILLM_ISA
}  // namespace distillm
