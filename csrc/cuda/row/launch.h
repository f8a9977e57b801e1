// What every launcher needs from torch: the tensor's device made current, torch's stream there, storage types as
// numbers.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/shim_utils.h>

#include "../../ops/divergence.h"
#include "row_pair.cuh"

namespace distillm {

// Makes the device of a tensor current for its lifetime.
class DeviceScope {
 public:
  explicit DeviceScope(const Tensor& tensor) : index_(tensor.get_device_index()), guard_(index_) {}

  cudaStream_t stream() const {
    void* stream = nullptr;
    // Not STABLE_TORCH_ERROR_CODE_CHECK, which the headers of the oldest torch promised do not have.
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    return static_cast<cudaStream_t>(stream);
  }
  int index() const { return index_; }
  int attribute(cudaDeviceAttr attribute) const {
    int value = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, index_));
    return value;
  }

 private:
  torch::stable::accelerator::DeviceIndex index_;
  torch::stable::accelerator::DeviceGuard guard_;
};

inline ElementType element_type(ScalarType type) {
  switch (type) {
    case ScalarType::BFloat16: return ElementType::kBFloat16;
    case ScalarType::Half: return ElementType::kHalf;
    default: return ElementType::kFloat;
  }
}

// The kernels count rows in grid.x and entries of a row in int32.
inline void check_grid(int64_t rows, int64_t vocab) {
  STD_TORCH_CHECK(rows <= INT32_MAX, "the CUDA kernels take up to ", INT32_MAX, " rows in one call, got ", rows,
                  "; split the rows over several calls");
  STD_TORCH_CHECK(vocab <= INT32_MAX / 2, "the CUDA kernels take a vocabulary up to ", INT32_MAX / 2, ", got ", vocab);
}

}  // namespace distillm
