// The terms of a divergence that is a functor of math/divergence.h, as the last two passes over a row ask for them.
//
// What the passes ask of any member is a class Terms with
//   Scratch                                     its static shared memory
//   legal(parameters)                           whether those of the row are
//   prepare(rows)                               between the first visit and the second, by every thread of the cluster
//   chunk(first, student, teacher, sum, kept)   logits of the chunk from entry first() on: adds to the row's sums; what
//                                               the gradient needs of every entry beside the student's logit
//   again(student, teacher, kept)               the same without the sums
//   publish(), share(cluster)                   the member's own reductions, along with those of `sum`
//   inexact(sum)                                of the row's sums: whether the second visit has to be made once more
//   restart(rows)                               before that, by every thread of the cluster
//   result(cluster, sum)                        by every thread of the cluster: the row's sums -> its value and the sum
//                                               of G
//   gradient(student, kept, g_scale, q_scale, out)   g_scale G + q_scale q
#pragma once

#include "../divergence_row.cuh"

namespace distillm {

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

template <class Functor>
struct FunctorTerms {
  struct Scratch {};
  Softmax q, p;
  Functor functor;

  __device__ static bool legal(const RowParameters<float>& row) { return Functor::legal(row); }
  __device__ FunctorTerms(const RowSoftmaxes& softmaxes, const RowParameters<float>& row, Scratch&)
      : q(softmaxes.q), p(softmaxes.p), functor(row) {}

  template <class Rows>
  __device__ void prepare(const Rows&) const {}

  __device__ Entry<float> entry(float student_logit, float teacher_logit) const {
    const float log2_q = q.log2_probability(student_logit), log2_p = p.log2_probability(teacher_logit);
    return {log2_p, log2_q, exp2_fast(log2_p), exp2_fast(log2_q)};
  }

  // Keeps G.
  template <class First, int N>
  __device__ void chunk(First, const float (&student_logits)[N], const float (&teacher_logits)[N], Term<float>& sum,
                        float (&g)[N]) const {
    FunctorChoice<Functor>::make(functor, [&](const auto& chosen) {
#pragma unroll
      for (int i = 0; i < N; i += 2) {
        Term<float> x, y;
        pair_of_terms(chosen, entry(student_logits[i], teacher_logits[i]),
                      entry(student_logits[i + 1], teacher_logits[i + 1]), x, y);
        sum.value += x.value;
        sum.value += y.value;
        g[i] = x.g, g[i + 1] = y.g;
      }
    });
#pragma unroll
    for (int i = 0; i < N; ++i) sum.g += g[i];
  }
  template <int N>
  __device__ void again(const float (&student_logits)[N], const float (&teacher_logits)[N], float (&g)[N]) const {
    Term<float> unused{0, 0};
    chunk([] { return 0; }, student_logits, teacher_logits, unused, g);
  }

  __device__ void publish() const {}
  __device__ void share(const Cluster&) const {}
  __device__ bool inexact(const Term<float>&) const { return false; }
  template <class Rows>
  __device__ void restart(const Rows&) const {}
  __device__ Term<float> result(const Cluster&, const Term<float>& sum) const { return sum; }

  template <int N>
  __device__ void gradient(const float (&student_logits)[N], const float (&g)[N], float g_scale, float q_scale,
                           float (&out)[N]) const {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      out[i] = fmaf(g_scale, g[i], q_scale * exp2_fast(q.log2_probability(student_logits[i])));
    }
  }
};

}  // namespace distillm
