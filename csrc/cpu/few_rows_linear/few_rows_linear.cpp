// `few_rows_linear` on the CPU: the columns of the result are shared out over torch's threads.
#include <algorithm>

#include "../instruction_sets/row_kernels.h"

namespace distillm {
namespace {

// A call into the dispatcher costs as much as a small product: no call where there is nothing to do.
Tensor dense(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

Tensor few_rows_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  check_few_rows_linear(x, weight, bias);
  const int64_t rows = x.size(0), columns = weight.size(0), depth = x.size(1);
  Tensor out = torch::stable::new_empty(x, {rows, columns});
  if (rows == 0 || columns == 0) return out;
  // The rows are few: as float32 they are converted once and not at every use.
  const Tensor whole = dense(x.scalar_type() == ScalarType::Float ? x : torch::stable::to(x, ScalarType::Float));
  const Tensor w = dense(weight);
  const Tensor b = bias ? dense(*bias) : w;
  const FewRowsLinearCall call{static_cast<const float*>(whole.data_ptr()),
                               w.data_ptr(),
                               bias ? b.data_ptr() : nullptr,
                               out.data_ptr(),
                               rows,
                               columns,
                               depth,
                               weight.scalar_type() == ScalarType::BFloat16};
  const FewRowsLinearColumns columns_of = row_kernels().few_rows_linear;
  // A task reads at least 256 KB of weights; whole tiles of three columns.
  const int64_t grain = std::max<int64_t>(1, 65536 / std::max<int64_t>(1, depth)) * 3;
  torch::stable::parallel_for(0, columns, grain, [&](int64_t begin, int64_t end) { columns_of(call, begin, end); });
  return out;
}

}  // namespace
}  // namespace distillm

STABLE_TORCH_LIBRARY_IMPL(distillm_ext, CPU, m) { m.impl("few_rows_linear", TORCH_BOX(&distillm::few_rows_linear)); }
