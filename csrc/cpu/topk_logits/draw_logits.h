// Systematic sampling of one row of logits on the CPU, in three walks over the cached row: its largest logit; the sums
// of exponentials of its blocks; the blocks that draws fall into, whose exponentials are computed again.
//
// Cumulative sums run over blocks and entries in the order of the ids, in double: a row's draws depend on its logits,
// seed and position alone.
#pragma once

#include "../../math/sampling/philox.h"
#include "../../math/sampling/systematic.h"
#include "candidates.h"
#include "exp_sums.h"

namespace distillm {
inline namespace DISTILLM_ISA {

template <class Real>
class DrawRow {
 public:
  static constexpr int64_t kBlock = 32;
  static int64_t blocks(int64_t vocab) { return (vocab + kBlock - 1) / kBlock; }

  // `block_sums` has room for blocks(row.vocab) values.
  DrawRow(const LogitRow<Real>& row, Real* block_sums) : row_(row), sums_(block_sums) {
    alignas(64) Real buffer[kTile];
    for (int64_t start = 0; start < row.vocab; start += kTile) {
      const int64_t count = entries_from(start, kTile);
      const Real tile_max = tile_maximum(row.tile(start, count, buffer), count);
      maximum_ = tile_max > maximum_ ? tile_max : maximum_;
    }
    total_ = std::abs(maximum_) < std::numeric_limits<Real>::infinity() ? sum_blocks() : 0;
  }

  // Appends the drawn entries in the order of their ids: none for a row that is all -inf or holds a NaN or +inf.
  void draw(int64_t draws, double uniform, Candidates<Real>& drawn) const {
    if (!(total_ > 0)) return;
    const SystematicDraws systematic(total_, draws, uniform);
    double before = 0;
    int32_t taken = 0;
    for (int64_t block = 0; block < blocks(row_.vocab); ++block) {
      const double after = before + sums_[block];
      if (systematic.within(after) > taken) draw_in_block(systematic, block, before, after, taken, drawn);
      before = after;
    }
  }

  // All entries but the drawn ones.
  void add_others(const Candidates<Real>& drawn, ExpSums<Real>& sums) const {
    alignas(64) Real buffer[kTile];
    int64_t next = 0;
    for (int64_t start = 0; start < row_.vocab; start += kTile) {
      const int64_t count = entries_from(start, kTile);
      const Real* z = row_.tile(start, count, buffer);
      if (next < drawn.size && drawn.ids[next] < start + count) {
        if (z != buffer) z = static_cast<const Real*>(std::memcpy(buffer, z, count * sizeof(Real)));
        for (; next < drawn.size && drawn.ids[next] < start + count; ++next) {
          buffer[drawn.ids[next] - start] = -std::numeric_limits<Real>::infinity();
        }
      }
      sums.add(z, count);
    }
  }

 private:
  int64_t entries_from(int64_t start, int64_t most) const {
    return row_.vocab - start < most ? row_.vocab - start : most;
  }

  double sum_blocks() {
    alignas(64) Real buffer[kTile];
    double total = 0;
    for (int64_t start = 0; start < row_.vocab; start += kTile) {
      const int64_t count = entries_from(start, kTile);
      const Real* z = row_.tile(start, count, buffer);
      for (int64_t i = 0; i < count; i += kBlock) {
        const int64_t entries = count - i < kBlock ? count - i : kBlock;
        const Real sum = tile_exp_sum(z + i, entries, maximum_, kScale);
        sums_[(start + i) / kBlock] = sum;
        total += sum;
      }
    }
    return total;
  }

  void draw_in_block(const SystematicDraws& systematic, int64_t block, double before, double after, int32_t& taken,
                     Candidates<Real>& drawn) const {
    Real buffer[kBlock], exponentials[kBlock];
    const int64_t first = block * kBlock, entries = entries_from(first, kBlock);
    const Real* z = row_.tile(first, entries, buffer);
    tile_exponentials<false>(z, entries, maximum_, kScale, exponentials);
    int64_t last = entries - 1;
    while (last > 0 && exponentials[last] == 0) --last;
    double cumulative = before;
    for (int64_t i = 0; i <= last; ++i) {
      cumulative += exponentials[i];
      // The block's own sum was rounded in another order; its end is where the next block begins.
      const double here = i == last || cumulative > after ? after : cumulative;
      const int32_t count = systematic.within(here) - taken;
      if (count <= 0 || exponentials[i] == 0) continue;
      drawn.values[drawn.size] = z[i];
      drawn.ids[drawn.size] = static_cast<int32_t>(first + i);
      drawn.counts[drawn.size++] = count;
      taken += count;
    }
  }

  static constexpr Real kScale = static_cast<Real>(kLog2E);
  LogitRow<Real> row_;
  Real* sums_;
  Real maximum_ = -std::numeric_limits<Real>::infinity();
  double total_;
};

}  // namespace DISTILLM_ISA
}  // namespace distillm
