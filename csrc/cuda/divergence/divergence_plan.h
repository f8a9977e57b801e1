// How the kernel of `divergence` is launched: blocks per row, threads per block and what shared memory holds. Host
// code without CUDA or torch, so that it can be tested alone.
#pragma once

#include <algorithm>
#include <cstdint>

namespace distillm {

// A row as the kernel cuts it up (row_pair.cuh), and the block's static shared memory.
struct DivergenceShape {
  int64_t chunks;                  // of the longer side, at most
  int64_t slot_bytes, kept_bytes;  // per thread and staged turn; more per kept turn
  bool keeps;                      // whether kept turns are of use
  int64_t static_bytes;
};

struct DeviceLimits {
  int64_t block_bytes;           // most shared memory of a block
  int64_t multiprocessor_bytes;  // of all blocks on a multiprocessor
  int64_t reserved_bytes;        // of it that every block costs beside its own
  int64_t cluster;               // most blocks of a cluster, 1 without clusters
};

struct DivergencePlan {
  int64_t cluster, threads, staged_turns, kept_turns;

  int64_t dynamic_bytes(const DivergenceShape& shape) const {
    return threads * (staged_turns * shape.slot_bytes + kept_turns * shape.kept_bytes);
  }
};

namespace plan {

// Threads on a multiprocessor, which leaves them 168 registers each. Every thread has entries enough in flight that
// more would not help, and the reductions cost instructions per thread, not per entry.
constexpr int64_t kResidentThreads = 384;
constexpr int64_t kWarpThreads = 32;

inline int64_t turns_of(const DivergenceShape& shape, int64_t cluster, int64_t threads) {
  return (shape.chunks + cluster * threads - 1) / (cluster * threads);
}

// Stages all it can, then keeps all it can, in the share that each of `blocks` has of a multiprocessor.
inline DivergencePlan with_blocks(const DivergenceShape& shape, const DeviceLimits& device, int64_t cluster,
                                  int64_t blocks) {
  const int64_t share = device.multiprocessor_bytes / blocks - device.reserved_bytes;
  const int64_t room = std::min(share, device.block_bytes) - shape.static_bytes;
  const int64_t useful = (shape.chunks + kWarpThreads - 1) / kWarpThreads * kWarpThreads;
  const int64_t threads = std::min(kResidentThreads / blocks, useful);
  const int64_t turns = turns_of(shape, cluster, threads), rounds = room / threads;
  const int64_t staged = std::min(turns, rounds / shape.slot_bytes);
  if (!shape.keeps) return {cluster, threads, staged, 0};
  const int64_t rest = rounds - staged * shape.slot_bytes;
  return {cluster, threads, staged, shape.kept_bytes == 0 ? staged : std::min(staged, rest / shape.kept_bytes)};
}

inline bool stages_all(const DivergenceShape& shape, const DivergencePlan& p) {
  return p.staged_turns == turns_of(shape, p.cluster, p.threads);
}

inline bool keeps_all(const DivergenceShape& shape, const DivergencePlan& p) {
  return stages_all(shape, p) && (!shape.keeps || p.kept_turns == p.staged_turns);
}

inline bool keeps_most(const DivergenceShape& shape, const DivergencePlan& p) {
  return stages_all(shape, p) && (!shape.keeps || 2 * p.kept_turns >= p.staged_turns);
}

}  // namespace plan

// The smallest cluster in whose shared memory the whole row can be kept while another block has room on each
// multiprocessor: one loads while the other computes. Rows too long for that take the largest cluster, and a
// multiprocessor per block only where otherwise the logits would not fit, or most of G would be computed twice.
inline DivergencePlan plan_divergence(const DivergenceShape& shape, const DeviceLimits& device) {
  for (int64_t cluster = 1; cluster <= device.cluster; cluster *= 2) {
    for (const int64_t blocks : {6, 4, 2}) {
      const DivergencePlan p = plan::with_blocks(shape, device, cluster, blocks);
      if (plan::keeps_all(shape, p)) return p;
    }
  }
  const DivergencePlan halved = plan::with_blocks(shape, device, device.cluster, 2);
  return plan::keeps_most(shape, halved) ? halved : plan::with_blocks(shape, device, device.cluster, 1);
}

}  // namespace distillm
