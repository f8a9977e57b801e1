// The scalars of a loss, and what divergence and cross-entropy of a row come to:
//
//   loss = weight (min(D, cap) + ce_weight CE)
//   dloss/dz_v = g_scale (G_v - q_v sum G) + ce_scale (softmax_v at T = 1 - [v = label])
//
// A scalar of whole rows is a field of LossScalars and stands in RowLoss, for every kernel; one of single entries is in
// RowParameters (math/divergence.h) too.
#pragma once

#include "divergence.h"

namespace distillm {
inline namespace DISTILLM_ISA {

template <class Real>
struct LossScalars {
  Real alpha, beta, inverse_temperature, ce_weight;
  bool detach_mixture;

  template <class Options>
  static LossScalars of(const Options& options) {
    return {static_cast<Real>(options.alpha), static_cast<Real>(options.beta),
            static_cast<Real>(1 / options.temperature), static_cast<Real>(options.ce_weight), options.detach_mixture};
  }
};

template <class Real>
struct RowLoss {
  Real value;
  bool constant;  // a capped or infinite divergence: it has no gradient, and G may be infinite
  Real g_scale, ce_scale;

  // cross_entropy: not looked at where it has no weight.
  DISTILLM_HD static RowLoss of(const LossScalars<Real>& a, Real weight, Real cap, Real divergence,
                                Real cross_entropy) {
    const Real infinity = std::numeric_limits<Real>::infinity();
    const bool capped = divergence > cap, constant = capped || divergence == infinity;
    const Real ce = a.ce_weight != 0 ? a.ce_weight * cross_entropy : Real(0);
    // What is infinite has no gradient to follow; a capped divergence none by definition.
    return {weight * ((capped ? cap : divergence) + ce), constant, constant ? Real(0) : weight * a.inverse_temperature,
            ce == infinity ? Real(0) : weight * a.ce_weight};
  }
};

}  // namespace DISTILLM_ISA
}  // namespace distillm
