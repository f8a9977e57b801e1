// How the kernel of `sparse_divergence` is launched: threads per block and what shared memory holds. Host code.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kept_entries.cuh"

namespace distillm {

struct SparsePlan {
  int64_t table_slots, staged_chunks, threads, shared_bytes;
  bool fits;  // whether the kept entries of a row fit in shared memory at all
};

// room: bytes of a block's shared memory beside the kernel's own. As much of the row is staged as is left.
inline SparsePlan plan_sparse_divergence(int64_t vocab, int64_t entry_bytes, int64_t kept, int64_t room) {
  int64_t slots = 2;
  while (slots < 2 * kept) slots *= 2;
  const int64_t kept_bytes =
      KeptShared::bytes(static_cast<int>(kept), static_cast<int>(slots), static_cast<int>(vocab));
  const int64_t chunks = most_chunks(static_cast<int>(vocab), static_cast<int>(16 / entry_bytes));
  const int64_t staged = std::max<int64_t>(0, std::min(chunks, (room - kept_bytes) / 16));
  const int64_t bytes = staged * 16 + kept_bytes;
  // Rows share a multiprocessor as their staging allows; the threads of those blocks together should fill it.
  const int64_t filling = bytes > 36 * 1024 ? 512 : 256;
  const int64_t useful = (chunks + 31) / 32 * 32;
  return {slots, staged, std::max<int64_t>(32, std::min(filling, useful)), bytes, kept_bytes <= room};
}

}  // namespace distillm
