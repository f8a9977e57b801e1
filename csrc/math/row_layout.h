// Where the rows of a tensor [rows, V] or [blocks, rows_per_block, V] begin: logits[:, :-1] is read where it is.
#pragma once

#include <cstdint>

namespace distillm {

// In elements. 64 bits throughout: 65,536 rows of 152,064 entries are more than 2^31.
struct RowLayout {
  int64_t rows_per_block;
  int64_t block_stride;
  int64_t row_stride;

  // One stride from row to row.
  static RowLayout uniform(int64_t row_stride) { return {INT64_MAX, 0, row_stride}; }

  // Blocks that follow each other at the distance of their rows, or a single block, count as uniform.
  static RowLayout of_blocks(int64_t blocks, int64_t rows_per_block, int64_t block_stride, int64_t row_stride) {
    const bool one_stride = blocks <= 1 || block_stride == rows_per_block * row_stride;
    if (one_stride) return uniform(row_stride);
    return rows_per_block == 1 ? uniform(block_stride) : RowLayout{rows_per_block, block_stride, row_stride};
  }

  bool is_uniform() const { return rows_per_block == INT64_MAX; }

#ifdef __CUDACC__
  __host__ __device__
#endif
      int64_t offset(int64_t row) const {
    if (rows_per_block == INT64_MAX) return row * row_stride;
#ifdef __CUDA_ARCH__
    // A grid has fewer than 2^31 rows; a division of 64 bits would be a function call, with registers saved around it.
    const int64_t block = static_cast<uint32_t>(row) / static_cast<uint32_t>(rows_per_block);
#else
    const int64_t block = row / rows_per_block;
#endif
    return block * block_stride + (row - block * rows_per_block) * row_stride;
  }
};

}  // namespace distillm
