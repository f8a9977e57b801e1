// What one vocabulary entry contributes to a divergence and to its gradient.
//
// p = softmax(teacher / T), q = softmax(student / T). For a loss L(q) let G_v = q_v * dL/dq_v; then
//
//   dL/dz_v = (G_v - q_v * sum_u G_u) / T                                                                      (1)
//
// so a divergence is a functor from an Entry to a Term {value, G_v}, and everything else (the two softmax statistics,
// the sums over the row, (1)) is one skeleton shared by all of them, on the CPU and on the GPU. G_v is formed directly:
// dL/dq_v alone overflows where q_v underflows.
//
// Adding a divergence: write its functor here and add it to DISTILLM_FOR_EACH_DIVERGENCE.
#pragma once

#include "exponential.h"

namespace distillm {
inline namespace DISTILLM_ISA {

// Both sides of one entry. A probability that underflows is 0 while its logarithm stays finite; a logit of -inf, or an
// entry that a side lacks, has probability 0 and logarithm -inf.
template <class Real>
struct Entry {
  Real log2_p, log2_q, p, q;
};

template <class Real>
struct Term {
  Real value;  // nats; summed over the row
  Real g;      // G_v of (1)
};

// Hyper-parameters of one row.
template <class Real>
struct RowParameters {
  Real alpha;
  bool detach_mixture;
};

// a * log(a / b) where a > 0 and 0 elsewhere, from base-2 logarithms: +inf where b is 0 and a is not.
template <class Real>
DISTILLM_HD Real a_log_a_over_b(Real a, Real log2_a, Real log2_b) {
  const Real value = a * (log2_a - log2_b) * Real(kLn2);
  return a == Real(0) ? Real(0) : value;
}

// KL(p || q): sum p log(p/q), G = -p.
template <class Real>
struct ForwardKl {
  DISTILLM_HD explicit ForwardKl(RowParameters<Real>) {}
  DISTILLM_HD static bool legal(RowParameters<Real>) { return true; }
  DISTILLM_HD Term<Real> operator()(Entry<Real> e) const { return {a_log_a_over_b(e.p, e.log2_p, e.log2_q), -e.p}; }
};

// KL(q || p): sum q log(q/p), G = q (log(q/p) + 1).
template <class Real>
struct ReverseKl {
  DISTILLM_HD explicit ReverseKl(RowParameters<Real>) {}
  DISTILLM_HD static bool legal(RowParameters<Real>) { return true; }
  DISTILLM_HD Term<Real> operator()(Entry<Real> e) const {
    const Real value = a_log_a_over_b(e.q, e.log2_q, e.log2_p);
    return {value, value + e.q};
  }
};

// a / (alpha a + (1 - alpha) b), the ratio that skew divergences take the logarithm of; at most 1 / alpha, 0 when both
// are 0.
//
// The mixture starts from the side with the larger weight and adds the difference, so that it is exactly a when a == b
// (identical inputs give exactly 0) and loses no digits when a and b are far apart.
//
// Choices per row are comparisons of numbers at the point of use, not stored bools: g++ vectorises a select on a
// comparison only.
template <class Real>
struct SkewRatio {
  Real alpha, slope;

  DISTILLM_HD explicit SkewRatio(Real alpha) : alpha(alpha), slope(alpha > Real(0.5) ? alpha - Real(1) : alpha) {}
  DISTILLM_HD Real operator()(Real a, Real b) const {
    const Real mixture = (alpha > Real(0.5) ? a : b) + slope * (a - b);
    return divide_fast(a, at_least(mixture, kSmallestNormal<Real>));
  }
};

// KL(p || m), m = alpha p + (1 - alpha) q: sum p log(p/m), G = -(1 - alpha) p q / m. DistiLLM (Ko et al., ICML 2024).
// alpha = 0 is KL(p || q); there the logarithm comes from the logits, since q may have underflowed.
template <class Real>
struct SkewKl {
  Real alpha;
  SkewRatio<Real> ratio;

  DISTILLM_HD explicit SkewKl(RowParameters<Real> row) : alpha(row.alpha), ratio(row.alpha) {}
  DISTILLM_HD static bool legal(RowParameters<Real> row) { return row.alpha >= Real(0) && row.alpha <= Real(1); }
  DISTILLM_HD Term<Real> operator()(Entry<Real> e) const {
    const Real p_over_m = ratio(e.p, e.q);
    const Real mixed = e.p * log2_fast(p_over_m) * Real(kLn2);
    const Real limit = a_log_a_over_b(e.p, e.log2_p, e.log2_q);
    const Real mixed_g = (alpha - Real(1)) * (e.q * p_over_m);
    return {alpha == Real(0) ? limit : mixed, alpha == Real(0) ? -e.p : mixed_g};
  }
};

// KL(q || m), m = (1 - alpha) p + alpha q: sum q log(q/m), G = q (log(q/m) + 1 - alpha q/m), without the last summand
// when the mixture is held constant (detach_mixture, as in DistiLLM-2's code). DistiLLM (Ko et al., ICML 2024).
// alpha = 0 is KL(q || p), from the logits as above.
template <class Real>
struct SkewReverseKl {
  Real alpha, alpha_attached;
  SkewRatio<Real> ratio;

  DISTILLM_HD explicit SkewReverseKl(RowParameters<Real> row)
      : alpha(row.alpha), alpha_attached(row.detach_mixture ? Real(0) : row.alpha), ratio(row.alpha) {}
  DISTILLM_HD static bool legal(RowParameters<Real> row) { return row.alpha >= Real(0) && row.alpha <= Real(1); }
  DISTILLM_HD Term<Real> operator()(Entry<Real> e) const {
    const Real q_over_m = ratio(e.q, e.p);
    const Real mixed = e.q * log2_fast(q_over_m) * Real(kLn2);
    const Real limit = a_log_a_over_b(e.q, e.log2_q, e.log2_p);
    const Real value = alpha == Real(0) ? limit : mixed;
    return {value, value + e.q * (Real(1) - alpha_attached * q_over_m)};
  }
};

// The one list that dispatch on both backends is made from: X(name of the public API, functor).
#define DISTILLM_FOR_EACH_DIVERGENCE(X) \
  X("forward_kl", ForwardKl)            \
  X("reverse_kl", ReverseKl)            \
  X("skew_kl", SkewKl)                  \
  X("skew_reverse_kl", SkewReverseKl)

}  // namespace DISTILLM_ISA
}  // namespace distillm
