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
  float shift, sum;

  __device__ static ShiftedSum from(float logit, float scale) { return {fmaxf(logit * scale, -FLT_MAX), 0.0f}; }
  __device__ static ShiftedSum empty() { return {-FLT_MAX, 0.0f}; }

  template <int N>
  __device__ void add(const float (&z)[N], float scale) {
    float more = total(z, scale);
    if (!(more < kLargeSum)) {  // rare, or NaN
      float highest = z[0];
#pragma unroll
      for (int i = 1; i < N; ++i) highest = fmaxf(highest, z[i]);
      raise(fmaxf(shift, highest * scale));
      more = total(z, scale);
    }
    sum += more;
  }

  // __fmul_rn is never contracted with a later sum: lanes that exchange sums stay bit-identical.
  __device__ void raise(float higher) {
    sum = __fmul_rn(sum, exp2_fast(shift - higher));
    shift = higher;
  }
  __device__ bool usable() const { return sum > 0 && sum < CUDART_INF_F; }

 private:
  static constexpr float kLargeSum = 1.2089258e24f;  // 2^80: with 2^31 such sums there is no overflow

  template <int N>
  __device__ float total(const float (&z)[N], float scale) const {
    float total = exp2_fast(fmaf(z[0], scale, -shift));
#pragma unroll
    for (int i = 1; i < N; ++i) total += exp2_fast(fmaf(z[i], scale, -shift));
    return total;
  }
};

// How values combine over groups of kLanes neighbouring lanes, a power of two.
struct Add {
  using Value = float;

  __device__ Value empty() const { return 0.0f; }
  template <int kLanes>
  __device__ Value lanes(Value x) const {
    return warp_sum<kLanes>(x);
  }
};

struct Highest {
  using Value = float;

  __device__ Value empty() const { return -CUDART_INF_F; }
  template <int kLanes>
  __device__ Value lanes(Value x) const {
    return warp_max<kLanes>(x);
  }
};

struct AddExponentials {
  using Value = ShiftedSum;

  __device__ Value empty() const { return ShiftedSum::empty(); }
  template <int kLanes>
  __device__ Value lanes(Value x) const {
    x.raise(warp_max<kLanes>(x.shift));
    x.sum = warp_sum<kLanes>(x.sum);
    return x;
  }
};

constexpr int kMaxBlockWarps = 16;

// A reduction has three steps, so that several share their barriers:
//
//   publish()                            every warp leaves its result in shared memory
//   __syncthreads()
//   share()                              the first warp combines those and writes the block's result to every block
//   Cluster::synchronize()
//   total()                              every thread combines the results of the blocks, from its own shared memory
//
// Blocks write to others and read from themselves: after the last barrier any of them may exit. One Partials serves one
// reduction of a row.
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
    const Value x = combine.template lanes<kWarp>(used ? of_warp[lane] : combine.empty());
    cluster.to_all_blocks(of_block + cluster.rank, x);
  }
  __device__ Value total(const Combine& combine, const Cluster& cluster) const {
    if (cluster.size == 1) return of_block[0];
    const int block = threadIdx.x % kMaxCluster;
    const Value* const received = cluster.received(of_block);
    return combine.template lanes<kMaxCluster>(block < cluster.size ? received[block] : combine.empty());
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

}  // namespace distillm
