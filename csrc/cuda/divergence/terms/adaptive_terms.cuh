// adaptive_kl: both directions and the gaps on head and tail in one pass, and their shares after it.
//
//   value = (1 - s) F + s R,  F = KL(p || q), R = KL(q || p)       G = -(1 - s) (p - q) + s q log(q / p),  sum G = s R
//
// (q times any constant may be added to G: it is q times its own sum that the gradient subtracts.) The head of the row
// is found before that pass (adaptive_head.cuh).
#pragma once

#include "../../../math/row_divergence.h"
#include "adaptive_head.cuh"
#include "divergence_terms.cuh"

namespace distillm {

struct AdaptiveScratch {
  HeadScratch head;
  JointPartials<2> gaps;
};

struct AdaptiveTerms {
  using Scratch = AdaptiveScratch;

  Softmax q, p;
  float mu;
  HeadBoundary head;
  float head_gap, tail_gap;  // sum |p - q| over this thread's entries
  float share_of_forward, share_of_reverse;
  bool infinite;  // whether this thread has seen an entry of -inf
  Scratch& scratch;

  __device__ static bool legal(const RowParameters<float>& row) { return in_unit_interval(row.alpha); }
  __device__ AdaptiveTerms(const RowSoftmaxes& softmaxes, const RowParameters<float>& row, Scratch& scratch)
      : q(softmaxes.q),
        p(softmaxes.p),
        mu(row.alpha),
        head(HeadBoundary::everything()),
        head_gap(0),
        tail_gap(0),
        share_of_forward(0),
        share_of_reverse(0),
        infinite(false),
        scratch(scratch) {}

  template <class Rows>
  __device__ void prepare(const Rows& rows) {
    head = HeadSearch<Rows>{rows, p, mu, scratch.head}.boundary();
  }

  // Keeps log2 p.
  template <class First, int N>
  __device__ void chunk(First first, const float (&student_logits)[N], const float (&teacher_logits)[N],
                        Term<float>& sum, float (&log2_p)[N]) {
    const int first_id = first();
    float forward = 0, reverse = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      log2_p[i] = p.log2_probability(teacher_logits[i]);
      const float log2_q = q.log2_probability(student_logits[i]), log2_ratio = log2_p[i] - log2_q;
      const float p_v = exp2_fast(log2_p[i]), q_v = exp2_fast(log2_q), gap = fabsf(p_v - q_v);
      forward = fmaf(p_v, log2_ratio, forward);
      reverse = fmaf(q_v, log2_ratio, reverse);
      const bool inside = head.holds(teacher_logits[i], first_id + i);
      head_gap += inside ? gap : 0;
      tail_gap += inside ? 0 : gap;
    }
    if (!(fabsf(forward + reverse) < CUDART_INF_F)) add_infinite(student_logits, log2_p, forward, reverse);
    sum.value += forward;
    sum.g -= reverse;
  }
  template <int N>
  __device__ void add_infinite(const float (&student_logits)[N], const float (&log2_p)[N], float& forward,
                               float& reverse) {
    infinite = true;
    forward = reverse = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float log2_q = q.log2_probability(student_logits[i]);
      forward += a_log_a_over_b(exp2_fast(log2_p[i]), log2_p[i], log2_q) * static_cast<float>(kLog2E);
      reverse -= a_log_a_over_b(exp2_fast(log2_q), log2_q, log2_p[i]) * static_cast<float>(kLog2E);
    }
  }
  template <int N>
  __device__ void again(const float (&)[N], const float (&teacher_logits)[N], float (&log2_p)[N]) const {
#pragma unroll
    for (int i = 0; i < N; ++i) log2_p[i] = p.log2_probability(teacher_logits[i]);
  }

  __device__ void publish() { scratch.gaps.publish({head_gap, tail_gap}); }
  __device__ void share(const Cluster& cluster) { scratch.gaps.share(cluster); }

  __device__ bool inexact(const Term<float>&) const { return false; }
  template <class Rows>
  __device__ void restart(const Rows&) const {}
  __device__ Term<float> result(const Cluster& cluster, const Term<float>& sum) {
    float gaps[2];
    scratch.gaps.totals(cluster, gaps);
    share_of_forward = adaptive_share(gaps[1], gaps[0]);  // not 1 less the other, which may have few digits
    share_of_reverse = adaptive_share(gaps[0], gaps[1]);
    // A direction without a share is left out: it may be infinite.
    const float forward = share_of_forward > 0 ? share_of_forward * sum.value : 0;
    const float reverse = share_of_reverse > 0 ? share_of_reverse * sum.g : 0;
    const float nats = static_cast<float>(kLn2);
    return {nats * (forward + reverse), nats * reverse};
  }

  template <int N>
  __device__ void gradient(const float (&student_logits)[N], const float (&log2_p)[N], float g_scale, float q_scale,
                           float (&out)[N]) const {
    const float of_forward = -g_scale * share_of_forward;
    const float of_reverse = -g_scale * share_of_reverse * static_cast<float>(kLn2);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float log2_q = q.log2_probability(student_logits[i]);
      const float p_v = exp2_fast(log2_p[i]), q_v = exp2_fast(log2_q);
      out[i] = fmaf(of_forward, p_v - q_v, q_v * fmaf(of_reverse, log2_p[i] - log2_q, q_scale));
    }
    if (infinite) {  // where a logarithm is, but its factor is 0
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float log2_q = q.log2_probability(student_logits[i]), q_v = exp2_fast(log2_q);
        const float log2_ratio = q_v == 0 || of_reverse == 0 ? 0.0f : log2_p[i] - log2_q;
        out[i] = fmaf(of_forward, exp2_fast(log2_p[i]) - q_v, q_v * fmaf(of_reverse, log2_ratio, q_scale));
      }
    }
  }
};

}  // namespace distillm
