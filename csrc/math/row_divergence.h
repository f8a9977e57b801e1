// What the divergences need that look at more than one entry of a row.
//
//   interpolated (t)   KL(p_t || q), p_t = softmax(((1 - t) z_student + t z_teacher) / T) held constant: ForwardKl of
//                      math/divergence.h with blended logits in the teacher's place. TAID (Shing et al., ICLR 2025).
//   adaptive_kl (mu)   (1 - s) KL(p || q) + s KL(q || p): SymmetricKl with a share s of the row's own, held constant:
//                      s = g_tail / (g_head + g_tail), g = sum |p - q| over head and tail. The head holds the teacher's
//                      top token and every token whose cumulative mass, in descending order and itself included, is at
//                      most mu; equal logits are ordered by ascending id. AKL (Wu et al., COLING 2025).
#pragma once

#include "divergence.h"
#include "ordered_key.h"

namespace distillm {
inline namespace DISTILLM_ISA {

template <class Real>
constexpr Real kMinusInfinity = -std::numeric_limits<Real>::infinity();

// (1 - t) student + t teacher, 0 <= t <= 1. Both are logits less the largest of their row: far from each other they
// would lose their digits in the difference. Exactly the student where both are equal, and the plain side at t = 0 and
// t = 1; an entry of -inf on a side that counts is -inf. A NaN of the teacher stays one.
template <class Real>
DISTILLM_HD Real blended_between(Real student, Real teacher, Real t) {  // 0 < t < 1
  return student == kMinusInfinity<Real> ? student : student + t * (teacher - student);
}
template <class Real>
DISTILLM_HD Real blended_logit(Real student, Real teacher, Real t) {
  const Real between = blended_between(student, teacher, t);
  const Real blended = student == teacher ? student : t == Real(0) ? student : t == Real(1) ? teacher : between;
  return teacher == teacher ? blended : teacher;
}

// The share of the reverse divergence in adaptive_kl.
template <class Real>
DISTILLM_HD Real adaptive_share(Real g_head, Real g_tail) {
  const Real total = g_head + g_tail;
  return total > Real(0) ? g_tail / total : Real(0.5);
}

}  // namespace DISTILLM_ISA
}  // namespace distillm
