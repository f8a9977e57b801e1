// The divergences from a compressed teacher as a choice at run time: only K entries per row ask for it, so that one
// kernel per dtype serves them all.
#pragma once

#include "../../math/sparse_divergence.h"

namespace distillm {

enum class KeptForm : int32_t {
#define DISTILLM_FORM(public_name, D, Z, Any) k##Any,
  DISTILLM_FOR_EACH_SPARSE_DIVERGENCE(DISTILLM_FORM) DISTILLM_FOR_EACH_SAMPLED_DIVERGENCE(DISTILLM_FORM)
#undef DISTILLM_FORM
      kNone
};

// use(functor of the form).
template <class Use>
__device__ __forceinline__ auto with_form(KeptForm form, RowParameters<float> row, Use use) {
  switch (form) {
#define DISTILLM_FORM(public_name, D, Z, Any) \
  case KeptForm::k##Any: return use(Exact<Any, float>(row));
    DISTILLM_FOR_EACH_SPARSE_DIVERGENCE(DISTILLM_FORM)
#undef DISTILLM_FORM
#define DISTILLM_FORM(public_name, D, Z, Any) \
  case KeptForm::k##Any: return use(Any<float>(row));
    DISTILLM_FOR_EACH_SAMPLED_DIVERGENCE(DISTILLM_FORM)
#undef DISTILLM_FORM
    default: return use(Exact<ForwardKl, float>(row));
  }
}

// The bucket's term: t from the teacher, r from the student; nothing where the tail has no bucket. A student without
// any mass off S is a constant.
__device__ __forceinline__ Term<float> bucket_term(KeptForm form, Tail tail, float log2_t, float log2_r,
                                                   RowParameters<float> row) {
  return with_form(form, row, [=](auto terms) -> Term<float> {
    using Terms = decltype(terms);
    if constexpr (Terms::kSampled) {
      return {0, 0};
    } else {
      if (tail == Tail::kRenormalize || (tail == Tail::kTruncate && Terms::infinite_without_teacher(row)))
        return {0, 0};
      const float log2_p = tail == Tail::kTruncate ? -INFINITY : log2_t;
      const float bounded = fmaxf(log2_r, static_cast<float>(kLog2LeastTail));
      const Term<float> term = terms({log2_p, bounded, exp2_fast(log2_p), exp2_fast(log2_r)}, 0.0f);
      return {term.value, log2_r < static_cast<float>(kLog2LeastTail) ? 0.0f : term.g};
    }
  });
}

}  // namespace distillm
