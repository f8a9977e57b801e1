// Reductions over all threads of a cluster, whose result every thread receives. Deterministic: the shape of the tree
// depends on the sizes of block and cluster alone, and all lanes combine the same pairs.
#pragma once

#include <math_constants.h>

#include "cluster.cuh"
#include "reduce.cuh"

namespace distillm {

// The sum of exp2(z * scale - shift) over the logits seen, one multiply-add and one exponential each. The shift is that
// of any logit, such as the row's first, and is raised when the sum grows too large for it: the range of float leaves
// room for that to be rare. -FLT_MAX stands for -inf as a shift, so that a sum over nothing but -inf is 0 and not NaN;
// a NaN or +inf among the logits makes the sum NaN or +inf.
struct ShiftedSum {
  float minus_shift, sum;  // the shift as it is added, which saves its negation

  __device__ static ShiftedSum from(float logit, float scale) { return {-fmaxf(logit * scale, -FLT_MAX), 0.0f}; }

  template <int N>
  __device__ void add(const float (&z)[N], float scale) {
    float more = total(z, scale);
    if (!(more < kLargeSum)) {  // rare, or NaN
      float highest = z[0];
#pragma unroll
      for (int i = 1; i < N; ++i) highest = fmaxf(highest, z[i]);
      raise(fminf(minus_shift, -highest * scale));
      more = total(z, scale);
    }
    sum += more;
  }

  // To a larger shift. __fmul_rn is never contracted with a later sum: lanes that exchange sums stay bit-identical.
  __device__ void raise(float minus_higher) {
    sum = __fmul_rn(sum, exp2_fast(minus_higher - minus_shift));
    minus_shift = minus_higher;
  }
  __device__ bool usable() const { return sum > 0 && sum < CUDART_INF_F; }

 private:
  static constexpr float kLargeSum = 1.2089258e24f;  // 2^80: with 2^31 such sums there is no overflow

  template <int N>
  __device__ float total(const float (&z)[N], float scale) const {
    float total = exp2_fast(fmaf(z[0], scale, minus_shift));
#pragma unroll
    for (int i = 1; i < N; ++i) total += exp2_fast(fmaf(z[i], scale, minus_shift));
    return total;
  }
};

// How values combine over groups of kLanes neighbouring lanes, a power of two. empty(other): the value that changes
// nothing where it is combined with `other`.
struct Add {
  using Value = float;

  __device__ Value empty(Value) const { return 0.0f; }
  template <int kLanes>
  __device__ Value lanes(Value x) const {
    return warp_sum<kLanes>(x);
  }
};

struct Highest {
  using Value = float;

  __device__ Value empty(Value) const { return -CUDART_INF_F; }
  template <int kLanes>
  __device__ Value lanes(Value x) const {
    return warp_max<kLanes>(x);
  }
};

struct AddExponentials {
  using Value = ShiftedSum;

  __device__ Value empty(Value other) const { return {other.minus_shift, 0.0f}; }
  // Shifts are nearly always those of the row's first logit in all threads.
  template <int kLanes>
  __device__ Value lanes(Value x) const {
    const float of_first = __shfl_sync(kAllLanes, x.minus_shift, 0);
    if (!__all_sync(kAllLanes, x.minus_shift == of_first)) x.raise(-warp_max<kLanes>(-x.minus_shift));
    x.sum = warp_sum<kLanes>(x.sum);
    return x;
  }
};

constexpr int kMaxBlockWarps = 12;

// A reduction has three steps, so that several share their barriers:
//
//   publish()                            every warp leaves its result in shared memory
//   __syncthreads()
//   share()                              the first warp combines those and writes the block's result to every block
//   Cluster::synchronize()
//   total()                              every thread combines the results of the blocks, from its own shared memory
//
// Blocks write to others and read from themselves: after the last barrier any of them may exit. One Partials serves one
// reduction.
template <class Combine>
struct Partials {
  using Value = typename Combine::Value;
  Value of_warp[kMaxBlockWarps], of_block[kMaxCluster];

  __device__ void publish(const Combine& combine, Value x) {
    x = combine.template lanes<kWarp>(x);
    if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = x;
  }
  __device__ void share(const Combine& combine, const Cluster& cluster) {
    const int lane = threadIdx.x;
    const bool used = lane < static_cast<int>(blockDim.x) / kWarp;
    const Value x = combine.template lanes<kWarp>(used ? of_warp[lane] : combine.empty(of_warp[0]));
    cluster.to_all_blocks(of_block + cluster.rank, x);
  }
  __device__ Value total(const Combine& combine, const Cluster& cluster) const {
    if (cluster.size == 1) return of_block[0];
    const int block = threadIdx.x % kMaxCluster;
    return combine.template lanes<kMaxCluster>(block < cluster.size ? of_block[block] : combine.empty(of_block[0]));
  }
  // All steps of one reduction, where nothing else shares the barriers.
  __device__ Value over(const Combine& combine, Value x, const Cluster& cluster) {
    publish(combine, x);
    __syncthreads();
    if (threadIdx.x < kWarp) share(combine, cluster);
    cluster.synchronize();
    return total(combine, cluster);
  }
};

// Partials of kCount sums, which share their shuffles: at each of the first steps lanes exchange half of their sums, so
// that in the end those with equal lane % kCount hold one of them.
template <int kCount>
struct JointPartials {
  using Values = float[kCount];
  Values of_warp[kMaxBlockWarps], of_block[kMaxCluster];

  __device__ void publish(const Values& x) {
    const float sum = lanes_apart<kCount, kWarp>(scattered(x));
    const int lane = threadIdx.x % kWarp;
    if (lane < kCount) of_warp[threadIdx.x / kWarp][lane] = sum;
  }
  __device__ void share(const Cluster& cluster) {
    const int lane = threadIdx.x;
    float sum = 0;
    for (int warp = lane / kCount; warp < static_cast<int>(blockDim.x) / kWarp; warp += kWarp / kCount) {
      sum += of_warp[warp][lane % kCount];
    }
    cluster.to_all_blocks<kCount>(of_block[cluster.rank], lanes_apart<kCount, kWarp>(sum));
  }
  __device__ void totals(const Cluster& cluster, Values& x) const {
    const int lane = threadIdx.x % (kCount * kMaxCluster);
    const bool filled = lane < kCount * cluster.size;
    const float sum = lanes_apart<kCount, kCount * kMaxCluster>(filled ? of_block[0][lane] : 0.0f);
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = __shfl_sync(kAllLanes, sum, i);
  }

 private:
  // The sum over lanes that are multiples of `from` apart, in groups of `to`.
  template <int from, int to>
  __device__ static float lanes_apart(float x) {
#pragma unroll
    for (int lane = from; lane < to; lane *= 2) x += __shfl_xor_sync(kAllLanes, x, lane);
    return x;
  }
  // Lane l: the sum of x[l % kCount] over the kCount lanes around it.
  __device__ static float scattered(const Values& x) {
    float sums[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) sums[i] = x[i];
#pragma unroll
    for (int bit = 1; bit < kCount; bit *= 2) {
      const bool odd = threadIdx.x & bit;
#pragma unroll
      for (int i = 0; i < kCount / bit / 2; ++i) {
        const float mine = odd ? sums[2 * i + 1] : sums[2 * i], other = odd ? sums[2 * i] : sums[2 * i + 1];
        sums[i] = mine + __shfl_xor_sync(kAllLanes, other, bit);
      }
    }
    return sums[0];
  }
};

}  // namespace distillm
