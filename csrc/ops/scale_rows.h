// Contract of the operator `scale_rows_`: row r of gradient [R, V] times scale[r], in place. A row whose scale is
// exactly 1 is not touched, so that a unit upstream gradient costs no pass and no synchronisation.
#pragma once

#include "divergence.h"

namespace distillm {

inline void check_scale_rows(const Tensor& gradient, const Tensor& scale) {
  check_logits(gradient, "gradient");
  STD_TORCH_CHECK(gradient.is_contiguous(), "gradient must be contiguous");
  checked_rows(scale, "scale", gradient.size(0), loss_type(gradient.scalar_type()), gradient);
}

}  // namespace distillm
