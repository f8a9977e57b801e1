// adaptive_kl: where the search for the teacher's head (row_head.cuh) takes its entries from.
//
//   ListedEntries   a short list that contains the head, of one warp of the cluster
//   RowEntries      the whole row, of all threads, in one visit for each histogram
#pragma once

#include "row_head.cuh"

namespace distillm {

constexpr int kListed = 256;  // entries that a block has room for
constexpr int kBins = 1024;   // of a count of the row's entries

// Those of the row with lower <= log2 p < upper are listed; those from `upper` on belong to the head.
struct HeadRange {
  float lower, upper;

  __device__ static HeadRange nothing() { return {CUDART_INF_F, CUDART_INF_F}; }
  __device__ bool flat() const { return upper < CUDART_INF_F; }  // whether there are any beyond
};

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

struct HeadHistogram {
  Mass own[kDigits + 1], total[kDigits + 1];  // the last of each: the mass of the whole row
};

// Of the largest entry of each thread, by steps of log2 p.
struct LargestHistogram {
  unsigned masses[kDigits], counts[kDigits];
};

struct HeadScratch {
  union {  // in use one after the other
    LargestHistogram largest;
    alignas(16) unsigned bins[kBins];
    HeadHistogram histogram;
  };
  ListedEntry list[kListed];
  int listed;  // entries that belong into the list
  HeadRange range;
  Gaps gaps;
  JointPartials<4> unlisted;  // tail, rest, head, nothing
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

// What is not listed: the masses of all of it and, in a flat row, of what lies beyond the list; how far the sides are
// apart beyond and below.
struct Unlisted {
  float rest, before, head, tail;
};

// By one warp; the lists of all blocks are complete, and none is longer than kListed.
template <class Rows>
struct ListedEntries {
  static constexpr int kLowestBit = kLowestBitOf<typename Rows::Stored>;
  const Rows& rows;
  const Softmax& p;
  HeadScratch& scratch;
  Unlisted unlisted;

  __device__ int vocab() const { return max(rows.student.vocab, rows.teacher.vocab); }
  __device__ float mass_of(float z) const { return exp2_fast(p.log2_probability(z)); }
  __device__ Mass sum_at(int digit) const { return scratch.histogram.own[digit]; }

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
    for (int digit = threadIdx.x % kWarp; digit <= kDigits; digit += kWarp) scratch.histogram.own[digit] = 0;
    __syncwarp();
    RunningDigit running{scratch.histogram.own};
    count([&](int digit, Mass amount) { running.add(digit, amount); });
    running.flush();
    __syncwarp();
  }
  template <class Add>
  __device__ void weigh_rest(Add add) const {
    if (threadIdx.x % kWarp == 0) add(kDigits, fixed(unlisted.rest));
  }
  // Nobody sums up all masses of a flat row; no error of their sum matters but a common one, which 2^-22 bounds.
  __device__ Mass whole() const { return scratch.range.flat() ? fixed(1) : sum_at(kDigits); }
  __device__ Mass before() const { return fixed(unlisted.before); }

  __device__ Gaps gaps(float mu) const {
    const HeadBoundary head = HeadSearch<ListedEntries>{*this}.boundary(mu);
    Mass inside = 0, outside = 0;
    each_listed([&](const ListedEntry& entry) {
      (head.holds(entry.logit, entry.id) ? inside : outside) += fixed(entry.distance);
    });
    const float unit = 1 / kMassOfOne;
    return {unlisted.head + __ull2float_rn(warp_total(inside)) * unit,
            unlisted.tail + __ull2float_rn(warp_total(outside)) * unit, head.logit > -CUDART_INF_F};
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
  __device__ Mass sum_at(int digit) const { return scratch.histogram.total[digit]; }

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
    for (int digit = threadIdx.x; digit <= kDigits; digit += blockDim.x) scratch.histogram.own[digit] = 0;
    __syncthreads();
    RunningDigit running{scratch.histogram.own};
    count([&](int digit, Mass amount) { running.add(digit, amount); });
    running.flush();
    rows.cluster.synchronize();
    for (int digit = threadIdx.x; digit <= kDigits; digit += blockDim.x) {
      Mass total = 0;
      for (int block = 0; block < rows.cluster.size; ++block) {
        total += rows.cluster.in_block(scratch.histogram.own, block)[digit];
      }
      scratch.histogram.total[digit] = total;
    }
    rows.cluster.synchronize();  // the others have read this block's histogram
  }
  template <class Add>
  __device__ void weigh_rest(Add) const {}
  __device__ Mass whole() const { return sum_at(kDigits); }
  __device__ Mass before() const { return 0; }

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
    float distances[4] = {outside, 0, inside, 0};
    scratch.unlisted.publish(distances);
    __syncthreads();
    if (threadIdx.x < kWarp) scratch.unlisted.share(rows.cluster);
    rows.cluster.synchronize();
    scratch.unlisted.totals(rows.cluster, distances);
    return {distances[2], distances[0], true};
  }
};

}  // namespace distillm
