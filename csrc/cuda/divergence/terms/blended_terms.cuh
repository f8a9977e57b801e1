// interpolated: KL(p_t || q) in one pass, without the softmax of the blended row.
//
// With x_v = (1 - t) log2 q_v + t log2 p_v - offset, e = 2^x, Z = sum e:  p_t = e / Z  and
//
//   KL(p_t || q) = ln 2 (sum e (x - log2 q) / Z - log2 Z)
//
// so that one visit takes both sums, and G = -e / Z. By Hoelder's inequality Z <= 1 without an offset; where the sides
// are so far apart that it is close to underflow, the pass is made once more with the largest x as the offset. The two
// logarithms are then large and cancel, which takes double precision.
#pragma once

#include "divergence_terms.cuh"

namespace distillm {

struct BlendedTerms {
  using Scratch = Partials<Highest>;
  static constexpr float kSmallestSum = 9.094947e-13f;  // 2^-40: what underflows below 2^-126 is then below 2^-86 of it
  Softmax q, p;
  float t, student_scale, teacher_scale, rest;
  float inverse;  // 1 / Z, once it is known
  float origin;   // largest blend of two logits, once that is known
  bool repeated;
  Scratch& scratch;

  __device__ static bool legal(const RowParameters<float>& row) { return in_unit_interval(row.alpha); }
  __device__ BlendedTerms(const RowSoftmaxes& softmaxes, const RowParameters<float>& row, Scratch& scratch)
      : q(softmaxes.q),
        p(softmaxes.p),
        t(row.alpha),
        student_scale((1 - t) * q.scale),
        teacher_scale(t * p.scale),
        rest(fmaf(row.alpha, p.rest, (1 - row.alpha) * q.rest)),
        inverse(0),
        origin(0),
        repeated(false),
        scratch(scratch) {}
  template <class Rows>
  __device__ void prepare(const Rows&) const {}

  // NaN where t is 0 or 1 and the side that does not count is -inf.
  __device__ float blended(float student_logit, float teacher_logit) const {
    return fmaf(student_logit - q.reference, student_scale, fmaf(teacher_logit - p.reference, teacher_scale, -rest));
  }
  // Of the logits alone, less the origin: the rest of x is the same for all entries.
  __device__ float blended_logit(float student_logit, float teacher_logit) const {
    const double blend = fma(1.0 - t, double{student_logit}, double{t} * double{teacher_logit});
    return static_cast<float>(blend - double{origin});
  }
  __device__ float blended_anyhow(float student_logit, float teacher_logit) const {
    if (repeated) return blended_logit(student_logit, teacher_logit) * q.scale;
    const float log2_q = q.log2_probability(student_logit), log2_p = p.log2_probability(teacher_logit);
    return t == 0 ? log2_q : t == 1 ? log2_p : blended(student_logit, teacher_logit);
  }

  // Keeps e. Entries of -inf make the sum NaN and are looked at once more, like those that need
  // more digits.
  template <class First, int N>
  __device__ void chunk(First, const float (&student_logits)[N], const float (&teacher_logits)[N], Term<float>& sum,
                        float (&e)[N]) const {
    float value = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float x = blended(student_logits[i], teacher_logits[i]);
      e[i] = exp2_fast(x);
      value = fmaf(e[i], x - q.log2_probability(student_logits[i]), value);
    }
    if (!(fabsf(value) < CUDART_INF_F) || repeated) {
      value = 0;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float x = blended_anyhow(student_logits[i], teacher_logits[i]);
        e[i] = exp2_fast(x);
        value += e[i] == 0 ? 0 : e[i] * (x - q.log2_probability(student_logits[i]));
      }
    }
    sum.value += value;
#pragma unroll
    for (int i = 0; i < N; ++i) sum.g += e[i];
  }
  template <int N>
  __device__ void again(const float (&student_logits)[N], const float (&teacher_logits)[N], float (&e)[N]) const {
#pragma unroll
    for (int i = 0; i < N; ++i) e[i] = exp2_fast(blended_anyhow(student_logits[i], teacher_logits[i]));
  }

  __device__ void publish() const {}
  __device__ void share(const Cluster&) const {}

  __device__ bool inexact(const Term<float>& sum) const { return sum.g < kSmallestSum; }
  template <class Rows>
  __device__ void restart(const Rows& rows) {
    constexpr int N = Rows::N;
    float largest = -FLT_MAX;
    rows.stage_again([&](const float (&student_logits)[N], const float (&teacher_logits)[N]) {
#pragma unroll
      for (int i = 0; i < N; ++i) largest = fmaxf(largest, blended_logit(student_logits[i], teacher_logits[i]));
    });
    origin = scratch.over({}, largest, rows.cluster);
    repeated = true;
  }
  __device__ Term<float> result(const Cluster&, const Term<float>& sum) {
    inverse = 1 / sum.g;
    return {static_cast<float>(kLn2) * (sum.value * inverse - log2f(sum.g)), -1};
  }

  template <int N>
  __device__ void gradient(const float (&student_logits)[N], const float (&e)[N], float g_scale, float q_scale,
                           float (&out)[N]) const {
    const float e_scale = -g_scale * inverse;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      out[i] = fmaf(e_scale, e[i], q_scale * exp2_fast(q.log2_probability(student_logits[i])));
    }
  }
};

}  // namespace distillm
