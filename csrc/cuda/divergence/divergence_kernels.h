// The kernels of `divergence` as its launcher sees them. They are instantiated in one translation unit for each type of
// row, which compile side by side and know nothing of torch.
#pragma once

#include <string>

#include "divergence_row.cuh"

namespace distillm {

struct DivergenceKernel {
  void (*function)(DivergenceArguments) = nullptr;  // null: no such divergence
  int slot_bytes = 0, kept_bytes = 0, chunk_entries = 0;
  int64_t static_bytes = 0;
};

// T: the dtype of both sides, or AnyElement where they have two.
template <class T>
DivergenceKernel divergence_kernel_of(const std::string& divergence);

}  // namespace distillm
