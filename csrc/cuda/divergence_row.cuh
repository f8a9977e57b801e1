// What the kernel of `divergence` computes for one row and for one chunk of entries, apart from walking over them.
#pragma once

#include <math_constants.h>

#include "../math/divergence.h"
#include "../math/row_layout.h"
#include "cluster_reduce.cuh"
#include "row_pair.cuh"

namespace distillm {

struct DivergenceArguments {
  const void* student;
  const void* teacher;
  void* gradient;  // may be the student itself; null when not asked for
  RowLayout student_rows, teacher_rows, gradient_rows;
  int32_t student_vocab, teacher_vocab;  // entries to use
  int32_t gradient_vocab;                // entries of a gradient row, those from student_vocab on are 0
  ElementType teacher_type;
  int32_t staged_turns,
      kept_turns;         // what dynamic shared memory has room for (row_pair.cuh), kept_turns <= staged_turns
  const int64_t* labels;  // null when absent, like the next three
  const float* weight;
  const float* alpha_rows;
  const float* cap;
  float* loss;
  float* metrics;  // [rows, 3], null when not asked for
  int64_t ignore_index;
  float alpha, beta, inverse_temperature, ce_weight;
  int32_t detach_mixture;
};

// Maps a logit to its base-2 log-probability, (z - reference) * scale - rest. The reference is the logarithm of the sum
// of exponentials, rounded, so that large logits, and the rest, which makes up for the rounding, keep all digits.
struct Softmax {
  float reference, scale, rest;

  __device__ static Softmax of(ShiftedSum s, float scale) {
    const uint32_t bits = __float_as_uint(s.sum);
    const float exponent = static_cast<float>(static_cast<int>(bits >> 23) - 127);
    const float log2_mantissa = log2f(__uint_as_float((bits & 0x007fffffu) | 0x3f800000u));
    const float shift = fminf(divide_fast(exponent + log2_mantissa, scale), FLT_MAX / 4);  // scale is 0 for T = inf
    const float reference = s.reference + shift;
    return {reference, scale, fmaf(s.reference - reference, scale, exponent) + log2_mantissa};
  }
  __device__ float log2_probability(float z) const { return fmaf(z - reference, scale, -rest); }
};

// The side inputs of a row.
struct RowInputs {
  float weight, cap;
  int64_t label;
  RowParameters<float> parameters;

  __device__ static RowInputs of(const DivergenceArguments& a, int64_t row) {
    return {a.weight ? a.weight[row] : 1.0f,
            a.cap ? a.cap[row] : CUDART_INF_F,
            a.labels ? a.labels[row] : 0,
            {a.alpha_rows ? a.alpha_rows[row] : a.alpha, a.beta, a.detach_mixture != 0}};
  }
  __device__ bool skipped(const DivergenceArguments& a) const {
    return weight == 0 || (a.labels && label == a.ignore_index);
  }
  __device__ bool legal(const DivergenceArguments& a) const {
    const bool label_legal = a.ce_weight == 0 || (label >= 0 && label < a.student_vocab);
    return weight == weight && cap == cap && label_legal;
  }
};

// The softmax of both sides, and of the student at T = 1 for the cross-entropy where T is another.
struct RowSoftmaxes {
  Softmax q, p, unit;
  bool legal;  // false for a side that is all -inf or holds a NaN or +inf
};

// Divisors below this count as this, which changes no term by more than that: the product of two of them and its
// reciprocal are then normal numbers.
constexpr float kSmallestDivisor = 2.168404344971009e-19f;  // 2^-62

// Calls use(functor) with the functor that a row's parameters choose, if the member leaves that open: a choice that is
// the same for a whole row is made once per chunk.
template <class Functor>
struct FunctorChoice {
  template <class Use>
  __device__ static void make(const Functor& functor, Use use) {
    use(functor);
  }
};

template <class Functor, class AtZero>
struct FunctorChoice<OrAtZero<Functor, AtZero, float>> {
  template <class Use>
  __device__ static void make(const OrAtZero<Functor, AtZero, float>& either, Use use) {
    if (either.alpha == 0) {
      use(either.at_zero);
    } else {
      use(either.functor);
    }
  }
};

// Two entries share a reciprocal: 1/x = y * 1/(xy), 1/y = x * 1/(xy). The special-function units, which make
// exponentials, logarithms and reciprocals, are a quarter as wide as would balance the arithmetic around them.
template <class Functor>
__device__ __forceinline__ void pair_of_terms(const Functor& functor, const Entry<float>& x, const Entry<float>& y,
                                              Term<float>& x_term, Term<float>& y_term) {
  if constexpr (Functor::kDivides) {
    const float x_divisor = functor.divisor(x), y_divisor = functor.divisor(y);
    const float x_normal = at_least(x_divisor, kSmallestDivisor), y_normal = at_least(y_divisor, kSmallestDivisor);
    const float inverse = reciprocal_fast(x_normal * y_normal);
    x_term = functor.term(x, x_divisor, inverse * y_normal);
    y_term = functor.term(y, y_divisor, inverse * x_normal);
  } else {
    x_term = functor(x);
    y_term = functor(y);
  }
}

// The logits of entries -> their Entry -> the divergence's Term. TeacherLogits: of divergence_members.cuh.
template <class Functor, class TeacherLogits>
struct EntryTerms {
  Softmax q, p;  // p: of the teacher's logits as TeacherLogits has them
  Functor functor;
  TeacherLogits teacher;

  __device__ Entry<float> entry(float student_logit, float teacher_logit) const {
    const float log2_q = q.log2_probability(student_logit), log2_p = p.log2_probability(teacher_logit);
    return {log2_p, log2_q, exp2_fast(log2_p), exp2_fast(log2_q)};
  }

  // Adds the values of a chunk's terms to `value`; G of every entry. Spends the teacher's logits.
  template <int N>
  __device__ void chunk(const float (&student_logits)[N], float (&teacher_logits)[N], float& value,
                        float (&g)[N]) const {
    teacher.replace(student_logits, teacher_logits);
    FunctorChoice<Functor>::make(functor, [&](const auto& chosen) {
#pragma unroll
      for (int i = 0; i < N; i += 2) {
        Term<float> x, y;
        pair_of_terms(chosen, entry(student_logits[i], teacher_logits[i]),
                      entry(student_logits[i + 1], teacher_logits[i + 1]), x, y);
        value += x.value;
        value += y.value;
        g[i] = x.g, g[i + 1] = y.g;
      }
    });
  }
};

struct RowLoss {
  float value;
  bool constant;  // a capped or infinite divergence: it has no gradient, and G may be infinite

  __device__ static RowLoss of(const DivergenceArguments& a, const RowInputs& in, float divergence,
                               float cross_entropy) {
    const bool capped = divergence > in.cap, infinite = divergence == CUDART_INF_F;
    const float uncapped = a.ce_weight != 0 ? a.ce_weight * cross_entropy : 0.0f;
    return {in.weight * ((capped ? in.cap : divergence) + uncapped), capped || infinite};
  }
};

// gradient_v = g_scale G_v + q_scale q_v + unit_scale * (softmax of the student at T = 1); at the label less
// label_scale.
//
// The cross-entropy's own G is -1 at the label and 0 elsewhere: at T = 1 it shifts q_scale and one entry, at another
// temperature it needs the softmax of its own.
struct GradientTerms {
  Softmax q, unit;
  float g_scale, q_scale, unit_scale, label_scale;
  int label;

  __device__ static GradientTerms of(const DivergenceArguments& a, const RowInputs& in, const RowSoftmaxes& softmaxes,
                                     float sum_g, bool constant) {
    const float g_scale = in.weight * a.inverse_temperature, label_scale = in.weight * a.ce_weight;
    const bool own_unit = a.inverse_temperature != 1;
    const float q_scale = (constant ? 0.0f : -g_scale * sum_g) + (own_unit ? 0.0f : label_scale);
    const int label = a.ce_weight != 0 ? static_cast<int>(in.label) : INT32_MIN;
    return {softmaxes.q, softmaxes.unit, g_scale, q_scale, own_unit ? label_scale : 0.0f, label_scale, label};
  }

  // Conditions of the row are tested per chunk, not per entry.
  template <int N>
  __device__ void chunk(int first, const float (&student_logits)[N], const float (&g)[N], float (&out)[N]) const {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      out[i] = fmaf(g_scale, g[i], q_scale * exp2_fast(q.log2_probability(student_logits[i])));
    }
    if (unit_scale != 0) {
#pragma unroll
      for (int i = 0; i < N; ++i) out[i] += unit_scale * exp2_fast(unit.log2_probability(student_logits[i]));
    }
    if (static_cast<unsigned>(label - first) < N) {
#pragma unroll
      for (int i = 0; i < N; ++i) out[i] -= first + i == label ? label_scale : 0.0f;
    }
  }
};

}  // namespace distillm
