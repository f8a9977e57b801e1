// The blocks that work on one row together: a thread-block cluster, whose blocks reach each other's shared memory.
//
// Clusters exist from compute capability 9.0 on. Before that, and where the launch asks for none, a cluster is one
// block, and its barrier is the block's.
//
// Every thread of the cluster comes to the same barriers, in this order, or to none (a row that needs no exchange):
//
//   arrive()         this block has started
//   wait()           all blocks have started: before the first write to the shared memory of another
//   synchronize()    once per exchange: what was written to any block before it can be read after it
//
// The exchanges of `divergence`: sums of the softmaxes; what its member asks for; value and G; the member's again. Of
// `sample_tokens`: reference of the bins; statistics; brackets; pass 2; what the leader found; end.
//
// A block must not exit while another may still reach its shared memory: blocks write to others and read their own
// after the barrier (cluster_reduce.cuh), or meet once more at the end (sample_tokens.cuh).
#pragma once

#include <cuda_runtime.h>

namespace distillm {

constexpr int kMaxCluster = 8;  // the largest size that every device with clusters supports

struct Cluster {
  int size, rank;

#if __CUDA_ARCH__ >= 900
  __device__ static Cluster current() {
    return {static_cast<int>(__clusterSizeInBlocks()), static_cast<int>(__clusterRelativeBlockRank())};
  }
  // The two halves of the first barrier, which orders no memory; work between them hides the wait.
  __device__ void arrive() const { __cluster_barrier_arrive_relaxed(); }
  __device__ void wait() const { __cluster_barrier_wait(); }

  __device__ void synchronize() const {
    __cluster_barrier_arrive();
    __cluster_barrier_wait();
  }

  // Where another block of the cluster keeps what this block keeps at p, in shared memory.
  template <class T>
  __device__ T* in_block(T* p, int block) const {
    return static_cast<T*>(__cluster_map_shared_rank(p, block));
  }
#else
  __device__ static Cluster current() { return {1, 0}; }
  __device__ void arrive() const {}
  __device__ void wait() const {}
  __device__ void synchronize() const { __syncthreads(); }
  template <class T>
  __device__ T* in_block(T* p, int) const {
    return p;
  }
#endif

  // A warp writes kCount values, which lanes l with equal l % kCount hold, to what every block of the cluster keeps at
  // p, in shared memory. The compiler may look an address up before it asks whether there is such a block.
  template <int kCount = 1, class T>
  __device__ void to_all_blocks(T* p, const T& x) const {
    static_assert(32 % kCount == 0 && kCount * kMaxCluster <= 32, "one value per lane");
    const int lane = static_cast<int>(threadIdx.x) % 32;
    T* const target = in_block(p + lane % kCount, min(lane / kCount, size - 1));
    if (lane / kCount < size) *target = x;
  }

  __device__ int row() const { return static_cast<int>(blockIdx.x) / size; }
  __device__ int threads() const { return size * static_cast<int>(blockDim.x); }
  __device__ int thread() const { return rank * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x); }
};

}  // namespace distillm
