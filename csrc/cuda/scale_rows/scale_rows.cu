// `scale_rows_` on CUDA.
#include "../../ops/scale_rows.h"
#include "../row/launch.h"
#include "scale_rows.cuh"

namespace distillm {
namespace {

template <class T>
void launch(Tensor& gradient, const Tensor& scale, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(rows_of(gradient)));
  scale_rows_kernel<T><<<grid, kScaleRowsThreads, 0, stream>>>(
      static_cast<T*>(gradient.data_ptr()), layout_of(gradient), static_cast<const float*>(scale.data_ptr()),
      static_cast<int32_t>(vocab_of(gradient)));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void scale_rows_(Tensor gradient, const Tensor& scale) {
  check_scale_rows(gradient, scale);
  check_grid(rows_of(gradient), vocab_of(gradient));
  if (gradient.numel() == 0) return;
  const DeviceScope device(gradient);
  const Tensor factors = torch::stable::contiguous(scale);
  switch (element_type(gradient.scalar_type())) {
    case ElementType::kBFloat16: return launch<BFloat16>(gradient, factors, device.stream());
    case ElementType::kHalf: return launch<Half>(gradient, factors, device.stream());
    default: return launch<float>(gradient, factors, device.stream());
  }
}

}  // namespace
}  // namespace distillm

STABLE_TORCH_LIBRARY_IMPL(distillm_ext, CUDA, m) { m.impl("scale_rows_", TORCH_BOX(&distillm::scale_rows_)); }
