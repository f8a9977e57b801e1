// What one kept entry contributes to a divergence from a teacher of which K entries and the mass of the rest are known.
//
// S: the kept entries; t, r: the mass that teacher and student have off S. How the entries off S count:
//
//   bucket       as one entry (t, r): the exact divergence of the coarsened distributions
//   truncate     the teacher's probability off S is taken as 0, the student's stays: an entry (0, r), which costs
//                SKL and forward KL nothing, SRKL r log(1/alpha), JS (1 - beta) r log(1/(1 - beta)), TVD r / 2. Reverse
//                KL would be infinite: it has no such entry
//   renormalize  both sides over S alone
//   sampled      S was drawn from the teacher: a sum over S weighted by share = c_i / N, whose expectation is the
//                divergence (and the gradient's its gradient)
//
// The first three use the functors of divergence.h, on the entries of S and on the bucket.
#pragma once

#include <type_traits>

#include "divergence.h"
#include "tail.h"

namespace distillm {
inline namespace DISTILLM_ISA {

// The logarithm of a student without any mass off S, where a divergence asks for it: that of the smallest normal
// double. The divergence is a constant there, so that the bucket has no gradient.
constexpr double kLog2LeastTail = -1022;

// How far log-probabilities differ, relative to the probability, where both sides have the same: the teacher's are
// stored, the student's are computed here, and both are rounded. Input: the type of the stored ones.
template <class Input>
constexpr double kTie = sizeof(Input) == sizeof(float) ? 0x1p-17 : 0x1p-46;

// TotalVariation whose sign is 0 where p and q differ by no more than their rounding: equal distributions have no
// gradient.
template <class Real, class Input = Real>
struct TiedTotalVariation {
  DISTILLM_HD explicit TiedTotalVariation(RowParameters<Real>) {}
  DISTILLM_HD static bool legal(RowParameters<Real>) { return true; }
  DISTILLM_HD Term<Real> operator()(Entry<Real> e) const {
    const Real half_q = Real(0.5) * e.q, difference = e.q - e.p, least = Real(kTie<Input>) * e.p;
    const Real g = difference > least ? half_q : difference < -least ? -half_q : Real(0);
    return {Real(0.5) * (difference > Real(0) ? difference : -difference), g};
  }
};

// The divergence in double, for a bucket whose t was stored as Input.
template <template <class> class Divergence, class Input>
struct BucketOf {
  using Type = Divergence<double>;
};

// What DISTILLM_FOR_EACH_SPARSE_DIVERGENCE calls it.
template <class Real>
using KeptTotalVariation = TiedTotalVariation<Real>;

template <class Input>
struct BucketOf<KeptTotalVariation, Input> {
  using Type = TiedTotalVariation<double, Input>;
};

// Functors of kept entries have
//   kSampled       whether they are an importance form, which has no bucket and uses the share
//   legal(row)     as in divergence.h
//   constant(row)  what the row's value has beside the sum over S
//   Term operator()(Entry, share)
// and Exact the divergence of the bucket.
template <template <class> class Divergence, class Real>
struct Exact {
  static constexpr bool kSampled = false;
  static constexpr bool kInfiniteWithoutTeacher = std::is_same_v<Divergence<double>, ReverseKl<double>>;
  using Bucket = typename BucketOf<Divergence, Real>::Type;
  Divergence<Real> divergence;

  DISTILLM_HD explicit Exact(RowParameters<Real> row) : divergence(row) {}
  DISTILLM_HD static bool legal(RowParameters<Real> row) { return Divergence<Real>::legal(row); }
  DISTILLM_HD static Real constant(RowParameters<Real>) { return Real(0); }
  DISTILLM_HD Term<Real> operator()(Entry<Real> e, Real) const { return divergence(e); }
};

// KL(p || q) = E_p log(p/q).
template <class Real>
struct SampledForwardKl {
  static constexpr bool kSampled = true;
  DISTILLM_HD explicit SampledForwardKl(RowParameters<Real>) {}
  DISTILLM_HD static bool legal(RowParameters<Real>) { return true; }
  DISTILLM_HD static Real constant(RowParameters<Real>) { return Real(0); }
  DISTILLM_HD Term<Real> operator()(Entry<Real> e, Real share) const {
    return {share * (e.log2_p - e.log2_q) * Real(kLn2), -share};
  }
};

// KL(p || m) = E_p log(p/m), m = alpha p + (1 - alpha) q: G = -(1 - alpha) q / m.
template <class Real>
struct SampledSkewKl {
  static constexpr bool kSampled = true;
  Real alpha;
  SkewRatio<Real> ratio;

  DISTILLM_HD explicit SampledSkewKl(RowParameters<Real> row) : alpha(row.alpha), ratio(row.alpha) {}
  DISTILLM_HD static bool legal(RowParameters<Real> row) { return in_unit_interval(row.alpha); }
  DISTILLM_HD static Real constant(RowParameters<Real>) { return Real(0); }
  DISTILLM_HD Term<Real> operator()(Entry<Real> e, Real share) const {
    const Real p_over_m = ratio(e.p, e.q);
    return {share * (log2_fast(p_over_m) * Real(kLn2)), share * (alpha - Real(1)) * (e.q / e.p * p_over_m)};
  }
};

// KL(q || m) = -log alpha - E_p (q/p) log(1 + x), x = (1 - alpha) p / (alpha q), m = (1 - alpha) p + alpha q:
// G = -(q/p) (log(1 + x) - x / (1 + x)), without the last summand when the mixture is held constant (the G of the
// constants is a multiple of q, which the softmax cancels). alpha > 0: at 0 there is no such form.
template <class Real>
struct SampledSkewReverseKl {
  static constexpr bool kSampled = true;
  Real alpha, attached;
  SkewRatio<Real> ratio;

  DISTILLM_HD explicit SampledSkewReverseKl(RowParameters<Real> row)
      : alpha(row.alpha), attached(row.detach_mixture ? Real(0) : Real(1) - row.alpha), ratio(row.alpha) {}
  DISTILLM_HD static bool legal(RowParameters<Real> row) { return row.alpha > Real(0) && row.alpha <= Real(1); }
  DISTILLM_HD static Real constant(RowParameters<Real> row) { return -std::log(row.alpha); }
  DISTILLM_HD Term<Real> operator()(Entry<Real> e, Real share) const {
    if (e.q == Real(0)) return {Real(0), Real(0)};
    const Real q_over_m = ratio(e.q, e.p), x = (Real(1) - alpha) * e.p / (alpha * e.q);
    // 1 + x loses the digits of a small x; a large x may overflow, so that log(m / (alpha q)) is taken apart.
    const Real mixture = alpha * e.q + (Real(1) - alpha) * e.p;
    const Real log_1_x = x > Real(1) ? (log2_fast(mixture / alpha) - e.log2_q) * Real(kLn2) : std::log1p(x);
    const Real value = -share * (e.q / e.p * log_1_x);
    return {value, value + share * attached * q_over_m};
  }
};

// 1/2 sum |p - q| = E_p max(0, 1 - q/p): G = -q/p where q < p.
template <class Real>
struct SampledTotalVariation {
  static constexpr bool kSampled = true;
  DISTILLM_HD explicit SampledTotalVariation(RowParameters<Real>) {}
  DISTILLM_HD static bool legal(RowParameters<Real>) { return true; }
  DISTILLM_HD static Real constant(RowParameters<Real>) { return Real(0); }
  DISTILLM_HD Term<Real> operator()(Entry<Real> e, Real share) const {
    const Real ratio = e.q / e.p;
    if (!(ratio < Real(1))) return {Real(0), Real(0)};
    return {share * (Real(1) - ratio), ratio < Real(1 - kTie<Real>) ? -share * ratio : Real(0)};
  }
};

// X(name of the public API, divergence for alpha > 0, divergence at alpha = 0)
#define DISTILLM_FOR_EACH_SPARSE_DIVERGENCE(X)      \
  X("forward_kl", ForwardKl, ForwardKl)             \
  X("reverse_kl", ReverseKl, ReverseKl)             \
  X("skew_kl", SkewKl, ForwardKl)                   \
  X("skew_reverse_kl", SkewReverseKl, ReverseKl)    \
  X("generalized_js", GeneralizedJs, GeneralizedJs) \
  X("total_variation", KeptTotalVariation, KeptTotalVariation)

// X(name of the public API, importance form for alpha > 0, importance form at alpha = 0 where it has one)
#define DISTILLM_FOR_EACH_SAMPLED_DIVERGENCE(X)                    \
  X("forward_kl", SampledForwardKl, SampledForwardKl)              \
  X("skew_kl", SampledSkewKl, SampledForwardKl)                    \
  X("skew_reverse_kl", SampledSkewReverseKl, SampledSkewReverseKl) \
  X("total_variation", SampledTotalVariation, SampledTotalVariation)

}  // namespace DISTILLM_ISA
}  // namespace distillm
