// Thread-block clusters: the blocks that work on one row together and reach each other's shared memory.
//
// From compute capability 9.0 on; before that, and where the launch asks for none, a cluster is one block and the
// barrier is the block's.
#pragma once

#include <cuda_runtime.h>

namespace distillm {

constexpr int kMaxCluster = 8;  // the largest size that every device with clusters supports

struct Cluster {
  int size, rank;

  __device__ static Cluster current() {
#if __CUDA_ARCH__ >= 900
    return {static_cast<int>(__clusterSizeInBlocks()), static_cast<int>(__clusterRelativeBlockRank())};
#else
    return {1, 0};
#endif
  }

  // A block's shared memory must not be written before the block has started: every thread calls announce_start() once,
  // and await_start() before its first write to another block. Work between the two hides the wait.
  __device__ void announce_start() const {
#if __CUDA_ARCH__ >= 900
    __cluster_barrier_arrive_relaxed();
#endif
  }
  __device__ void await_start() const {
#if __CUDA_ARCH__ >= 900
    __cluster_barrier_wait();
#endif
  }

  // A barrier of all threads of the cluster, which makes writes to any block's shared memory visible.
  __device__ void synchronize() const {
#if __CUDA_ARCH__ >= 900
    __cluster_barrier_arrive();
    __cluster_barrier_wait();
#else
    __syncthreads();
#endif
  }

  // Lane i of a warp writes x to what block i of the cluster keeps at p, in shared memory. The compiler may look the
  // address up before it asks whether there is such a block.
  template <class T>
  __device__ void to_all_blocks(T* p, const T& x) const {
    const int block = static_cast<int>(threadIdx.x) % 32;
    T* const target = in_block(p, min(block, size - 1));
    if (block < size) *target = x;
  }

  // Where another block of the cluster keeps what this block keeps at p, in shared memory.
  template <class T>
  __device__ T* in_block(T* p, int block) const {
#if __CUDA_ARCH__ >= 900
    return static_cast<T*>(__cluster_map_shared_rank(p, block));
#else
    return p;
#endif
  }

  __device__ int threads() const { return size * static_cast<int>(blockDim.x); }
  __device__ int thread() const { return rank * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x); }
};

}  // namespace distillm
