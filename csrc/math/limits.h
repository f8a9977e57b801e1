// What compressed logits hold at most.
#pragma once

namespace distillm {

constexpr int kMaxTemperatures = 16;

// Entries, or draws, that a record keeps of a row: the largest power of two whose record, in any codec and with its
// ids, fits into the shared memory of one block on every device from compute capability 8.0 on (99 KiB).
constexpr int kMaxEntries = 4096;

}  // namespace distillm
