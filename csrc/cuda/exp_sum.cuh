// Sums over a block whose result every thread receives, for kernels of one block per row: of floats, and of
// exponentials with their largest argument. Deterministic: the shape of the tree depends on the block size alone.
#pragma once

#include <cfloat>

#include "../math/exponential.h"

namespace distillm {
namespace block {

constexpr int kLanes = 32;
constexpr int kMostWarps = 32;
constexpr unsigned kEveryLane = 0xffffffffu;

// Largest z seen and the sum of exp2((z - maximum) * scale). An empty one has the lowest finite maximum instead of
// -inf, so that threads which saw nothing but -inf add 0 and not NaN; a NaN or +inf makes the sum NaN.
struct ExpSum {
  float maximum = -FLT_MAX, sum = 0;

  template <int N>
  __device__ void add(const float (&z)[N], float scale) {
    float higher = maximum;
#pragma unroll
    for (int i = 0; i < N; ++i) higher = fmaxf(higher, z[i]);
    raise(higher, scale);
#pragma unroll
    for (int i = 0; i < N; ++i) sum += exp2_fast((z[i] - maximum) * scale);
  }

  // __fmul_rn is never contracted with a later sum: lanes that exchange sums stay bit-identical.
  __device__ void raise(float higher, float scale) {
    sum = __fmul_rn(sum, exp2_fast((maximum - higher) * scale));
    maximum = higher;
  }

  __device__ ExpSum with(ExpSum other, float scale) const {
    const float higher = fmaxf(maximum, other.maximum);
    ExpSum a = *this;
    a.raise(higher, scale);
    other.raise(higher, scale);
    return {higher, a.sum + other.sum};
  }

  // log2 of the sum of exp2(z * scale) relative to that of `all`.
  __device__ float log2_share(const ExpSum& all, float scale) const {
    return log2f(sum) + (maximum - all.maximum) * scale - log2f(all.sum);
  }
};

__device__ __forceinline__ float over_warp(float x) {
#pragma unroll
  for (int lane = kLanes / 2; lane > 0; lane /= 2) x += __shfl_xor_sync(kEveryLane, x, lane);
  return x;
}

__device__ __forceinline__ ExpSum over_warp(ExpSum x, float scale) {
  float higher = x.maximum;
#pragma unroll
  for (int lane = kLanes / 2; lane > 0; lane /= 2) higher = fmaxf(higher, __shfl_xor_sync(kEveryLane, higher, lane));
  x.raise(higher, scale);
  x.sum = over_warp(x.sum);
  return x;
}

// Two halves with a barrier between them, so that several sums share it: every warp leaves its own, then every warp
// adds all of them. An array serves one sum.
struct Sums {
  float of_warp[kMostWarps];

  __device__ void leave(float x) {
    x = over_warp(x);
    if (threadIdx.x % kLanes == 0) of_warp[threadIdx.x / kLanes] = x;
  }
  __device__ float total() const {
    const int lane = threadIdx.x % kLanes;
    return over_warp(lane < blockDim.x / kLanes ? of_warp[lane] : 0.0f);
  }
};

struct ExpSums {
  float maximum[kMostWarps], sum[kMostWarps];

  __device__ void leave(ExpSum x, float scale) {
    x = over_warp(x, scale);
    if (threadIdx.x % kLanes == 0) {
      maximum[threadIdx.x / kLanes] = x.maximum;
      sum[threadIdx.x / kLanes] = x.sum;
    }
  }
  __device__ ExpSum total(float scale) const {
    const int lane = threadIdx.x % kLanes;
    return over_warp(lane < blockDim.x / kLanes ? ExpSum{maximum[lane], sum[lane]} : ExpSum{}, scale);
  }
};

}  // namespace block
}  // namespace distillm
