// `scale_rows_` on the CPU.
#include "../../ops/scale_rows.h"

#include "../row/tiles.h"

namespace distillm {
namespace {

template <class Storage, class Real>
void scale_range(void* data, RowLayout rows, const void* scale, int64_t columns, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const Real factor = static_cast<const Real*>(scale)[row];
    if (factor == 1) continue;
    Storage* values = static_cast<Storage*>(data) + rows.offset(row);
#pragma omp simd
    for (int64_t i = 0; i < columns; ++i) {
      values[i] = FromReal<Storage>::convert(static_cast<Real>(to_real(values[i])) * factor);
    }
  }
}

using ScaleRange = void (*)(void*, RowLayout, const void*, int64_t, int64_t, int64_t);

ScaleRange range_for(ScalarType type) {
  switch (type) {
    case ScalarType::Double: return scale_range<double, double>;
    case ScalarType::BFloat16: return scale_range<BFloat16, float>;
    case ScalarType::Half: return scale_range<Half, float>;
    default: return scale_range<float, float>;
  }
}

void scale_rows_(Tensor gradient, const Tensor& scale) {
  check_scale_rows(gradient, scale);
  const int64_t columns = vocab_of(gradient);
  const RowLayout rows = layout_of(gradient);
  const ScaleRange range = range_for(gradient.scalar_type());
  void* data = gradient.data_ptr();
  const Tensor factors = torch::stable::contiguous(scale);
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, columns));
  torch::stable::parallel_for(0, rows_of(gradient), grain, [&](int64_t begin, int64_t end) {
    range(data, rows, factors.data_ptr(), columns, begin, end);
  });
}

}  // namespace
}  // namespace distillm

STABLE_TORCH_LIBRARY_IMPL(distillm_ext, CPU, m) { m.impl("scale_rows_", TORCH_BOX(&distillm::scale_rows_)); }
