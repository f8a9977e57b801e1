// Reductions that the kernels of packed records share. Every thread of the block calls them and gets the result.
#pragma once

#include "reduce.cuh"

namespace distillm {

// Dynamic shared memory of a block: the words of a record, then one number and one id per entry.
__device__ __forceinline__ uint32_t* record_words() {
  extern __shared__ uint32_t shared[];
  return shared;
}

__device__ __forceinline__ float block_max(float x, PartialSums& partial) {
  x = warp_max(x);
  const int lane = threadIdx.x % kWarp;
  if (lane == 0) partial[threadIdx.x / kWarp] = x;
  __syncthreads();
  return warp_max(lane < blockDim.x / kWarp ? partial[lane] : -INFINITY);
}

// A partial array may be used again after the next barrier.
__device__ __forceinline__ float block_sum(float x, PartialSums& partial) {
  publish(x, partial);
  __syncthreads();
  return collect(partial);
}

}  // namespace distillm
