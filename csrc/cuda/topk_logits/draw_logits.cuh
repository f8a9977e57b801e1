// k draws from every row by systematic sampling (math/sampling/systematic.h), with the log-probabilities of what was
// drawn and the mass of all else: method "sample" of `topk_logits`.
//
// One block per row, one warp per segment of 32 * lane_chunks chunks. First the sums of exponentials of every segment,
// in one read; then the cumulative sums of the segments; then the segments that draws fall into are read again. The
// sums of all other segments are the tail's as they are. Nothing vocabulary-sized is written.
// Segments begin at multiples of their length, wherever the row starts in memory, and all cumulative sums run in the
// order of the ids, in double: a row's draws depend on its logits, seed and position alone.
#pragma once

#include "../../math/sampling/philox.h"
#include "../../math/sampling/systematic.h"
#include "compressed_row.cuh"

namespace distillm {

constexpr int kMaxSegments = 1024;
constexpr int kDrawThreads = 256;

// Chunks of 16 bytes that one lane takes of a segment.
__host__ __device__ constexpr int lane_chunks(int vocab, int chunk_entries) {
  return (vocab + kMaxSegments * kWarp * chunk_entries - 1) / (kMaxSegments * kWarp * chunk_entries);
}

__host__ __device__ constexpr int segment_entries(int vocab, int chunk_entries) {
  return kWarp * chunk_entries * lane_chunks(vocab, chunk_entries);
}

// Where the parts of a row's shared memory are.
template <int kSlots>
struct DrawMemory {
  uint64_t* keys;
  int32_t* counts;
  double* start;   // cumulative mass before each segment, and the total
  float* maximum;  // per segment, like the sums [kSlots][segments]
  float* sum;

  __host__ __device__ static int64_t bytes(int64_t capacity_in_shared, int64_t segments) {
    return 12 * capacity_in_shared + 8 * (segments + 1) + 4 * segments * (1 + kSlots);
  }
  __device__ DrawMemory(const TopkLogitsArguments& a, int64_t row, uint64_t* shared, int32_t segments)
      : keys(a.workspace ? a.workspace + row * 2 * a.capacity : shared),
        counts(reinterpret_cast<int32_t*>(keys + a.capacity)),
        start(reinterpret_cast<double*>(a.workspace ? reinterpret_cast<int32_t*>(shared) : counts + a.capacity)),
        maximum(reinterpret_cast<float*>(start + segments + 1)),
        sum(maximum + segments) {}
};

template <int kSlots>
struct DrawScratch {
  int32_t size;  // distinct entries drawn
  PartialSums maximum;
  OutputScratch<kSlots> output;
};

template <class T, int kSlots>
class DrawRow {
 public:
  static constexpr int N = 16 / sizeof(T);
  using Logits = LogitRow<T, N>;

  __device__ DrawRow(const TopkLogitsArguments& a, const Logits& logits, uint64_t* shared, DrawScratch<kSlots>& scratch)
      : a_(a),
        logits_(logits),
        aligned_(logits.phase() == 0),
        chunks_(lane_chunks(a.vocab, N)),
        segments_((a.vocab + kWarp * N * chunks_ - 1) / (kWarp * N * chunks_)),
        lane_(threadIdx.x % kWarp),
        memory(a, blockIdx.x, shared, segments_),
        scratch_(scratch),
        tail_(ExpSums<kSlots>::empty()) {
    if (threadIdx.x == 0) scratch.size = 0;
  }

  // Leaves the drawn entries in memory.keys and memory.counts, sorted and visible to the block.
  __device__ void run() {
    sum_segments();
    const double total = accumulate();
    if (total > 0) draw(SystematicDraws(total, a_.k, uniform()));
    __syncthreads();
    size_ = scratch_.size;
    sort_keys<true>(memory.keys, memory.counts, size_);
  }
  __device__ int32_t size() const { return size_; }
  __device__ ExpSums<kSlots> tail() const { return tail_; }

 private:
  __device__ int32_t first_entry(int32_t segment, int chunk) const {
    return ((segment * kWarp + lane_) * chunks_ + chunk) * N;
  }
  __device__ void load(int32_t segment, int chunk, float (&z)[N]) const {
    unpack(logits_.load(first_entry(segment, chunk), aligned_), z);
  }
  __device__ double uniform() const { return open_uniform(a_.seed, a_.position[blockIdx.x], Draw::kSampleTeacher); }
  __device__ int32_t warps() const { return blockDim.x / kWarp; }

  __device__ void sum_segments() {
    float largest = -FLT_MAX;
    for (int32_t segment = threadIdx.x / kWarp; segment < segments_; segment += warps()) {
      ExpSums<kSlots> sums = ExpSums<kSlots>::empty();
      for (int chunk = 0; chunk < chunks_; ++chunk) {
        float z[N];
        load(segment, chunk, z);
        sums.add_others(a_, z, 0);
      }
      sums.raise(a_, warp_max(sums.maximum));
      largest = fmaxf(largest, sums.maximum);
      if (lane_ == 0) memory.maximum[segment] = sums.maximum;
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) {
        const float sum = warp_sum(sums.sum[slot]);
        if (lane_ == 0) memory.sum[slot * segments_ + segment] = sum;
      }
    }
    publish_maximum(largest, scratch_.maximum);
    __syncthreads();
    largest_ = collect_maximum(scratch_.maximum);
  }

  __device__ double mass(int32_t segment) const {
    const float factor = exp2_fast((memory.maximum[segment] - largest_) * static_cast<float>(kLog2E));
    return static_cast<double>(memory.sum[segment]) * factor;
  }

  // Cumulative sums by the first warp: each lane over its run of segments, then the runs one after the other, so that
  // every end is the next start, rounding included. Returns the total.
  __device__ double accumulate() {
    if (threadIdx.x < kWarp) {
      const int32_t run = (segments_ + kWarp - 1) / kWarp;
      const int32_t begin = min(lane_ * run, segments_), end = min(begin + run, segments_);
      double own = 0;
      for (int32_t s = begin; s < end; ++s) own += mass(s);
      const double before = sum_before(0, own).start;
      double within_run = 0;
      for (int32_t s = begin; s < end; ++s) {
        memory.start[s] = before + within_run;
        within_run += mass(s);
      }
      if (begin < end && end == segments_) memory.start[segments_] = before + within_run;
    }
    __syncthreads();
    return memory.start[segments_];
  }

  struct LaneRange {
    double start, end;
  };
  // start = base + own of lane 0 + ... of the lanes before, added one by one; end = start + own, the next lane's start.
  __device__ LaneRange sum_before(double base, double own) const {
    double sum = base, start = base;
    for (int lane = 0; lane < kWarp; ++lane) {
      if (lane == lane_) start = sum;
      sum += __shfl_sync(kAllLanes, own, lane);
    }
    return {start, start + own};
  }

  __device__ void draw(const SystematicDraws& draws) {
    for (int32_t segment = threadIdx.x / kWarp; segment < segments_; segment += warps()) {
      const double before = memory.start[segment];
      const int32_t from = draws.within(before), to = draws.within(memory.start[segment + 1]);
      if (to > from) {
        draw_in_segment(draws, segment, before, to);
      } else if (lane_ == 0) {
        add_segment(segment);
      }
    }
  }

  __device__ void add_segment(int32_t segment) {
    const float maximum = memory.maximum[segment];
    tail_.raise(a_, fmaxf(tail_.maximum, maximum));
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      const float factor = exp2_fast((maximum - tail_.maximum) * ExpSums<kSlots>::scale(a_, slot));
      tail_.sum[slot] += memory.sum[slot * segments_ + segment] * factor;
    }
  }

  __device__ float exponential(float z) const { return exp2_fast((z - largest_) * static_cast<float>(kLog2E)); }

  // Up to `to` draws are given out when the segment ends. Its last entry of positive probability takes those that fall
  // between the sum of its entries and its own sum, which was rounded in another order.
  __device__ void draw_in_segment(const SystematicDraws& draws, int32_t segment, double before, int32_t to) {
    float z[N];
    double own = 0;
    int32_t last = -1;
    for (int chunk = 0; chunk < chunks_; ++chunk) {
      load(segment, chunk, z);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float e = exponential(z[i]);
        own += e;
        last = e > 0 ? chunk * N + i : last;
      }
    }
    const LaneRange range = sum_before(before, own);
    const unsigned positive = __ballot_sync(kAllLanes, last >= 0);
    const bool closes = lane_ == 31 - __clz(positive);
    int32_t taken = min(draws.within(range.start), to);
    double within_lane = 0;
    for (int chunk = 0; chunk < chunks_; ++chunk) {
      if (chunks_ > 1) load(segment, chunk, z);
      uint32_t drawn = 0;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        within_lane += exponential(z[i]);
        const bool closing = closes && chunk * N + i == last;
        const int32_t reached = closing ? to : min(draws.within(range.start + within_lane), to);
        if (reached > taken) {
          append(z[i], first_entry(segment, chunk) + i, reached - taken);
          drawn |= 1u << i;
          taken = reached;
        }
      }
      tail_.add_others(a_, z, drawn);
    }
  }

  __device__ void append(float z, int32_t id, int32_t count) {
    const int32_t slot = atomicAdd(&scratch_.size, 1);
    memory.keys[slot] = candidate_key(z, id);
    memory.counts[slot] = count;
  }

  const TopkLogitsArguments& a_;
  const Logits& logits_;
  bool aligned_;
  int32_t chunks_, segments_, lane_;

 public:
  DrawMemory<kSlots> memory;

 private:
  DrawScratch<kSlots>& scratch_;
  ExpSums<kSlots> tail_;
  float largest_;
  int32_t size_ = 0;
};

template <class T, int kSlots>
__global__ void __launch_bounds__(kDrawThreads, 2) draw_logits_kernel(const TopkLogitsArguments a) {
  constexpr int N = 16 / sizeof(T);
  extern __shared__ uint64_t shared_keys[];
  __shared__ DrawScratch<kSlots> scratch;
  const int64_t row = blockIdx.x;
  const LogitRow<T, N> logits(a.logits, row * a.stride, a.vocab, ElementType::kFloat);
  DrawRow<T, kSlots> sample(a, logits, shared_keys, scratch);
  sample.run();
  write_row<T, kSlots>(a, row, logits, sample.memory.keys, sample.memory.counts, sample.size(), sample.tail(),
                       scratch.output);
}

}  // namespace distillm
