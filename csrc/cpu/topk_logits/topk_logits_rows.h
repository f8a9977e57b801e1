// Compressed logits of a range of rows on one thread. Included once per instruction set, by row_kernel_list.h.
//
// Top-k: one pass over the row, tile by tile: gather what is above the running threshold (threshold_filter.h), add the
// exponentials of everything else to the tail's sums, at every temperature. What the filter drops later joins the tail.
// So the tail mass is a sum of what is left out, and the norm is tail plus kept; nothing is ever subtracted.
// Systematic sampling (draw_logits.h) takes its entries first and sums the rest afterwards.
// Scratch per thread: a few times k entries, nothing of the vocabulary's size.
#pragma once

#include "../instruction_sets/row_kernels.h"
#include "../memory/thread_scratch.h"
#include "compressed_row.h"
#include "draw_logits.h"
#include "exp_sums.h"
#include "threshold_filter.h"

namespace distillm {
inline namespace DISTILLM_ISA {

template <class Real>
class ThresholdFilter {
 public:
  // candidates: room for capacity(k); dropped and scratch: for others_capacity(k).
  ThresholdFilter(int64_t k, Candidates<Real>& candidates, Real* dropped, SelectionScratch<Real> scratch,
                  ExpSums<Real>& tail)
      : k_(k), kept_(candidates), dropped_(dropped), scratch_(scratch), tail_(tail) {}

  // Cut early: the sooner the threshold is exact, the fewer entries pass it.
  static int64_t capacity(int64_t k) { return (k < 32 ? 96 : 3 * k) + kTile; }
  // As many, and the groups of first_threshold.
  static int64_t others_capacity(int64_t k) { return 4 * k + 96 + kTile; }

  void run(const LogitRow<Real>& row) {
    alignas(64) Real buffer[kTile];
    threshold_ = first_threshold(row, k_, dropped_, scratch_);
    for (int64_t start = 0; start < row.vocab; start += kTile) {
      const int64_t count = row.vocab - start < kTile ? row.vocab - start : kTile;
      const Real* z = row.tile(start, count, buffer);
      for (int64_t i = 0; i < count; i += kPiece) {
        const int64_t piece = count - i < kPiece ? count - i : kPiece;
        prefetch(row, start + kTile + i, kPiece);
        append_above(z + i, piece, start + i, threshold_, kept_);
        tail_.add_below(z + i, piece, threshold_);
      }
      if (kept_.size + kTile > capacity(k_)) keep_best();
    }
    keep_best();
  }

 private:
  // Of a tile: what is computed between requests for memory, which queue up no further.
  static constexpr int64_t kPiece = 256;

  // Ids still to come are higher: one that ties with the k-th kept value loses against it.
  void keep_best() {
    const int64_t left = kept_.size - k_;
    if (left <= 0) return;
    threshold_ = keep_largest(kept_, k_, dropped_, scratch_);
    for (int64_t i = 0; i < left; i += kTile) tail_.add(dropped_ + i, left - i < kTile ? left - i : kTile);
  }

  int64_t k_;
  Candidates<Real>& kept_;
  Real* dropped_;
  SelectionScratch<Real> scratch_;
  ExpSums<Real>& tail_;
  Real threshold_;
};

template <class Real>
LogitRow<Real> row_of(const TopkLogitsCall& call, int64_t row) {
  return {static_cast<const char*>(call.logits) + row * call.stride * bytes_of(call.type), call.type, call.vocab};
}

// Consecutive pieces of this thread's scratch memory, each aligned to a cache line.
class ScratchPieces {
 public:
  static int64_t padded(int64_t bytes) { return (bytes + 63) / 64 * 64; }
  explicit ScratchPieces(int64_t bytes) : next_(static_cast<char*>(thread_scratch(bytes))) {}

  template <class T>
  T* take(int64_t count) {
    char* piece = next_;
    next_ += padded(count * static_cast<int64_t>(sizeof(T)));
    return reinterpret_cast<T*>(piece);
  }

 private:
  char* next_;
};

template <class Real>
void topk_rows(const TopkLogitsCall& call, int64_t begin, int64_t end) {
  using Filter = ThresholdFilter<Real>;
  const Slots slots(call);
  const int64_t room = Filter::capacity(call.k), others = Filter::others_capacity(call.k);
  const int64_t sorting = SortedOrder<Real>::bytes(call.k);
  ScratchPieces scratch(ScratchPieces::padded(room * sizeof(Real)) + ScratchPieces::padded(room * sizeof(int32_t)) +
                        2 * ScratchPieces::padded(others * sizeof(Real)) +
                        ScratchPieces::padded(others * sizeof(int32_t)) + ScratchPieces::padded(sorting));
  Candidates<Real> kept{scratch.take<Real>(room), scratch.take<int32_t>(room), nullptr, 0};
  Real* const dropped = scratch.take<Real>(others);
  const SelectionScratch<Real> selection{scratch.take<typename SelectionScratch<Real>::Key>(others),
                                         scratch.take<int32_t>(others)};
  void* const sort_scratch = scratch.take<char>(sorting);
  for (int64_t row = begin; row < end; ++row) {
    const LogitRow<Real> logits = row_of<Real>(call, row);
    ExpSums<Real> tail(slots);
    kept.size = 0;
    Filter(call.k, kept, dropped, selection, tail).run(logits);
    RowWriter<Real>(call, slots, row).write(logits, kept, tail, sort_scratch);
  }
}

template <class Real>
void sample_rows(const TopkLogitsCall& call, int64_t begin, int64_t end) {
  const Slots slots(call);
  const int64_t k = call.k, blocks = DrawRow<Real>::blocks(call.vocab), sorting = SortedOrder<Real>::bytes(k);
  ScratchPieces scratch(ScratchPieces::padded(k * sizeof(Real)) + 2 * ScratchPieces::padded(k * sizeof(int32_t)) +
                        ScratchPieces::padded(blocks * sizeof(Real)) + ScratchPieces::padded(sorting));
  Candidates<Real> drawn{scratch.take<Real>(k), scratch.take<int32_t>(k), scratch.take<int32_t>(k), 0};
  Real* const block_sums = scratch.take<Real>(blocks);
  void* const sort_scratch = scratch.take<char>(sorting);
  for (int64_t row = begin; row < end; ++row) {
    const LogitRow<Real> logits = row_of<Real>(call, row);
    const double uniform = open_uniform(call.seed, call.position[row], Draw::kSampleTeacher);
    ExpSums<Real> tail(slots);
    DrawRow<Real> systematic(logits, block_sums);
    drawn.size = 0;
    systematic.draw(k, uniform, drawn);
    systematic.add_others(drawn, tail);
    RowWriter<Real>(call, slots, row).write(logits, drawn, tail, sort_scratch);
  }
}

template <class Real>
void topk_logits_rows(const TopkLogitsCall& call, int64_t begin, int64_t end) {
  if (call.position) {
    sample_rows<Real>(call, begin, end);
  } else {
    topk_rows<Real>(call, begin, end);
  }
}

inline TopkLogitsRows find_topk_logits_rows(bool float64) {
  return float64 ? topk_logits_rows<double> : topk_logits_rows<float>;
}

}  // namespace DISTILLM_ISA
}  // namespace distillm
