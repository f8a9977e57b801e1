// What one entry of two rows of log-probabilities contributes to a divergence, every entry taken by itself.
//
// Logits determine a distribution, and the gradient by one of them sees all others (math/divergence.h, (1)). Here entry
// v of the student is log q_v and that of the teacher log p_v, whatever they sum to: nothing is normalised, and
//
//   dL/d(log q_v) = q_v dL/dq_v = G_v
//
// so the functors of math/divergence.h serve as they are, without softmax statistics and without the sum of G.
#pragma once

#include "divergence.h"

namespace distillm {
inline namespace DISTILLM_ISA {

// exp2_fast for logarithms that may lie above 127, where the CPU's has no result: inf.
DISTILLM_HD float exp2_any(float x) {
#ifdef __CUDA_ARCH__
  return exp2_fast(x);
#else
  const float y = exp2_fast(x > 127.0f ? 127.0f : x);
  return x > 127.0f ? std::numeric_limits<float>::infinity() : y;
#endif
}
DISTILLM_HD double exp2_any(double x) { return exp2_fast(x); }

// kProbabilities: the teacher's entries are p_v, not their logarithms, which are then taken of at least `floor`.
template <class Real, class Functor, bool kProbabilities>
struct LogprobTerms {
  Functor functor;
  Real floor;

  DISTILLM_HD LogprobTerms(Real beta, Real floor) : functor(RowParameters<Real>{0, beta, false}), floor(floor) {}

  // x: of the student, y: of the teacher. -inf on both sides, as entries read that a row lacks, gives exactly 0.
  DISTILLM_HD Real value(Real x, Real y) const { return or_nan(x, y, functor(entry(x, y)).value); }
  DISTILLM_HD Real g(Real x, Real y) const { return or_nan(x, y, functor(entry(x, y)).g); }

 private:
  DISTILLM_HD Entry<Real> entry(Real x, Real y) const {
    const Real log2_q = x * Real(kLog2E);
    if constexpr (kProbabilities) {
      const Real p = y == -std::numeric_limits<Real>::infinity() ? Real(0) : y;
      return {log2_fast(at_least(y, floor)), log2_q, p, exp2_any(log2_q)};
    } else {
      const Real log2_p = y * Real(kLog2E);
      return {log2_p, log2_q, exp2_any(log2_p), exp2_any(log2_q)};
    }
  }
  // The functors do not promise to keep a NaN.
  DISTILLM_HD static Real or_nan(Real x, Real y, Real result) { return x != x ? x : y != y ? y : result; }
};

// Dispatch on both backends is made from this: X(name, functor, whether the teacher's entries are probabilities).
#define DISTILLM_FOR_EACH_LOGPROB_DIVERGENCE(X) \
  X("forward_kl", ForwardKl, false)             \
  X("forward_kl", ForwardKl, true)              \
  X("reverse_kl", ReverseKl, false)             \
  X("generalized_js", GeneralizedJs, false)

}  // namespace DISTILLM_ISA
}  // namespace distillm
