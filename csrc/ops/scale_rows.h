// Contract of the operator `scale_rows_`: row r of gradient [R, V] or [B, S, V] (R = B S) times scale[r], in place;
// unit stride along V, any along the others. A row whose scale is exactly 1 is not touched, so that a unit upstream
// gradient costs no pass and no synchronisation.
#pragma once

#include "logits.h"

namespace distillm {

inline void check_scale_rows(const Tensor& gradient, const Tensor& scale) {
  check_logits(gradient, "gradient");
  STD_TORCH_CHECK(has_unit_column_stride(gradient), "gradient must have stride 1 along the vocabulary");
  checked_rows(scale, "scale", rows_of(gradient), loss_type(gradient.scalar_type()), gradient);
}

}  // namespace distillm
