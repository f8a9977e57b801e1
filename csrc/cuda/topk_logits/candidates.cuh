// Gathered entries of a row as sortable keys, and a block's sort.
#pragma once

#include "../../math/ordered_key.h"

namespace distillm {

// Constants, not CUDART_INF_F: that is a call, which the host's view of a template cannot resolve.
constexpr float kInfinity = __builtin_huge_valf(), kNaN = __builtin_nanf("");

// Larger is earlier: value descending, id ascending on ties, -0 equal to 0. No entry above -inf has the key 0.
__device__ __forceinline__ uint64_t candidate_key(float value, int32_t id) {
  return static_cast<uint64_t>(ordered_key(value)) << 32 | ~static_cast<uint32_t>(id);
}
__device__ __forceinline__ float candidate_value(uint64_t key) {
  return number_of_key(static_cast<uint32_t>(key >> 32));
}
__device__ __forceinline__ int32_t candidate_id(uint64_t key) {
  return static_cast<int32_t>(~static_cast<uint32_t>(key));
}

// Keys in descending order, in shared or global memory; `companions`, where there are any, move along. The array has
// room for the next power of two, which is filled up with 0. Called by the whole block; the sorted keys are visible to
// all of it on return. Bitonic: the steps depend on the size alone.
template <bool kCompanions>
__device__ void sort_keys(uint64_t* keys, int32_t* companions, int32_t count) {
  int32_t size = 2;
  while (size < count) size *= 2;
  for (int32_t i = count + threadIdx.x; i < size; i += blockDim.x) keys[i] = 0;
  for (int32_t run = 2; run <= size; run *= 2) {
    for (int32_t distance = run / 2; distance > 0; distance /= 2) {
      __syncthreads();
      for (int32_t pair = threadIdx.x; pair < size / 2; pair += blockDim.x) {
        const int32_t low = 2 * pair - (pair & (distance - 1)), high = low + distance;
        const uint64_t a = keys[low], b = keys[high];
        if ((a < b) != ((low & run) == 0)) continue;
        keys[low] = b;
        keys[high] = a;
        if (kCompanions) {
          const int32_t moved = companions[low];
          companions[low] = companions[high];
          companions[high] = moved;
        }
      }
    }
  }
  __syncthreads();
}

}  // namespace distillm
