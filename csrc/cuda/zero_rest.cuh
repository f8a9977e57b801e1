// Zeros in the entries [from, to) of every row of a gradient: those that vocab_size leaves out.
//
// One block per row. Each entry is written once, by itself: they are few.
#pragma once

#include "../math/row_layout.h"
#include "chunk.cuh"

namespace distillm {

constexpr int kZeroRestThreads = 128;

template <class T>
__global__ void __launch_bounds__(kZeroRestThreads)
    zero_rest_kernel(T* gradient, RowLayout rows, int32_t from, int32_t to) {
  T* row = gradient + rows.offset(blockIdx.x);
  for (int v = from + static_cast<int>(threadIdx.x); v < to; v += kZeroRestThreads) Packing<T>::store(row + v, 0.0f);
}

}  // namespace distillm
