// Row offsets in 64 bits, for tensors far larger than could be allocated here.
#include "../math/row_layout.h"
#include "check.h"

using distillm::RowLayout;

int main() {
  // 65,536 rows of 152,064 entries: the last begins beyond 2^33.
  const int64_t rows = 65536, vocab = 152064;
  const RowLayout plain = RowLayout::uniform(vocab);
  CHECK(plain.is_uniform());
  CHECK_EQUAL(plain.offset(0), int64_t(0));
  CHECK_EQUAL(plain.offset(14123), int64_t(2147599872));  // the first row that begins beyond 2^31
  CHECK_EQUAL(plain.offset(rows - 1), (rows - 1) * vocab);

  // logits[:, :-1] of 32 sequences of 2,049 positions.
  const int64_t blocks = 32, positions = 2049;
  const RowLayout shifted = RowLayout::of_blocks(blocks, positions - 1, positions * vocab, vocab);
  CHECK(!shifted.is_uniform());
  for (int64_t block : {int64_t(0), int64_t(7), blocks - 1}) {
    for (int64_t position : {int64_t(0), int64_t(1), positions - 2}) {
      CHECK_EQUAL(shifted.offset(block * (positions - 1) + position), (block * positions + position) * vocab);
    }
  }
  CHECK(shifted.offset(blocks * (positions - 1) - 1) > (int64_t(1) << 33));

  // What has one stride counts as uniform: contiguous blocks, a single block, one row per block, no rows.
  CHECK(RowLayout::of_blocks(blocks, positions, positions * vocab, vocab).is_uniform());
  CHECK(RowLayout::of_blocks(1, positions, 0, vocab).is_uniform());
  CHECK_EQUAL(RowLayout::of_blocks(4, 1, 5 * vocab, vocab).offset(3), 15 * vocab);
  CHECK(RowLayout::of_blocks(4, 0, 0, vocab).is_uniform());
  // Blocks and rows that run backwards in memory or stand still.
  const RowLayout expanded = RowLayout::of_blocks(4, 3, 0, vocab);
  CHECK_EQUAL(expanded.offset(3), int64_t(0));
  CHECK_EQUAL(expanded.offset(11), 2 * vocab);
  return report("row_layout");
}
