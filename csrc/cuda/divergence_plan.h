// How the kernel of `divergence` is launched: blocks per row, threads per block and what shared memory holds. Host
// code without CUDA or torch, so that it can be tested alone.
#pragma once

#include <algorithm>
#include <cstdint>

namespace distillm {

// A row as the kernel cuts it up (row_pair.cuh), and the block's static shared memory.
struct DivergenceShape {
  int64_t chunks;                  // of the longer side, at most
  int64_t slot_bytes, kept_bytes;  // per staged slot; more per kept slot
  bool keeps;                      // whether kept slots are of use
  int64_t static_bytes;
};

struct DeviceLimits {
  int64_t block_bytes;           // most shared memory of a block
  int64_t multiprocessor_bytes;  // of all blocks on a multiprocessor
  int64_t reserved_bytes;        // of it that every block costs beside its own
  int64_t cluster;               // most blocks of a cluster, 1 without clusters
};

struct DivergencePlan {
  int64_t cluster, threads, staged_slots, kept_slots;

  int64_t dynamic_bytes(const DivergenceShape& shape) const {
    return staged_slots * shape.slot_bytes + kept_slots * shape.kept_bytes;
  }
};

namespace plan {

// At the kernel's 64 registers a multiprocessor holds this many threads.
constexpr int64_t kResidentThreads = 1024;
// Chunks per thread below which the reductions, which cost about as much as one, weigh more than fewer threads would.
constexpr int64_t kFewChunks = 3;
constexpr int64_t kWarpThreads = 32, kFewThreads = 256;

// Threads of a block when `blocks` of them share a multiprocessor.
inline int64_t threads_of(const DivergenceShape& shape, int64_t cluster, int64_t blocks) {
  int64_t threads = kResidentThreads / blocks;
  while (threads > kFewThreads && shape.chunks < kFewChunks * cluster * threads) threads /= 2;
  const int64_t useful = (shape.chunks + kWarpThreads - 1) / kWarpThreads * kWarpThreads;
  return std::max(kWarpThreads, std::min(threads, useful));
}

// The most slots that a block's threads have chunks for.
inline int64_t slots_of(int64_t chunks, int64_t cluster, int64_t threads) {
  const int64_t turn = cluster * threads;
  return chunks / turn * threads + std::min(threads, chunks % turn);
}

// Stages all it can, then keeps all it can, in a share of the multiprocessor.
inline DivergencePlan with_blocks(const DivergenceShape& shape, const DeviceLimits& device, int64_t cluster,
                                  int64_t blocks) {
  const int64_t share = device.multiprocessor_bytes / blocks - device.reserved_bytes;
  const int64_t room = std::min(share, device.block_bytes) - shape.static_bytes;
  const int64_t threads = threads_of(shape, cluster, blocks);
  const int64_t staged = std::min(slots_of(shape.chunks, cluster, threads), room / shape.slot_bytes);
  const int64_t rest = room - staged * shape.slot_bytes;
  const int64_t kept = shape.kept_bytes == 0 ? staged : std::min(staged, rest / shape.kept_bytes);
  return {cluster, threads, staged, shape.keeps ? kept : 0};
}

inline bool stages_all(const DivergenceShape& shape, const DivergencePlan& p) {
  return p.staged_slots == slots_of(shape.chunks, p.cluster, p.threads);
}

}  // namespace plan

// The smallest cluster in whose shared memory the whole row can be kept while another block has room on each
// multiprocessor: one loads while the other computes. Rows too long for that take the largest cluster, and a
// multiprocessor per block only where the logits would not fit otherwise.
inline DivergencePlan plan_divergence(const DivergenceShape& shape, const DeviceLimits& device) {
  for (int64_t cluster = 1; cluster <= device.cluster; cluster *= 2) {
    for (const int64_t blocks : {4, 2}) {
      const DivergencePlan p = plan::with_blocks(shape, device, cluster, blocks);
      if (plan::stages_all(shape, p) && (!shape.keeps || p.kept_slots == p.staged_slots)) return p;
    }
  }
  const DivergencePlan halved = plan::with_blocks(shape, device, device.cluster, 2);
  return plan::stages_all(shape, halved) ? halved : plan::with_blocks(shape, device, device.cluster, 1);
}

}  // namespace distillm
