// The blocks that work on one row together: what they exchange, and their barrier.
//
// From compute capability 9.0 on they are a thread-block cluster and reach each other's shared memory. Before that they
// are a team: blocks of a cooperative launch, which are all resident at once, and exchange through global memory
// (team.cuh). Where the launch asks for neither, a cluster is one block and the barrier is the block's.
#pragma once

#include "team.cuh"

namespace distillm {

constexpr int kMaxCluster = 8;  // the largest size that every device with clusters supports

struct Cluster {
  int size, rank;
  TeamMailbox mailbox;  // of a team

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
    if (size == 1) return;
    if (threadIdx.x == 0) mailbox.arrive_and_wait();
    __syncthreads();
#endif
  }

  // A warp writes kCount values, which lanes l with equal l % kCount hold, to what every block of the cluster keeps at
  // p, in shared memory; after the next barrier every block finds them at received(p). The compiler may look the
  // address up before it asks whether there is such a block. What a team sends to all of its blocks lies in one place.
  template <int kCount = 1, class T>
  __device__ void to_all_blocks(T* p, const T& x) const {
    static_assert(32 % kCount == 0 && kCount * kMaxCluster <= 32, "one value per lane");
    const int lane = static_cast<int>(threadIdx.x) % 32;
#if __CUDA_ARCH__ >= 900
    T* const target = in_block(p + lane % kCount, min(lane / kCount, size - 1));
    if (lane / kCount < size) *target = x;
#else
    if (lane < kCount) *in_block(p + lane, 0) = x;
#endif
  }
  template <class T>
  __device__ const T* received(const T* p) const {
#if __CUDA_ARCH__ >= 900
    return p;
#else
    return in_block(p, 0);
#endif
  }

  // Where another block of the cluster keeps what this block keeps at p, in shared memory. In a team, what it has last
  // exposed of that.
  template <class T>
  __device__ T* in_block(T* p, int block) const {
#if __CUDA_ARCH__ >= 900
    return static_cast<T*>(__cluster_map_shared_rank(p, block));
#else
    return size == 1 ? p : mailbox.of_block(p, block);
#endif
  }

  // Whether this block reaches all shared memory of another, and where that keeps what this block keeps at p. In a team
  // it does not.
  __device__ bool reaches_all_of(int block) const {
#if __CUDA_ARCH__ >= 900
    return true;
#else
    return block == rank;
#endif
  }
  template <class T>
  __device__ T* shared_of(T* p, int block) const {
#if __CUDA_ARCH__ >= 900
    return in_block(p, block);
#else
    return p;
#endif
  }

  // Whether the blocks share a mailbox in place of one block's memory.
  __device__ bool is_team() const {
#if __CUDA_ARCH__ >= 900
    return false;
#else
    return size > 1;
#endif
  }

  // Lets the other blocks find p[0] to p[count - 1] after the next barrier. By `threads` threads, which are numbered
  // and see what it exposes.
  template <class T>
  __device__ void expose(T* p, int count, int thread, int threads) const {
#if __CUDA_ARCH__ < 900
    if (size == 1) return;
    T* const exposed = in_block(p, rank);
    for (int i = thread; i < count; i += threads) exposed[i] = p[i];
#endif
  }
  // A barrier after which the other blocks find what any thread of this one has written there.
  template <class T>
  __device__ void synchronize_exposing(T* p, int count) const {
#if __CUDA_ARCH__ < 900
    if (size > 1) {
      __syncthreads();
      expose(p, count, static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x));
    }
#endif
    synchronize();
  }

  __device__ int threads() const { return size * static_cast<int>(blockDim.x); }
  __device__ int thread() const { return rank * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x); }
};

// Calls use(row, cluster) for the rows of this block's cluster: one row, or in a launch of teams every so many. It
// returns whether it came to a barrier of the cluster. `scratch`: the block's static shared memory, all that blocks
// exchange is part of it, and a TeamTurn `turn`.
template <class Scratch, class Use>
__device__ __forceinline__ void each_row_of_cluster(const TeamMemory& memory, int rows, Scratch& scratch, Use use) {
#if __CUDA_ARCH__ >= 900
  const Cluster cluster{static_cast<int>(__clusterSizeInBlocks()), static_cast<int>(__clusterRelativeBlockRank()), {}};
  use(static_cast<int>(blockIdx.x) / cluster.size, cluster);
#else
  const int size = memory.size, block = static_cast<int>(blockIdx.x);
  const Cluster cluster{
      size,
      block & (size - 1),
      {&memory, reinterpret_cast<const unsigned char*>(&scratch), int{sizeof(Scratch)}, &scratch.turn}};
  if (size > 1) {
    if (threadIdx.x == 0) scratch.turn = {block / size, 0};
    __syncthreads();
  }
  int row = block / size;
#pragma unroll 1
  do {
    const bool met = use(row, cluster);
    if (size == 1) return;
    __syncthreads();  // static shared memory serves the next row
    if (threadIdx.x == 0) scratch.turn = {scratch.turn.row + memory.teams, scratch.turn.second ^ met};
    __syncthreads();
    row = scratch.turn.row;
  } while (row < rows);
#endif
}

}  // namespace distillm
