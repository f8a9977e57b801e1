// Row r of gradient [R, V] (or [B, S, V], any layout of rows) times scale[r], in place.
//
// One block per row; each thread scales chunks of 16 bytes, strided by the block, with a partial chunk at both ends of
// rows that are not aligned. A row whose scale is exactly 1 is neither read nor written, so that a unit upstream
// gradient costs 4 bytes per row, and the host need not look at it. Otherwise each entry is read and written once.
#pragma once

#include "../../math/row_layout.h"
#include "../row/chunk.cuh"

namespace distillm {

constexpr int kScaleRowsThreads = 256;

template <class T>
__global__ void __launch_bounds__(kScaleRowsThreads)
    scale_rows_kernel(T* gradient, RowLayout rows, const float* scale, int32_t vocab) {
  constexpr int N = 16 / sizeof(T);
  const int64_t row = blockIdx.x;
  const float factor = scale[row];
  if (factor == 1) return;
  T* values = gradient + rows.offset(row);
  const int phase = phase_of<T, N>(values);
  for (int first = static_cast<int>(threadIdx.x) * N - phase; first < vocab; first += blockDim.x * N) {
    float x[N];
    const bool inside = first >= 0 && first + N <= vocab;
    unpack(inside ? load_aligned<T, N>(values + first) : load_partial<T, N>(values, vocab, first), x);
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] *= factor;
    store_chunk<T, N>(values, vocab, first, x);
  }
}

}  // namespace distillm
