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
  Real alpha, beta;
  bool detach_mixture;

  // Of a call's options, or of parameters of another type. alpha_rows: each row's own alpha, null where they have none.
  template <class Options>
  DISTILLM_HD static RowParameters of(const Options& options, const Real* alpha_rows = nullptr, int64_t row = 0) {
    const Real alpha = alpha_rows ? alpha_rows[row] : static_cast<Real>(options.alpha);
    return {alpha, static_cast<Real>(options.beta), options.detach_mixture};
  }
};

// a * log(a / b) where a > 0 and 0 elsewhere, from base-2 logarithms: +inf where b is 0 and a is not.
template <class Real>
DISTILLM_HD Real a_log_a_over_b(Real a, Real log2_a, Real log2_b) {
  const Real value = a * (log2_a - log2_b) * Real(kLn2);
  return a == Real(0) ? Real(0) : value;
}

// Every functor has
//   kNeedsLogs   whether it reads the logarithms of the Entry; where not, a backend may leave them out
//   kDivides     whether it divides by something that depends on the entry; then also
//                  Real divisor(Entry)         at least 0
//                  Term term(Entry, divisor, inverse)   given about 1 / divisor: a backend may take the inverses of
//                                              several at once; equal sides give exactly 0 however exact those are
//   legal(row)   whether the hyper-parameters of the row are in range; a row for which they are not becomes NaN
//   Term operator()(Entry)

// KL(p || q): sum p log(p/q), G = -p.
template <class Real>
struct ForwardKl {
  static constexpr bool kNeedsLogs = true, kDivides = false;
  DISTILLM_HD explicit ForwardKl(RowParameters<Real>) {}
  DISTILLM_HD static bool legal(RowParameters<Real>) { return true; }
  DISTILLM_HD Term<Real> operator()(Entry<Real> e) const { return {a_log_a_over_b(e.p, e.log2_p, e.log2_q), -e.p}; }
};

// KL(q || p): sum q log(q/p), G = q (log(q/p) + 1).
template <class Real>
struct ReverseKl {
  static constexpr bool kNeedsLogs = true, kDivides = false;
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
// The choice per row is a comparison of numbers at the point of use, not a stored bool: g++ vectorises a select on a
// comparison only.
template <class Real>
struct SkewRatio {
  Real alpha, slope;

  DISTILLM_HD explicit SkewRatio(Real alpha) : alpha(alpha), slope(alpha > Real(0.5) ? alpha - Real(1) : alpha) {}
  DISTILLM_HD Real mixture(Real a, Real b) const { return (alpha > Real(0.5) ? a : b) + slope * (a - b); }
  DISTILLM_HD Real operator()(Real a, Real b) const {
    return divide_fast(a, at_least(mixture(a, b), kSmallestNormal<Real>));
  }
  // Given about 1 / mixture: exactly 1 where that is a, as it is where a == b, whatever the last digits of the inverse.
  DISTILLM_HD static Real of_inverse(Real a, Real mixture, Real inverse) {
    return a == mixture ? Real(1) : a * inverse;
  }
};

template <class Real>
DISTILLM_HD bool in_unit_interval(Real x) {
  return x >= Real(0) && x <= Real(1);
}

// KL(p || m), m = alpha p + (1 - alpha) q: sum p log(p/m), G = -(1 - alpha) p q / m. DistiLLM (Ko et al., ICML 2024).
// For alpha > 0; at 0 it is ForwardKl, which takes the logarithm from the logits, since q may have underflowed.
template <class Real>
struct SkewKl {
  static constexpr bool kNeedsLogs = false, kDivides = true;
  Real alpha;
  SkewRatio<Real> ratio;

  DISTILLM_HD explicit SkewKl(RowParameters<Real> row) : alpha(row.alpha), ratio(row.alpha) {}
  DISTILLM_HD static bool legal(RowParameters<Real> row) { return in_unit_interval(row.alpha); }
  DISTILLM_HD Real divisor(Entry<Real> e) const { return ratio.mixture(e.p, e.q); }
  DISTILLM_HD Term<Real> term(Entry<Real> e, Real mixture, Real inverse) const {
    return of_ratio(e, ratio.of_inverse(e.p, mixture, inverse));
  }
  DISTILLM_HD Term<Real> operator()(Entry<Real> e) const { return of_ratio(e, ratio(e.p, e.q)); }
  DISTILLM_HD Term<Real> of_ratio(Entry<Real> e, Real p_over_m) const {
    return {e.p * (log2_fast(p_over_m) * Real(kLn2)), (alpha - Real(1)) * (e.q * p_over_m)};
  }
};

// KL(q || m), m = (1 - alpha) p + alpha q: sum q log(q/m), G = q (log(q/m) + 1 - alpha q/m), without the last summand
// when the mixture is held constant (detach_mixture, as in DistiLLM-2's code). DistiLLM (Ko et al., ICML 2024).
// For alpha > 0; at 0 it is ReverseKl.
template <class Real>
struct SkewReverseKl {
  static constexpr bool kNeedsLogs = false, kDivides = true;
  Real alpha_attached;
  SkewRatio<Real> ratio;

  DISTILLM_HD explicit SkewReverseKl(RowParameters<Real> row)
      : alpha_attached(row.detach_mixture ? Real(0) : row.alpha), ratio(row.alpha) {}
  DISTILLM_HD static bool legal(RowParameters<Real> row) { return in_unit_interval(row.alpha); }
  DISTILLM_HD Real divisor(Entry<Real> e) const { return ratio.mixture(e.q, e.p); }
  DISTILLM_HD Term<Real> term(Entry<Real> e, Real mixture, Real inverse) const {
    return of_ratio(e, ratio.of_inverse(e.q, mixture, inverse));
  }
  DISTILLM_HD Term<Real> operator()(Entry<Real> e) const { return of_ratio(e, ratio(e.q, e.p)); }
  DISTILLM_HD Term<Real> of_ratio(Entry<Real> e, Real q_over_m) const {
    const Real value = e.q * (log2_fast(q_over_m) * Real(kLn2));
    return {value, value + e.q * (Real(1) - alpha_attached * q_over_m)};
  }
};

// (1 - beta) KL(p || q) + beta KL(q || p), 0 < beta < 1: ((1 - beta) p - beta q) log(p/q),
// G = -(1 - beta) p + beta q (log(q/p) + 1).
template <class Real>
struct SymmetricKl {
  static constexpr bool kNeedsLogs = true, kDivides = false;
  Real beta;

  DISTILLM_HD explicit SymmetricKl(RowParameters<Real> row) : beta(row.beta) {}
  DISTILLM_HD static bool legal(RowParameters<Real>) { return true; }
  // Equal sides, both 0 among them, have no difference of logarithms.
  DISTILLM_HD Term<Real> operator()(Entry<Real> e) const {
    const Real log2_ratio = e.log2_p - e.log2_q;
    const Real log_ratio = e.p == e.q ? Real(0) : log2_ratio * Real(kLn2);
    const Real q_share = beta * e.q, difference = (Real(1) - beta) * e.p - q_share;
    return {difference * log_ratio, -difference - q_share * log_ratio};
  }
};

// beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q, 0 < beta < 1: G = (1 - beta) q log(q/m).
// GKD (Agarwal et al., ICLR 2024).
template <class Real>
struct GeneralizedJs {
  static constexpr bool kNeedsLogs = false, kDivides = true;
  SkewRatio<Real> of_p, of_q;
  Real p_nats, q_nats;

  DISTILLM_HD explicit GeneralizedJs(RowParameters<Real> row)
      : of_p(row.beta),
        of_q(Real(1) - row.beta),
        p_nats(row.beta * Real(kLn2)),
        q_nats((Real(1) - row.beta) * Real(kLn2)) {}
  DISTILLM_HD static bool legal(RowParameters<Real>) { return true; }
  DISTILLM_HD Real divisor(Entry<Real> e) const { return of_p.mixture(e.p, e.q); }
  DISTILLM_HD Term<Real> term(Entry<Real> e, Real mixture, Real inverse) const {
    return of_ratios(e, of_p.of_inverse(e.p, mixture, inverse), of_q.of_inverse(e.q, mixture, inverse));
  }
  DISTILLM_HD Term<Real> operator()(Entry<Real> e) const { return of_ratios(e, of_p(e.p, e.q), of_q(e.q, e.p)); }
  // At beta = 1/2 the sides may change places without a digit of the value changing.
  DISTILLM_HD Term<Real> of_ratios(Entry<Real> e, Real p_over_m, Real q_over_m) const {
    const Real p_term = rounded_product(p_nats, e.p * log2_fast(p_over_m));
    const Real q_term = rounded_product(q_nats, e.q * log2_fast(q_over_m));
    return {p_term + q_term, q_term};
  }
};

// 1/2 sum |p - q|: G = q sign(q - p) / 2 with sign(0) = 0. f-DISTILL (Wen et al., ACL 2023).
template <class Real>
struct TotalVariation {
  static constexpr bool kNeedsLogs = false, kDivides = false;
  DISTILLM_HD explicit TotalVariation(RowParameters<Real>) {}
  DISTILLM_HD static bool legal(RowParameters<Real>) { return true; }
  DISTILLM_HD Term<Real> operator()(Entry<Real> e) const {
    // The sign comes from a comparison of p and q themselves: their difference may be contracted with the products that
    // they are, and is then not 0 at a tie.
    const Real half_q = Real(0.5) * e.q;
    const Real g = e.q > e.p ? half_q : e.q < e.p ? -half_q : Real(0);
    const Real difference = e.q - e.p;
    return {Real(0.5) * (difference > Real(0) ? difference : -difference), g};
  }
};

// -1/(ab) sum [p^a q^b - a/(a+b) p^(a+b) - b/(a+b) q^(a+b)], a = alpha, b = beta: G = q^b (q^a - p^a) / a. Exponents
// below 1e-4 are refused in float: differences of what they leave of p and q have few digits. ABKD (Wang et al., ICML
// 2025).
template <class Real>
struct AlphaBeta {
  static constexpr bool kNeedsLogs = true, kDivides = false;
  Real a, b, inverse_a, inverse_b, inverse_sum;

  DISTILLM_HD explicit AlphaBeta(RowParameters<Real> row)
      : a(row.alpha),
        b(row.beta),
        inverse_a(Real(1) / row.alpha),
        inverse_b(Real(1) / row.beta),
        inverse_sum(Real(1) / (row.alpha + row.beta)) {}
  DISTILLM_HD static bool legal(RowParameters<Real> row) {
    const Real least = sizeof(Real) == sizeof(double) ? Real(0) : Real(0.9999e-4);
    return row.alpha > least && row.alpha < std::numeric_limits<Real>::infinity();
  }
  DISTILLM_HD Term<Real> operator()(Entry<Real> e) const {
    const Real p_a = exp2_fast(a * e.log2_p), q_a = exp2_fast(a * e.log2_q);
    const Real p_b = exp2_fast(b * e.log2_p), q_b = exp2_fast(b * e.log2_q);
    // The bracket as a sum of differences, each exactly 0 where p == q.
    const Real g = q_b * (q_a - p_a) * inverse_a;
    return {inverse_sum * (g + p_a * (p_b - q_b) * inverse_b), g};
  }
};

// sum w p log(p/q) + (1 - w) q log(q/p), w = sigmoid(log p - log q) = p / (p + q) held constant:
// G = -w p + (1 - w) q (log(q/p) + 1). ToDi (Jung et al., EMNLP 2025).
//
// With that w the summand is (p - q) log(p/q) and G = q - p - q^2 / (p + q) log(p/q).
template <class Real>
struct TokenAdaptive {
  static constexpr bool kNeedsLogs = true, kDivides = true;
  DISTILLM_HD explicit TokenAdaptive(RowParameters<Real>) {}
  DISTILLM_HD static bool legal(RowParameters<Real>) { return true; }
  DISTILLM_HD Real divisor(Entry<Real> e) const { return e.p + e.q; }
  DISTILLM_HD Term<Real> term(Entry<Real> e, Real, Real inverse) const { return of_share(e, e.q * inverse); }
  DISTILLM_HD Term<Real> operator()(Entry<Real> e) const {
    return of_share(e, divide_fast(e.q, at_least(e.p + e.q, kSmallestNormal<Real>)));
  }
  // q_share: q / (p + q). Equal sides, both 0 among them, have no difference of logarithms.
  DISTILLM_HD Term<Real> of_share(Entry<Real> e, Real q_share) const {
    const Real log2_ratio = e.log2_p - e.log2_q;
    const Real difference = e.p - e.q, log_ratio = e.p == e.q ? Real(0) : log2_ratio * Real(kLn2);
    return {difference * log_ratio, -difference - q_share * (e.q * log_ratio)};
  }
};

// A divergence and its limit at alpha = 0, chosen entry by entry: for a backend that does not choose row by row.
template <class Functor, class AtZero, class Real>
struct OrAtZero {
  static constexpr bool kNeedsLogs = Functor::kNeedsLogs || AtZero::kNeedsLogs;
  Real alpha;
  Functor functor;
  AtZero at_zero;

  DISTILLM_HD explicit OrAtZero(RowParameters<Real> row) : alpha(row.alpha), functor(row), at_zero(row) {}
  DISTILLM_HD static bool legal(RowParameters<Real> row) { return Functor::legal(row); }
  DISTILLM_HD Term<Real> operator()(Entry<Real> e) const {
    const Term<Real> general = functor(e), limit = at_zero(e);
    return {alpha == Real(0) ? limit.value : general.value, alpha == Real(0) ? limit.g : general.g};
  }
};

template <class Real>
using SkewKlFromZero = OrAtZero<SkewKl<Real>, ForwardKl<Real>, Real>;
template <class Real>
using SkewReverseKlFromZero = OrAtZero<SkewReverseKl<Real>, ReverseKl<Real>, Real>;

// The one list that dispatch on both backends is made from:
// X(name of the public API, functor for alpha > 0, functor at alpha = 0, functor for any alpha).
#define DISTILLM_FOR_EACH_DIVERGENCE(X)                                 \
  X("forward_kl", ForwardKl, ForwardKl, ForwardKl)                      \
  X("reverse_kl", ReverseKl, ReverseKl, ReverseKl)                      \
  X("symmetric_kl", SymmetricKl, SymmetricKl, SymmetricKl)              \
  X("skew_kl", SkewKl, ForwardKl, SkewKlFromZero)                       \
  X("skew_reverse_kl", SkewReverseKl, ReverseKl, SkewReverseKlFromZero) \
  X("generalized_js", GeneralizedJs, GeneralizedJs, GeneralizedJs)      \
  X("total_variation", TotalVariation, TotalVariation, TotalVariation)  \
  X("alpha_beta", AlphaBeta, AlphaBeta, AlphaBeta)                      \
  X("token_adaptive", TokenAdaptive, TokenAdaptive, TokenAdaptive)

}  // namespace DISTILLM_ISA
}  // namespace distillm
