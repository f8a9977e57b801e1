// How the kernel of `sample_tokens` is launched: blocks per row, threads per block and what shared memory holds. Host
// code without CUDA or torch, so that it can be tested alone.
#pragma once

#include <algorithm>
#include <cstdint>

namespace distillm {

struct SamplePlan {
  int64_t cluster, threads;
  int64_t staged_chunks;  // of 16 bytes, in each block

  int64_t dynamic_bytes(int64_t bitmap_bytes) const { return bitmap_bytes + 16 * staged_chunks; }
};

// `room`: chunks that the shared memory of a block holds beside all else; `most_blocks`: of a cluster, 1 without
// clusters. The smallest cluster that holds the row; one block, and a part of the row, where none does.
inline SamplePlan plan_sample(int64_t chunks, int64_t room, int64_t bitmap_bytes, int64_t most_blocks) {
  constexpr int64_t kTile = 128, kWarpThreads = 32;
  const int64_t tiles = (chunks + kTile - 1) / kTile;
  int64_t cluster = 1;
  const auto share = [&] { return (tiles + cluster - 1) / cluster; };
  while (cluster < most_blocks && share() * kTile > room) cluster *= 2;
  if (share() * kTile > room) cluster = 1;
  const int64_t staged = std::min(share() * kTile, room), bytes = bitmap_bytes + 16 * staged;
  // Blocks share a multiprocessor as their staging allows; the threads of those together should fill it. A warp visits
  // whole tiles.
  const int64_t filling = bytes > 72 * 1024 ? 640 : bytes > 36 * 1024 ? 512 : 256;
  return {cluster, std::min(filling, share() * kWarpThreads), staged};
}

}  // namespace distillm
