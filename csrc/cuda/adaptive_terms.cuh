// adaptive_kl: the sums of both directions in one pass, and their shares after it.
//
//   value = (1 - s) F + s R,  F = KL(p || q), R = KL(q || p)       G = -(1 - s) (p - q) + s q log(q / p),  sum G = s R
//
// (q times any constant may be added to G: it is q times its own sum that the gradient subtracts.) The share s needs
// the teacher's head, which few entries decide: those of a range of log2 p that is known before the second visit
// (head_range.cuh). That visit lists them, usually a few hundred of the row, sums up those beyond, and one warp finds
// the boundary in the list. Where the boundary is not in it, or the list has no room, as in a row of equal logits, the
// row is visited again (head_entries.cuh).
#pragma once

#include "divergence_terms.cuh"
#include "head_range.cuh"

namespace distillm {

// What a thread sums up over its entries. all: |p - q| of what is not listed. In a peaked row rest is p of that; in a
// flat one head is the part of `all`, and rest p, of what lies beyond the list.
struct AdaptiveSums {
  float all = 0, rest = 0, head = 0;
};

struct AdaptiveTerms {
  using Scratch = HeadScratch;
  template <class Stored>
  using Watch = LargestSeen<Stored>;

  Softmax q, p;
  float mu, largest;
  HeadRange range;
  AdaptiveSums sums;
  float share_of_reverse;
  bool infinite;  // whether this thread has seen an entry of -inf
  Scratch& scratch;

  __device__ static bool legal(const RowParameters<float>& row) { return in_unit_interval(row.alpha); }
  __device__ AdaptiveTerms(const RowSoftmaxes& softmaxes, const RowParameters<float>& row, float largest,
                           Scratch& scratch)
      : q(softmaxes.q),
        p(softmaxes.p),
        mu(row.alpha),
        largest(largest),
        range(HeadRange::nothing()),
        share_of_reverse(0),
        infinite(false),
        scratch(scratch) {}

  template <class Rows>
  __device__ void prepare(const Rows& rows) {
    range = HeadRangeSearch<Rows>{rows, p, mu, scratch}.range(largest);
  }

  template <class First, int N>
  __device__ void chunk(First first, const float (&student_logits)[N], const float (&teacher_logits)[N],
                        Term<float>& sum, float (&log2_p)[N]) {
    float forward = 0, reverse = 0, distances = 0, masses = 0;
    const bool some_listed =
        range.flat() ? add_flat(student_logits, teacher_logits, forward, reverse, distances, log2_p)
                     : add_peaked(student_logits, teacher_logits, forward, reverse, distances, masses, log2_p);
    if (!(fabsf(forward + reverse) < CUDART_INF_F)) add_infinite(student_logits, log2_p, forward, reverse);
    if (some_listed) list_some(first, student_logits, teacher_logits, log2_p, distances, masses);
    sum.value += forward;
    sum.g -= reverse;
    sums.all += distances;
    if (!range.flat()) sums.rest += masses;
  }
  struct Pair {
    float log2_ratio, p, q;
  };
  __device__ Pair pair_of(float student_logit, float log2_p) const {
    const float log2_q = q.log2_probability(student_logit);
    return {log2_p - log2_q, exp2_fast(log2_p), exp2_fast(log2_q)};
  }
  // Both return whether an entry of the chunk has to be listed.
  template <int N>
  __device__ bool add_peaked(const float (&student_logits)[N], const float (&teacher_logits)[N], float& forward,
                             float& reverse, float& distances, float& masses, float (&log2_p)[N]) const {
    float highest = -CUDART_INF_F;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      log2_p[i] = p.log2_probability(teacher_logits[i]);
      const Pair x = pair_of(student_logits[i], log2_p[i]);
      forward = fmaf(x.p, x.log2_ratio, forward);
      reverse = fmaf(x.q, x.log2_ratio, reverse);
      distances += fabsf(x.p - x.q);
      masses += x.p;
      highest = fmaxf(highest, log2_p[i]);
    }
    return highest >= range.lower;
  }
  template <int N>
  __device__ bool add_flat(const float (&student_logits)[N], const float (&teacher_logits)[N], float& forward,
                           float& reverse, float& distances, float (&log2_p)[N]) {
    float highest = -CUDART_INF_F;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      log2_p[i] = p.log2_probability(teacher_logits[i]);
      const Pair x = pair_of(student_logits[i], log2_p[i]);
      forward = fmaf(x.p, x.log2_ratio, forward);
      reverse = fmaf(x.q, x.log2_ratio, reverse);
      const float distance = fabsf(x.p - x.q);
      distances += distance;
      beyond_or_highest(log2_p[i], distance, x.p, highest);
    }
    return highest >= range.lower;
  }
  // Beyond the list, adds to the sums, else raises `highest`: under a predicate, where the compiler would select what
  // to add.
  __device__ void beyond_or_highest(float log2_p, float distance, float mass, float& highest) {
    asm("{.reg .pred beyond; setp.ge.f32 beyond, %3, %4; @beyond add.f32 %0, %0, %5; @beyond add.f32 %1, %1, %6; "
        "@!beyond max.f32 %2, %2, %3;}"
        : "+f"(sums.head), "+f"(sums.rest), "+f"(highest)
        : "f"(log2_p), "f"(range.upper), "f"(distance), "f"(mass));
  }
  template <int N>
  __device__ void add_infinite(const float (&student_logits)[N], const float (&log2_p)[N], float& forward,
                               float& reverse) {
    infinite = true;
    forward = reverse = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float log2_q = q.log2_probability(student_logits[i]);
      forward += a_log_a_over_b(exp2_fast(log2_p[i]), log2_p[i], log2_q) * static_cast<float>(kLog2E);
      reverse -= a_log_a_over_b(exp2_fast(log2_q), log2_q, log2_p[i]) * static_cast<float>(kLog2E);
    }
  }
  // Takes what it lists out of the sums. Of a peaked row that may be nearly all, so they are made anew.
  template <class First, int N>
  __device__ void list_some(First first, const float (&student_logits)[N], const float (&teacher_logits)[N],
                            const float (&log2_p)[N], float& distances, float& masses) {
    const bool flat = range.flat();
    if (!flat) distances = masses = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const bool listed = log2_p[i] >= range.lower && log2_p[i] < range.upper;
      if (flat && !listed) continue;
      const Pair x = pair_of(student_logits[i], log2_p[i]);
      const float distance = fabsf(x.p - x.q);
      if (listed) list({teacher_logits[i], first() + i, distance});
      if (flat) {
        distances -= distance;
      } else if (!listed) {
        distances += distance;
        masses += x.p;
      }
    }
  }
  __device__ void list(const ListedEntry& entry) {
    const int place = atomicAdd(&scratch.listed, 1);
    if (place < kListed) scratch.list[place] = entry;
  }
  template <int N>
  __device__ void again(const float (&)[N], const float (&teacher_logits)[N], float (&log2_p)[N]) const {
#pragma unroll
    for (int i = 0; i < N; ++i) log2_p[i] = p.log2_probability(teacher_logits[i]);
  }

  __device__ void publish() { scratch.unlisted.publish({sums.all - sums.head, sums.rest, sums.head, 0}); }
  template <class Rows>
  __device__ void share(const Rows& rows) {
    scratch.unlisted.share(rows.cluster);
  }

  template <class Rows>
  __device__ bool revise(const Rows& rows, Term<float>& sum) {
    const Gaps gaps = gaps_of(rows);
    share_of_reverse = adaptive_share(gaps.head, gaps.tail);
    // A direction without a share is left out: it may be infinite.
    const float forward = share_of_reverse < 1 ? (1 - share_of_reverse) * sum.value : 0;
    const float reverse = share_of_reverse > 0 ? share_of_reverse * sum.g : 0;
    const float nats = static_cast<float>(kLn2);
    sum = {nats * (forward + reverse), nats * reverse};
    return false;
  }
  template <class Rows>
  __device__ Gaps gaps_of(const Rows& rows) {
    float sum[4];
    scratch.unlisted.totals(rows.cluster, sum);
    if (!(mu < 1)) return {sum[0], 0, true};
    if (range.lower < CUDART_INF_F) {
      const bool flat = range.flat();
      const Unlisted unlisted{flat ? 0 : sum[1], flat ? sum[1] : 0, sum[2], sum[0]};
      if (rows.cluster.rank == 0 && threadIdx.x < kWarp) {
        rows.cluster.to_all_blocks(&scratch.gaps, listed_gaps(rows, unlisted));
      }
      rows.cluster.synchronize();
      if (scratch.gaps.known) return scratch.gaps;
    }
    constexpr int N = Rows::N;
    rows.stage_again([](const float (&)[N], const float (&)[N], const typename Rows::Logits&) {});
    return RowEntries<Rows>{rows, q, p, scratch}.gaps(mu);
  }
  template <class Rows>
  __device__ Gaps listed_gaps(const Rows& rows, const Unlisted& unlisted) const {
    int longest = 0;
    for (int block = 0; block < rows.cluster.size; ++block) {
      longest = max(longest, rows.cluster.in_block(&scratch, block)->listed);
    }
    if (longest > kListed) return {0, 0, false};
    return ListedEntries<Rows>{rows, p, scratch, unlisted}.gaps(mu);
  }

  template <int N>
  __device__ void gradient(const float (&student_logits)[N], const float (&log2_p)[N], float g_scale, float q_scale,
                           float (&out)[N]) const {
    const float of_forward = -g_scale * (1 - share_of_reverse);
    const float of_reverse = -g_scale * share_of_reverse * static_cast<float>(kLn2);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float log2_q = q.log2_probability(student_logits[i]);
      const float p_v = exp2_fast(log2_p[i]), q_v = exp2_fast(log2_q);
      out[i] = fmaf(of_forward, p_v - q_v, q_v * fmaf(of_reverse, log2_p[i] - log2_q, q_scale));
    }
    if (infinite) {  // where a logarithm is, but its factor is 0
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float log2_q = q.log2_probability(student_logits[i]), q_v = exp2_fast(log2_q);
        const float log2_ratio = q_v == 0 || of_reverse == 0 ? 0.0f : log2_p[i] - log2_q;
        out[i] = fmaf(of_forward, exp2_fast(log2_p[i]) - q_v, q_v * fmaf(of_reverse, log2_ratio, q_scale));
      }
    }
  }
};

}  // namespace distillm
