// adaptive_kl: how far the sides of a row are apart on the teacher's head and beyond it.
//
// The head is a prefix of the entries in descending order of the teacher's logit, equal ones by ascending id. No sort:
// the entry at which the mass passes mu is found by a radix selection over ordered keys, kDigitBits at a time, from
// histograms of the mass in fixed point, and among entries of equal logit by the same selection over ids. Integers make
// the sums independent of the order of the threads. Each round is one visit of the row's chunks.
#pragma once

#include "../math/row_divergence.h"
#include "divergence_row.cuh"

namespace distillm {

using Mass = unsigned long long;

constexpr int kDigitBits = 6;
constexpr int kDigits = 1 << kDigitBits;
constexpr float kMassOfOne = 1125899906842624.0f;  // 2^50: the mass of a row fits, and that of 2^13 more

struct HeadScratch {
  Mass histogram[kDigits], total[kDigits], whole_mass;
  Partials<Add> head, tail;
};

// Head: keys above `key`, and of those equal to it the ids up to `last_id`.
struct HeadBoundary {
  uint32_t key;
  int last_id;

  __device__ static HeadBoundary everything() { return {0, INT32_MAX}; }
  __device__ bool holds(uint32_t k, int id) const { return k > key || (k == key && id <= last_id); }
};

template <class Student, class Teacher>
struct HeadSelection {
  using Rows = RowPair<Student, Teacher>;
  static constexpr int N = Rows::N;
  // The ordered key of a bfloat16 has 16 bits that tell logits apart.
  static constexpr int kLowestBit = std::is_same_v<typename Rows::Stored, BFloat16> ? 16 : 0;

  const Rows& rows;
  const RowSoftmaxes& softmaxes;
  HeadScratch& scratch;

  __device__ int vocab() const { return max(rows.student.vocab, rows.teacher.vocab); }
  __device__ float mass_of(float z) const { return exp2_fast(softmaxes.p.log2_probability(z)); }
  __device__ static Mass fixed(float mass) { return __float2ull_rn(mass * kMassOfOne); }

  // Calls use(id, logit) for the teacher's entries that this thread visits.
  template <class Use>
  __device__ void each(Use use) const {
    rows.visit(vocab(), [&](Place place) {
      float student_logits[N], teacher_logits[N];
      rows.logits(place, student_logits, teacher_logits);
      const int first = rows.first_entry(place.position);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (first + i >= 0 && first + i < rows.teacher.vocab) use(first + i, teacher_logits[i]);
      }
    });
  }

  // Fills the histogram of the cluster: count(add) calls add(digit, amount), and every thread may read `total` after.
  template <class Count>
  __device__ void accumulate(Count count) const {
    for (int digit = threadIdx.x; digit < kDigits; digit += blockDim.x) scratch.histogram[digit] = 0;
    __syncthreads();
    count([&](int digit, Mass amount) { atomicAdd(&scratch.histogram[digit], amount); });
    rows.cluster.synchronize();
    for (int digit = threadIdx.x; digit < kDigits; digit += blockDim.x) {
      Mass sum = 0;
      for (int block = 0; block < rows.cluster.size; ++block) {
        sum += rows.cluster.in_block(scratch.histogram, block)[digit];
      }
      scratch.total[digit] = sum;
    }
    rows.cluster.synchronize();  // the others have read this block's histogram
  }

  // The whole row's mass, since rounded probabilities do not add up to one.
  __device__ Mass whole_mass() const {
    accumulate([&](auto add) {
      Mass sum = 0;
      each([&](int, float z) { sum += fixed(mass_of(z)); });
      add(0, sum);
    });
    return scratch.total[0];
  }

  // The key at which the mass, summed from the largest key down, passes `target`. `above`: the mass of the keys beyond
  // it. An entry lighter than `lightest` is not at the boundary, nor is any after it.
  __device__ bool boundary_key(Mass target, float lightest, uint32_t& key, Mass& above) const {
    key = 0, above = 0;
    int shift = 32;
    while (shift > kLowestBit) {
      const int next = max(shift - kDigitBits, kLowestBit), bits = shift - next;
      accumulate([&](auto add) {
        each([&](int, float z) {
          const uint32_t k = ordered_key(z);
          const float mass = mass_of(z);
          const bool prefix_equal = shift == 32 || k >> shift == key >> shift;
          if (mass >= lightest && prefix_equal) add(k >> next & ((1u << bits) - 1), fixed(mass));
        });
      });
      int digit = (1 << bits) - 1;
      while (digit >= 0 && above + scratch.total[digit] <= target) above += scratch.total[digit--];
      if (digit < 0) return false;
      key |= static_cast<uint32_t>(digit) << next;
      shift = next;
    }
    return true;
  }

  // The id of the entry number `rank`, from 1 on, of those with this key.
  __device__ int id_of_rank(uint32_t key, Mass rank) const {
    const int id_bits = 32 - __clz(vocab() - 1 | 1);
    int id = 0, shift = (id_bits + kDigitBits - 1) / kDigitBits * kDigitBits;
    Mass before = 0;
    while (shift > 0) {
      const int next = shift - kDigitBits;
      accumulate([&](auto add) {
        each([&](int v, float z) {
          if (ordered_key(z) >> kLowestBit == key >> kLowestBit && v >> shift == id >> shift) {
            add(v >> next & (kDigits - 1), 1);
          }
        });
      });
      int digit = 0;
      while (digit < kDigits - 1 && before + scratch.total[digit] < rank) before += scratch.total[digit++];
      id |= digit << next;
      shift = next;
    }
    return id;
  }

  __device__ HeadBoundary boundary(float mu) const {
    if (!(mu < 1)) return HeadBoundary::everything();
    const Mass whole = whole_mass();
    const Mass target = static_cast<Mass>(static_cast<double>(mu) * static_cast<double>(whole));
    // The entry at the boundary and all lighter ones hold more than the rest, so it holds its share of that at least.
    const float lightest = (1 - mu) / static_cast<float>(rows.teacher.vocab) * 0.999f;
    uint32_t key;
    Mass above;
    if (!boundary_key(target, lightest, key, above)) return HeadBoundary::everything();
    const Mass each_holds = fixed(mass_of(logit_of(key)));
    Mass inside = (target - above) / max(each_holds, Mass{1});
    if (above == 0) inside = max(inside, Mass{1});  // the top entry belongs to the head whatever its mass
    if constexpr (kLowestBit > 0) key = ordered_key(logit_of(key));
    return {key, inside == 0 ? -1 : id_of_rank(key, inside)};
  }

  // The logit of a selected key, whose bits below kLowestBit are 0.
  __device__ static float logit_of(uint32_t key) {
    return __uint_as_float(__float_as_uint(number_of_key(key)) & ~((1u << kLowestBit) - 1));
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
        (head.holds(ordered_key(teacher_logits[i]), first + i) ? inside : outside) += distance;
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
