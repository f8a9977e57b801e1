// Reductions over a block, whose result every thread receives. Deterministic: the shape of the tree depends on the
// block size alone, and all lanes add the same pairs.
#pragma once

#include <cfloat>

#include "../../math/exponential.h"

namespace distillm {

constexpr int kWarp = 32;
constexpr int kMaxWarps = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Largest logit seen and the sum of exp2((z - maximum) * scale) over the logits seen. An empty one has the lowest
// finite maximum instead of -inf, so that threads which saw nothing but -inf add 0 and not NaN; a NaN or +inf among the
// logits makes the sum NaN.
struct ExpSum {
  float maximum, sum;

  __device__ static ExpSum empty() { return {-FLT_MAX, 0.0f}; }

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

// Over groups of kLanes neighbouring lanes, a power of two.
template <int kLanes = kWarp>
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int lane = kLanes / 2; lane > 0; lane /= 2) x += __shfl_xor_sync(kAllLanes, x, lane);
  return x;
}

template <int kLanes = kWarp>
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int lane = kLanes / 2; lane > 0; lane /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, lane));
  return x;
}

// Integers: the sum over a warp, and over this lane and the ones below.
__device__ __forceinline__ unsigned long long warp_total(unsigned long long x) {
#pragma unroll
  for (int lane = kWarp / 2; lane > 0; lane /= 2) x += __shfl_xor_sync(kAllLanes, x, lane);
  return x;
}

__device__ __forceinline__ unsigned long long warp_inclusive(unsigned long long x) {
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const unsigned long long lower = __shfl_up_sync(kAllLanes, x, step);
    if (threadIdx.x % kWarp >= step) x += lower;
  }
  return x;
}

__device__ __forceinline__ ExpSum warp_combine(ExpSum x, float scale) {
  x.raise(warp_max(x.maximum), scale);
  x.sum = warp_sum(x.sum);
  return x;
}

// A reduction has two halves with a barrier between them, so that several share one barrier: every warp publishes its
// result, then every warp collects all of them for itself. An array serves one reduction per block.
using PartialSums = float[kMaxWarps];
using PartialExpSums = ExpSum[kMaxWarps];

__device__ __forceinline__ void publish(float x, PartialSums& partial) {
  x = warp_sum(x);
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = x;
}

__device__ __forceinline__ void publish(ExpSum x, float scale, PartialExpSums& partial) {
  x = warp_combine(x, scale);
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = x;
}

__device__ __forceinline__ void publish_maximum(float x, PartialSums& partial) {
  x = warp_max(x);
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = x;
}

__device__ __forceinline__ float collect_maximum(const PartialSums& partial) {
  const int lane = threadIdx.x % kWarp;
  return warp_max(lane < blockDim.x / kWarp ? partial[lane] : -INFINITY);
}

// Both halves.
__device__ __forceinline__ float block_max(float x, PartialSums& partial) {
  publish_maximum(x, partial);
  __syncthreads();
  return collect_maximum(partial);
}

__device__ __forceinline__ float collect(const PartialSums& partial) {
  const int lane = threadIdx.x % kWarp;
  return warp_sum(lane < blockDim.x / kWarp ? partial[lane] : 0.0f);
}

__device__ __forceinline__ ExpSum collect(const PartialExpSums& partial, float scale) {
  const int lane = threadIdx.x % kWarp;
  return warp_combine(lane < blockDim.x / kWarp ? partial[lane] : ExpSum::empty(), scale);
}

}  // namespace distillm
