// Memory of freed gradients, kept for the next gradient.
//
// A gradient is as large as the logits. The system's allocator hands such a block back to the kernel when it is freed,
// so that the next one costs a page fault per page again, which is more than the arithmetic that fills it.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace distillm {

// A contiguous tensor of the shape, dtype and device of `like`, uninitialised; in kept memory where a block fits. Its
// memory is kept when the last reference to it goes, up to DISTILLM_CPU_CACHE_MIB (1024) in all; the kernel may take
// kept pages back when memory is short. Thread-safe.
torch::stable::Tensor recycled_empty_like(const torch::stable::Tensor& like);

// Frees what is kept and returns how many bytes that were.
int64_t release_gradient_memory();

}  // namespace distillm
