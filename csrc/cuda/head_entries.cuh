// adaptive_kl: where the search for the teacher's head (row_head.cuh) takes its entries from.
//
//   ListedEntries   a short list that contains the head, of one warp of the cluster
//   RowEntries      the whole row, of all threads, in one visit for each histogram
#pragma once

#include "row_head.cuh"

namespace distillm {

constexpr int kListed = 256;  // entries that a block has room for

struct ListedEntry {
  float logit;
  int id;
  float distance;  // |p - q|
};

// How far the sides are apart on the head and beyond it, or that this is not known.
struct Gaps {
  float head, tail;
  bool known;
};

struct HeadScratch {
  Mass histogram[kDigits + 1], total[kDigits + 1];  // the last of each: the mass of the whole row
  ListedEntry list[kListed];
  int listed;  // entries that belong into the list
  float lightest;
  Gaps gaps;
  Partials<Add> head, tail, rest;
};

// Adds up what a thread adds to one digit in a row, for one atomic operation.
struct RunningDigit {
  Mass* histogram;
  int digit = 0;
  Mass sum = 0;

  __device__ void add(int to, Mass amount) {
    if (to != digit) {
      flush();
      digit = to, sum = 0;
    }
    sum += amount;
  }
  __device__ void flush() const {
    if (sum > 0) atomicAdd(&histogram[digit], sum);
  }
};

// The bits of a float below this one are 0 in every logit of the stored dtype.
template <class Stored>
constexpr int kLowestBitOf = std::is_same_v<Stored, BFloat16> ? 16
                             : std::is_same_v<Stored, Half>   ? 13
                                                              : 0;

// By one warp; the lists of all blocks are complete, and none is longer than kListed.
template <class Rows>
struct ListedEntries {
  static constexpr int kLowestBit = kLowestBitOf<typename Rows::Stored>;
  const Rows& rows;
  const Softmax& p;
  HeadScratch& scratch;
  float rest;  // the mass of all other entries

  __device__ int vocab() const { return max(rows.student.vocab, rows.teacher.vocab); }
  __device__ float mass_of(float z) const { return exp2_fast(p.log2_probability(z)); }
  __device__ Mass sum_at(int digit) const { return scratch.histogram[digit]; }

  template <class Use>
  __device__ void each_listed(Use use) const {
    for (int block = 0; block < rows.cluster.size; ++block) {
      const HeadScratch* const of_block = rows.cluster.in_block(&scratch, block);
      for (int i = threadIdx.x % kWarp; i < of_block->listed; i += kWarp) use(of_block->list[i]);
    }
  }
  template <class Use>
  __device__ void each(Use use) const {
    each_listed([&](const ListedEntry& entry) { use(entry.id, entry.logit); });
  }
  template <class Count>
  __device__ void accumulate(Count count) const {
    __syncwarp();
    for (int digit = threadIdx.x % kWarp; digit <= kDigits; digit += kWarp) scratch.histogram[digit] = 0;
    __syncwarp();
    RunningDigit running{scratch.histogram};
    count([&](int digit, Mass amount) { running.add(digit, amount); });
    running.flush();
    __syncwarp();
  }
  template <class Add>
  __device__ void weigh_rest(Add add) const {
    if (threadIdx.x % kWarp == 0) add(kDigits, fixed(rest));
  }

  __device__ Gaps gaps(float mu, float tail) const {
    const HeadBoundary head = HeadSearch<ListedEntries>{*this}.boundary(mu);
    Mass inside = 0, outside = 0;
    each_listed([&](const ListedEntry& entry) {
      (head.holds(entry.logit, entry.id) ? inside : outside) += fixed(entry.distance);
    });
    const float unit = 1 / kMassOfOne;
    return {__ull2float_rn(warp_total(inside)) * unit, tail + __ull2float_rn(warp_total(outside)) * unit,
            head.logit > -CUDART_INF_F};
  }
};

// By every thread of the cluster, while the slots hold the logits of both sides.
template <class Rows>
struct RowEntries {
  static constexpr int kLowestBit = kLowestBitOf<typename Rows::Stored>;
  static constexpr int N = Rows::N;
  const Rows& rows;
  const Softmax &q, &p;
  HeadScratch& scratch;

  __device__ int vocab() const { return max(rows.student.vocab, rows.teacher.vocab); }
  __device__ float mass_of(float z) const { return exp2_fast(p.log2_probability(z)); }
  __device__ Mass sum_at(int digit) const { return scratch.total[digit]; }

  template <class Use>
  __device__ void each(Use use) const {
    rows.visit(vocab(), [&](Place place) {
      float student_logits[N], teacher_logits[N];
      rows.logits(place, student_logits, teacher_logits);
      const int first = rows.first_entry(place.position);
#pragma unroll
      for (int i = 0; i < N; ++i) use(first + i, teacher_logits[i]);
    });
  }
  template <class Count>
  __device__ void accumulate(Count count) const {
    for (int digit = threadIdx.x; digit <= kDigits; digit += blockDim.x) scratch.histogram[digit] = 0;
    __syncthreads();
    RunningDigit running{scratch.histogram};
    count([&](int digit, Mass amount) { running.add(digit, amount); });
    running.flush();
    rows.cluster.synchronize_exposing(scratch.histogram, kDigits + 1);
    for (int digit = threadIdx.x; digit <= kDigits; digit += blockDim.x) {
      Mass total = 0;
      for (int block = 0; block < rows.cluster.size; ++block) {
        total += rows.cluster.in_block(scratch.histogram, block)[digit];
      }
      scratch.total[digit] = total;
    }
    rows.cluster.synchronize();  // the others have read this block's histogram
  }
  template <class Add>
  __device__ void weigh_rest(Add) const {}

  // Keeps the teacher's log-probabilities where there is room.
  __device__ Gaps gaps(float mu) const {
    const HeadBoundary head = HeadSearch<RowEntries>{*this}.boundary(mu);
    float inside = 0, outside = 0;
    rows.visit(vocab(), [&](Place place) {
      float student_logits[N], teacher_logits[N], log2_p[N];
      rows.logits(place, student_logits, teacher_logits);
      const int first = rows.first_entry(place.position);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        log2_p[i] = p.log2_probability(teacher_logits[i]);
        const float distance = fabsf(exp2_fast(log2_p[i]) - exp2_fast(q.log2_probability(student_logits[i])));
        (head.holds(teacher_logits[i], first + i) ? inside : outside) += distance;
      }
      if (place.position < rows.kept) rows.keep(place, log2_p);
    });
    scratch.head.publish({}, inside);
    scratch.tail.publish({}, outside);
    __syncthreads();
    if (threadIdx.x < kWarp) {
      scratch.head.share({}, rows.cluster);
      scratch.tail.share({}, rows.cluster);
    }
    rows.cluster.synchronize();
    return {scratch.head.total({}, rows.cluster), scratch.tail.total({}, rows.cluster), true};
  }
};

}  // namespace distillm
