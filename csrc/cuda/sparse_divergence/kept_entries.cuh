// The kept entries of one row of a compressed teacher in a block's shared memory: which of them count, and the
// student's logits there.
#pragma once

#include <cmath>

#include "../../math/row_layout.h"
#include "../../math/sparse_divergence.h"
#include "../row/loss_inputs.cuh"
#include "../row/reduce.cuh"
#include "../row/row_pair.cuh"

namespace distillm {

struct SparseDivergenceArguments {
  const void* student;
  void* gradient;  // may be the student itself; null when not asked for
  RowLayout student_rows, gradient_rows;
  int32_t student_vocab, gradient_vocab, teacher_vocab;  // entries of the gradient from student_vocab on are 0
  int32_t kept;                                          // K
  int32_t table_slots;                                   // a power of two, at least 2 K
  int32_t staged_chunks;                                 // of a row, that shared memory keeps
  int32_t form;                                          // KeptForm
  Tail tail;
  const int32_t* ids;  // [R, K], like logprobs and counts
  const float* logprobs;
  const float* log_norm;  // [R]
  const float* tail_logprob;
  const int32_t* counts;  // null where the tail is not sampled
  LossArguments loss;
};

// Dynamic shared memory, in this order: staged chunks (16 bytes each), the arrays below.
struct KeptShared {
  int32_t* table;     // hash table of positions in ids, -1 where free
  uint32_t* members;  // a bit per entry of the row, in the order of its chunks: entry v has bit v + phase
  int32_t* ids;       // -1 where the entry does not count
  float* z;           // the student's logit, -inf beyond its vocabulary
  float* log2_p;      // of the teacher at the loss's temperature
  float* share;       // count of a sampled entry, 1 of others, -1 of a duplicate; then G

  __host__ __device__ static int member_words(int student_vocab) { return (student_vocab + 7 + 31) / 32; }
  __host__ __device__ static int64_t bytes(int kept, int table_slots, int student_vocab) {
    return 4 * (int64_t(table_slots) + member_words(student_vocab) + 4 * int64_t(kept));
  }
  __device__ KeptShared(void* memory, const SparseDivergenceArguments& a) {
    table = static_cast<int32_t*>(memory);
    members = reinterpret_cast<uint32_t*>(table + a.table_slots);
    ids = reinterpret_cast<int32_t*>(members + member_words(a.student_vocab));
    z = reinterpret_cast<float*>(ids + a.kept);
    log2_p = z + a.kept;
    share = log2_p + a.kept;
  }
  __device__ bool counts(int k) const { return ids[k] >= 0 && share[k] >= 0; }
  __device__ bool member(int bit) const { return members[bit / 32] >> bit % 32 & 1; }
};

// Ids of this row that can count at all; everything else of the arrays is cleared.
__device__ inline void load_kept(const KeptShared& kept, const SparseDivergenceArguments& a, int64_t row) {
  const float log_norm = a.log_norm[row];
  for (int i = threadIdx.x; i < a.table_slots; i += blockDim.x) kept.table[i] = -1;
  for (int i = threadIdx.x; i < KeptShared::member_words(a.student_vocab); i += blockDim.x) kept.members[i] = 0;
  for (int k = threadIdx.x; k < a.kept; k += blockDim.x) {
    const int64_t at = row * a.kept + k;
    const int32_t id = a.ids[at];
    const float log2_p = (a.logprobs[at] * a.loss.inverse_temperature - log_norm) * static_cast<float>(kLog2E);
    const int32_t count = a.counts ? a.counts[at] : 1;
    // A sampled entry needs a count and a probability.
    const bool drawn = !a.counts || (count > 0 && exp2_fast(log2_p) != 0);
    kept.ids[k] = id >= 0 && id < a.teacher_vocab && drawn ? id : -1;
    kept.log2_p[k] = log2_p;
    kept.share[k] = static_cast<float>(count);
  }
}

__device__ inline uint32_t hash_of(int32_t id) { return static_cast<uint32_t>(id) * 2654435769u >> 7; }

// Leaves, for every id, the first position that has it in the table: the order of insertion shifts slots, not results.
__device__ inline void insert_kept(const KeptShared& kept, const SparseDivergenceArguments& a) {
  for (int k = threadIdx.x; k < a.kept; k += blockDim.x) {
    const int32_t id = kept.ids[k];
    if (id < 0) continue;
    for (uint32_t slot = hash_of(id);; ++slot) {
      int32_t* entry = kept.table + (slot & (a.table_slots - 1));
      const int32_t found = atomicCAS(entry, -1, k);
      if (found == -1) break;
      if (kept.ids[found] == id) {
        atomicMin(entry, k);
        break;
      }
    }
  }
}

__device__ inline bool is_first(const KeptShared& kept, const SparseDivergenceArguments& a, int k) {
  const int32_t id = kept.ids[k];
  for (uint32_t slot = hash_of(id);; ++slot) {
    const int32_t found = kept.table[slot & (a.table_slots - 1)];
    if (kept.ids[found] == id) return found == k;
  }
}

// The student's logits at the entries that count, and their bits. Returns this thread's part of the sum of shares, NaN
// where the teacher holds a NaN or +inf.
template <class StudentRow>
__device__ float gather_kept(const KeptShared& kept, const SparseDivergenceArguments& a, const StudentRow& student,
                             int phase) {
  float drawn = 0;
  for (int k = threadIdx.x; k < a.kept; k += blockDim.x) {
    const int32_t id = kept.ids[k];
    if (id < 0) continue;
    if (!is_first(kept, a, k)) {
      kept.share[k] = -1;
      continue;
    }
    kept.z[k] = student.entry(id);
    if (id < a.student_vocab) atomicOr(kept.members + (id + phase) / 32, 1u << (id + phase) % 32);
    drawn += kept.log2_p[k] < INFINITY ? kept.share[k] : NAN;
  }
  return drawn;
}

}  // namespace distillm
