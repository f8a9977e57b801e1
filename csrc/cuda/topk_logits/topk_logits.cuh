// The k largest logits of every row, their log-probabilities, and the mass of all others at up to four temperatures.
//
//   logits [R, V] float, bfloat16 or float16, any row stride -> ids, logprobs [R, k]; log_norm, tail_logprob [R, T]
//
// One block per row, which reads it once, in order, 16 entries per thread at a time. Entries above a running threshold
// (at most the k-th largest so far) are gathered in shared memory, the exponentials of all others go to the thread's
// sums. When many are gathered, the block sorts them, keeps k, and raises the threshold. The tail is a sum of what is
// left out; nothing vocabulary-sized is written. Bytes per entry: the size of a logit.
//
// The first threshold is the k-th largest of the maxima of groups of the first entries, held in registers.
// Deterministic: slots are handed out by atomics, but the sort's order is total and what is summed where depends on
// counts alone.
#pragma once

#include "compressed_row.cuh"

namespace distillm {

constexpr int kStepEntries = 16;  // of each thread in one step

template <int kSlots>
struct TopkScratch {
  int32_t size;  // candidates gathered
  OutputScratch<kSlots> output;
};

template <class T, int kSlots>
class TopkRow {
 public:
  static constexpr int N = 16 / sizeof(T), kChunks = kStepEntries / N;
  using Logits = LogitRow<T, N>;

  __device__ TopkRow(const TopkLogitsArguments& a, const Logits& logits, uint64_t* keys, TopkScratch<kSlots>& scratch)
      : a_(a),
        logits_(logits),
        phase_(phase_of<T, N>(logits.row)),
        keys_(keys),
        scratch_(scratch),
        tail_(ExpSums<kSlots>::empty()),
        threshold_(-kInfinity),
        last_key_(0) {
    if (threadIdx.x == 0) scratch.size = 0;
  }

  // Leaves the kept entries sorted in `keys`, visible to the block.
  __device__ void run() {
    const int32_t chunks = (phase_ + a_.vocab + N - 1) / N, step = kChunks * blockDim.x;
    float z[kStepEntries];
    __syncthreads();  // scratch.size is 0 for all
    for (int32_t first = 0; first < chunks; first += step) {
      load(first, z);
      if (first == 0) choose_first_threshold(z);
      take(first, z);
    }
    sort_and_cut();
  }
  __device__ int32_t size() const { return size_; }
  __device__ ExpSums<kSlots> tail() const { return tail_; }

 private:
  // Chunk c of this thread's step is the position first + c * threads + thread: ids rise from step to step.
  __device__ int32_t entry_of(int32_t first, int i) const {
    return (first + i / N * static_cast<int32_t>(blockDim.x) + static_cast<int32_t>(threadIdx.x)) * N - phase_ + i % N;
  }

  __device__ void load(int32_t first, float (&z)[kStepEntries]) const {
    Chunk<T, N> chunk[kChunks];
#pragma unroll
    for (int c = 0; c < kChunks; ++c) chunk[c] = logits_.load(entry_of(first, c * N), true);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      float part[N];
      unpack(chunk[c], part);
#pragma unroll
      for (int i = 0; i < N; ++i) z[c * N + i] = part[i];
    }
  }

  __device__ void choose_first_threshold(const float (&z)[kStepEntries]) {
    const int32_t groups = a_.k * 4 <= static_cast<int32_t>(blockDim.x) ? 1 : 4;  // per thread
    const int32_t all_groups = groups * static_cast<int32_t>(blockDim.x);
    if (a_.vocab <= a_.capacity / 2 || a_.k > all_groups || all_groups > a_.capacity) return;
    float maximum = -kInfinity;
#pragma unroll
    for (int i = 0; i < kStepEntries; ++i) {
      maximum = fmaxf(maximum, z[i]);
      if (groups == 4 ? i % 4 == 3 : i == kStepEntries - 1) {
        keys_[threadIdx.x * groups + (groups == 4 ? i / 4 : 0)] = candidate_key(maximum, 0);
        maximum = -kInfinity;
      }
    }
    sort_keys<false>(keys_, nullptr, all_groups);
    const float kth = candidate_value(keys_[a_.k - 1]);
    // A little lower, so that the k-th largest itself is above it.
    if (kth > -kInfinity) threshold_ = kth - fabsf(kth) * 1e-6f - 1e-30f;
    __syncthreads();
  }

  __device__ int32_t append(uint64_t key) {
    const int32_t slot = atomicAdd(&scratch_.size, 1);
    if (slot < a_.capacity) keys_[slot] = key;
    return slot;
  }

  __device__ void take(int32_t first, const float (&z)[kStepEntries]) {
    uint32_t above = 0;
#pragma unroll
    for (int i = 0; i < kStepEntries; ++i) above |= static_cast<uint32_t>(z[i] > threshold_) << i;
    tail_.add_others(a_, z, above);
    int32_t last_slot = 0;
    if (above != 0) {
      // Slots are handed out per thread; the loop over registers is unrolled, since they cannot be indexed.
      int32_t slot = atomicAdd(&scratch_.size, __popc(above));
#pragma unroll
      for (int i = 0; i < kStepEntries; ++i) {
        if (above >> i & 1) {
          if (slot < a_.capacity) keys_[slot] = candidate_key(z[i], entry_of(first, i));
          ++slot;
        }
      }
      last_slot = slot;
    }
    if (__syncthreads_or(last_slot > a_.capacity / 2)) make_room(first, z, above);
  }

  // Many candidates: sort them and raise the threshold. Where not even all of this step's had room, they are taken back
  // and gathered again one entry per thread at a time.
  __device__ void make_room(int32_t first, const float (&z)[kStepEntries], uint32_t above) {
    if (scratch_.size <= a_.capacity) {
      sort_and_cut();
      return;
    }
    __syncthreads();
    if (above != 0) atomicSub(&scratch_.size, __popc(above));
    __syncthreads();
    sort_and_cut();
#pragma unroll
    for (int i = 0; i < kStepEntries; ++i) {
      if (above >> i & 1) {
        const uint64_t key = candidate_key(z[i], entry_of(first, i));
        if (key > last_key_) {
          append(key);
        } else {
          tail_.add(a_, z[i]);
        }
      }
      __syncthreads();
      const int32_t size = scratch_.size;
      __syncthreads();
      if (size + static_cast<int32_t>(blockDim.x) > a_.capacity) sort_and_cut();
    }
  }

  // Entries of later steps have higher ids: one that ties with the k-th kept value loses against it.
  __device__ void sort_and_cut() {
    __syncthreads();
    const int32_t size = scratch_.size;
    sort_keys<false>(keys_, nullptr, size);
    for (int32_t i = a_.k + threadIdx.x; i < size; i += blockDim.x) tail_.add(a_, candidate_value(keys_[i]));
    size_ = min(size, a_.k);
    if (size >= a_.k) {
      last_key_ = keys_[a_.k - 1];
      threshold_ = fmaxf(threshold_, candidate_value(last_key_));
    }
    __syncthreads();
    if (threadIdx.x == 0) scratch_.size = size_;
    __syncthreads();
  }

  const TopkLogitsArguments& a_;
  const Logits& logits_;
  int32_t phase_;
  uint64_t* keys_;
  TopkScratch<kSlots>& scratch_;
  ExpSums<kSlots> tail_;
  float threshold_;
  uint64_t last_key_;  // the k-th kept, 0 while there are fewer
  int32_t size_ = 0;
};

template <class T, int kSlots>
__global__ void __launch_bounds__(1024, 1) topk_logits_kernel(const TopkLogitsArguments a) {
  constexpr int N = 16 / sizeof(T);
  extern __shared__ uint64_t shared_keys[];
  __shared__ TopkScratch<kSlots> scratch;
  const int64_t row = blockIdx.x;
  uint64_t* const keys = a.workspace ? a.workspace + row * a.capacity : shared_keys;
  const LogitRow<T, N> logits(a.logits, row * a.stride, a.vocab, ElementType::kFloat);
  TopkRow<T, kSlots> topk(a, logits, keys, scratch);
  topk.run();
  write_row<T, kSlots>(a, row, logits, keys, nullptr, topk.size(), topk.tail(), scratch.output);
}

}  // namespace distillm
