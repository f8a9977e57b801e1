// adaptive_kl: how far the sides of a row are apart on the teacher's head and beyond it.
//
// The head is a prefix of the entries in descending order of the teacher's logit, equal ones by ascending id. No sort:
// the entry at which the mass passes mu is found by a radix selection over ordered keys, kDigitBits at a time, from
// histograms of the mass in fixed point, and among entries of equal logit by the same selection over ids. Integers make
// the sums independent of the order of the threads. Each round is one visit of the row's chunks: two for bfloat16, four
// for float, and up to three over ids where equal logits lie on both sides of the boundary.
#pragma once

#include "../math/ordered_key.h"
#include "../math/row_divergence.h"
#include "divergence_row.cuh"

namespace distillm {

using Mass = unsigned long long;

constexpr int kDigitBits = 8;
constexpr int kDigits = 1 << kDigitBits;
constexpr float kMassOfOne = 1125899906842624.0f;  // 2^50: the mass of a row fits, and that of 2^13 more

struct HeadScratch {
  Mass histogram[kDigits + 1], total[kDigits + 1];  // the last of each: the mass of the whole row
  Partials<Add> head, tail;
};

// Head: larger logits, and of those equal to it the ids up to `last_id`.
struct HeadBoundary {
  float logit;
  int last_id;

  __device__ static HeadBoundary everything() { return {-CUDART_INF_F, INT32_MAX}; }
  __device__ bool holds(float z, int id) const { return z > logit || (z == logit && id <= last_id); }
};

// Where a running sum over the digits of a histogram passes a target.
struct Crossing {
  int digit;  // kDigits: nowhere
  Mass before, at;
};

template <class Student, class Teacher>
struct HeadSelection {
  using Rows = RowPair<Student, Teacher>;
  using Stored = typename Rows::Stored;
  static constexpr int N = Rows::N;
  // The bits of a float below this one are 0 in every logit of the stored dtype.
  static constexpr int kLowestBit = std::is_same_v<Stored, BFloat16> ? 16 : std::is_same_v<Stored, Half> ? 13 : 0;

  const Rows& rows;
  const RowSoftmaxes& softmaxes;
  HeadScratch& scratch;

  __device__ int vocab() const { return max(rows.student.vocab, rows.teacher.vocab); }
  __device__ float mass_of(float z) const { return exp2_fast(softmaxes.p.log2_probability(z)); }
  __device__ static Mass fixed(float mass) { return __float2ull_rn(mass * kMassOfOne); }
  // The logit of a selected key, whose bits below kLowestBit are 0.
  __device__ static float logit_of(uint32_t key) {
    return __uint_as_float(__float_as_uint(number_of_key(key)) & ~((1u << kLowestBit) - 1));
  }

  // Calls use(id, logit) for the teacher's entries that this thread visits, and for the -inf around them.
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

  // Fills the histogram of the cluster: count(add) calls add(digit, amount), and every thread may read `total` after.
  // What a thread adds to one digit in a row is added to shared memory at once.
  template <class Count>
  __device__ void accumulate(Count count) const {
    for (int digit = threadIdx.x; digit <= kDigits; digit += blockDim.x) scratch.histogram[digit] = 0;
    __syncthreads();
    int pending = 0;
    Mass sum = 0;
    count([&](int digit, Mass amount) {
      if (digit != pending) {
        if (sum > 0) atomicAdd(&scratch.histogram[pending], sum);
        pending = digit, sum = 0;
      }
      sum += amount;
    });
    if (sum > 0) atomicAdd(&scratch.histogram[pending], sum);
    rows.cluster.synchronize();
    for (int digit = threadIdx.x; digit <= kDigits; digit += blockDim.x) {
      Mass total = 0;
      for (int block = 0; block < rows.cluster.size; ++block) {
        total += rows.cluster.in_block(scratch.histogram, block)[digit];
      }
      scratch.total[digit] = total;
    }
    rows.cluster.synchronize();  // the others have read this block's histogram
  }

  // The first digit at which the sum from digit 0 on exceeds `target`. Every warp finds it for itself.
  __device__ Crossing crossing(Mass target) const {
    constexpr int kOfLane = kDigits / kWarp;
    const int lane = threadIdx.x % kWarp;
    Mass own = 0;
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) own += scratch.total[lane * kOfLane + i];
    const Mass through = warp_inclusive(own);
    const unsigned past = __ballot_sync(kAllLanes, through > target);
    if (past == 0) return {kDigits, 0, 0};
    const int first = __ffs(past) - 1;
    Mass before = __shfl_sync(kAllLanes, through - own, first);
    int digit = first * kOfLane;
    while (before + scratch.total[digit] <= target) before += scratch.total[digit++];
    return {digit, before, scratch.total[digit]};
  }

  // The histogram of the highest digits, the largest first, and the mass of the whole row, which rounded probabilities
  // do not add up to one in. Entries lighter than `lightest` are not at the boundary, nor is any after them.
  __device__ void count_highest_digits(float lightest) const {
    accumulate([&](auto add) {
      Mass whole = 0;
      each([&](int, float z) {
        const float mass = mass_of(z);
        whole += fixed(mass);
        if (mass >= lightest) add(kDigits - 1 - (ordered_key(z) >> (32 - kDigitBits)), fixed(mass));
      });
      add(kDigits, whole);
    });
  }

  // Extends a key whose bits from `shift` on are known down to `next`.
  __device__ void count_digits(uint32_t key, int shift, int next) const {
    const uint32_t mask = (1u << (shift - next)) - 1;
    accumulate([&](auto add) {
      each([&](int, float z) {
        const uint32_t k = ordered_key(z);
        if ((k ^ key) >> shift == 0) add(mask - (k >> next & mask), fixed(mass_of(z)));
      });
    });
  }

  // The id of the entry number `rank`, from 0 on, of those with this logit.
  __device__ int id_of_rank(float logit, Mass rank) const {
    const int id_bits = 32 - __clz(vocab() - 1 | 1);
    int id = 0;
    for (int shift = (id_bits + kDigitBits - 1) / kDigitBits * kDigitBits; shift > 0; shift -= kDigitBits) {
      accumulate([&](auto add) {
        each([&](int v, float z) {
          if (z == logit && v >> shift == id >> shift) add(v >> (shift - kDigitBits) & (kDigits - 1), 1);
        });
      });
      const Crossing found = crossing(rank);
      id |= found.digit << (shift - kDigitBits);
      rank -= found.before;
    }
    return id;
  }

  __device__ HeadBoundary boundary(float mu) const {
    if (!(mu < 1)) return HeadBoundary::everything();
    // The entry at the boundary and all lighter ones hold more than the rest, so it holds its share of that at least.
    count_highest_digits((1 - mu) / static_cast<float>(rows.teacher.vocab) * 0.999f);
    Mass left = static_cast<Mass>(static_cast<double>(mu) * static_cast<double>(scratch.total[kDigits]));
    Crossing found = crossing(left);
    if (found.digit == kDigits) return HeadBoundary::everything();
    bool top = found.before == 0;
    left -= found.before;
    int shift = 32 - kDigitBits;
    uint32_t key = static_cast<uint32_t>(kDigits - 1 - found.digit) << shift;
    while (shift > kLowestBit) {
      const int next = max(shift - kDigitBits, kLowestBit);
      count_digits(key, shift, next);
      found = crossing(left);
      top = top && found.before == 0;
      left -= found.before;
      key |= ((1u << (shift - next)) - 1 - found.digit) << next;
      shift = next;
    }
    const float logit = logit_of(key);
    const Mass of_each = max(fixed(mass_of(logit)), Mass{1});
    const Mass inside = max(left / of_each, Mass{top});  // the top entry belongs to the head whatever its mass
    if (inside == 0) return {logit, -1};
    return {logit, inside * of_each >= found.at ? INT32_MAX : id_of_rank(logit, inside - 1)};
  }

  // The share of the reverse divergence.
  __device__ float share(float mu) const {
    const HeadBoundary head = boundary(mu);
    float inside = 0, outside = 0;
    rows.visit(vocab(), [&](Place place) {
      float student_logits[N], teacher_logits[N];
      rows.logits(place, student_logits, teacher_logits);
      const int first = rows.first_entry(place.position);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float q = exp2_fast(softmaxes.q.log2_probability(student_logits[i]));
        const float distance = fabsf(mass_of(teacher_logits[i]) - q);
        (head.holds(teacher_logits[i], first + i) ? inside : outside) += distance;
      }
    });
    scratch.head.publish({}, inside);
    scratch.tail.publish({}, outside);
    __syncthreads();
    if (threadIdx.x < kWarp) {
      scratch.head.share({}, rows.cluster);
      scratch.tail.share({}, rows.cluster);
    }
    rows.cluster.synchronize();
    return adaptive_share(scratch.head.total({}, rows.cluster), scratch.tail.total({}, rows.cluster));
  }
};

}  // namespace distillm
