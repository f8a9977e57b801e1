// What the kernels of packed records share.
#pragma once

#include "../row/reduce.cuh"

namespace distillm {

// Dynamic shared memory of a block: the words of a record, then one number and one id per entry.
__device__ __forceinline__ uint32_t* record_words() {
  extern __shared__ uint32_t shared[];
  return shared;
}

// A partial array may be used again after the next barrier.
__device__ __forceinline__ float block_sum(float x, PartialSums& partial) {
  publish(x, partial);
  __syncthreads();
  return collect(partial);
}

}  // namespace distillm
