// adaptive_kl: the sums of both directions in one pass, and their shares after it.
//
//   value = (1 - s) F + s R,  F = KL(p || q), R = KL(q || p)       G = -(1 - s) (p - q) + s q log(q / p),  sum G = s R
//
// (q times any constant may be added to G: it is q times its own sum that the gradient subtracts.) The share s needs
// the teacher's head, which few entries decide. The first visit leaves the largest logit of every thread; of their
// masses, of which there is a histogram over log2 p, those from some log2 p on hold more than mu, all the more do all
// entries from there on, so that these contain the head. The second visit lists them, usually a few hundred of the row,
// and one warp finds the boundary among them. Where the threads' largest do not hold mu, as in a flat row, or the list
// has no room, the row is visited again (head_entries.cuh).
#pragma once

#include "divergence_terms.cuh"
#include "head_entries.cuh"

namespace distillm {

// The largest of the teacher's logits that a thread sees.
struct LargestSeen {
  float logit = kMinusInfinity<float>;

  template <int N>
  __device__ void add(const float (&teacher)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) logit = fmaxf(logit, teacher[i]);
  }
};

struct AdaptiveTerms {
  using Scratch = HeadScratch;
  using Watch = LargestSeen;
  static constexpr int kSteps = 8;          // of the histogram, per factor of two in p
  static constexpr float kUnit = 1 << 28;   // its counters': the mass of a row fits
  static constexpr float kMargin = 1.001f;  // for rounding, to the safe side

  Softmax q, p;
  float mu, largest, lightest;
  float tail, rest;  // of the entries that are not listed: sum |p - q| and mass
  float share_of_reverse;
  bool infinite;  // whether this thread has seen an entry of -inf
  Scratch& scratch;

  __device__ static bool legal(const RowParameters<float>& row) { return in_unit_interval(row.alpha); }
  __device__ AdaptiveTerms(const RowSoftmaxes& softmaxes, const RowParameters<float>& row, Watch watch,
                           Scratch& scratch)
      : q(softmaxes.q),
        p(softmaxes.p),
        mu(row.alpha),
        largest(watch.logit),
        tail(0),
        rest(0),
        share_of_reverse(0),
        infinite(false),
        scratch(scratch) {}

  // Finds `lightest`: log2 p of listed entries is not below it.
  template <class Rows>
  __device__ void prepare(const Rows& rows) {
    unsigned* const histogram = reinterpret_cast<unsigned*>(scratch.histogram);
    for (int i = threadIdx.x; i < kDigits; i += blockDim.x) histogram[i] = 0;
    if (threadIdx.x == 0) scratch.listed = 0;
    __syncthreads();
    const float log2_p = p.log2_probability(largest);
    const int step = min(max(static_cast<int>(-kSteps * log2_p), 0), kDigits - 1);
    atomicAdd(&histogram[step], static_cast<unsigned>(exp2_fast(log2_p) * kUnit));
    rows.cluster.synchronize_exposing(histogram, kDigits);
    if (threadIdx.x < kWarp) {
      const int last = last_step(rows.cluster, histogram);
      if (threadIdx.x == 0) scratch.lightest = last < kDigits - 1 ? -(last + 1.0f) / kSteps - 0.01f : CUDART_INF_F;
    }
    __syncthreads();
    lightest = scratch.lightest;
  }
  // The step at which the mass from the largest on passes mu; kDigits: none.
  __device__ int last_step(const Cluster& cluster, unsigned* histogram) const {
    constexpr int kOfLane = kDigits / kWarp;
    const int lane = threadIdx.x % kWarp;
    unsigned mass[kOfLane] = {}, own = 0;
    for (int block = 0; block < cluster.size; ++block) {
      const unsigned* const of_block = cluster.in_block(histogram, block) + lane * kOfLane;
#pragma unroll
      for (int i = 0; i < kOfLane; ++i) mass[i] += of_block[i];
    }
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) own += mass[i];
    unsigned before = static_cast<unsigned>(warp_inclusive(own)) - own;
    const float target = mu * kMargin * kUnit;
    int last = kDigits;
#pragma unroll
    for (int i = kOfLane - 1; i >= 0; --i) {
      if (static_cast<float>(before + own) > target) last = lane * kOfLane + i;
      own -= mass[i];
    }
    return __reduce_min_sync(kAllLanes, last);
  }

  template <class First, int N>
  __device__ void chunk(First first, const float (&student_logits)[N], const float (&teacher_logits)[N],
                        Term<float>& sum, float (&log2_p)[N]) {
    float forward = 0, reverse = 0, distances = 0, masses = 0, highest = -CUDART_INF_F;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      log2_p[i] = p.log2_probability(teacher_logits[i]);
      const float log2_q = q.log2_probability(student_logits[i]), log2_ratio = log2_p[i] - log2_q;
      const float p_v = exp2_fast(log2_p[i]), q_v = exp2_fast(log2_q);
      forward = fmaf(p_v, log2_ratio, forward);
      reverse = fmaf(-q_v, log2_ratio, reverse);
      distances += fabsf(p_v - q_v);
      masses += p_v;
      highest = fmaxf(highest, log2_p[i]);
    }
    if (!(fabsf(forward) + fabsf(reverse) < CUDART_INF_F)) {
      infinite = true;
      forward = reverse = 0;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float log2_q = q.log2_probability(student_logits[i]);
        forward += a_log_a_over_b(exp2_fast(log2_p[i]), log2_p[i], log2_q) * static_cast<float>(kLog2E);
        reverse += a_log_a_over_b(exp2_fast(log2_q), log2_q, log2_p[i]) * static_cast<float>(kLog2E);
      }
    }
    if (highest >= lightest) {
      distances = masses = 0;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float p_v = exp2_fast(log2_p[i]);
        const float distance = fabsf(p_v - exp2_fast(q.log2_probability(student_logits[i])));
        if (log2_p[i] >= lightest) {
          list({teacher_logits[i], first() + i, distance});
        } else {
          distances += distance;
          masses += p_v;
        }
      }
    }
    sum.value += forward;
    sum.g += reverse;
    tail += distances;
    rest += masses;
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

  __device__ void publish() {
    scratch.tail.publish({}, tail);
    scratch.rest.publish({}, rest);
  }
  template <class Rows>
  __device__ void share(const Rows& rows) {
    scratch.tail.share({}, rows.cluster);
    scratch.rest.share({}, rows.cluster);
    rows.cluster.expose(&scratch.listed, 1, threadIdx.x, kWarp);
    rows.cluster.expose(scratch.list, min(scratch.listed, kListed), threadIdx.x, kWarp);
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
    tail = scratch.tail.total({}, rows.cluster);
    rest = scratch.rest.total({}, rows.cluster);
    if (!(mu < 1)) return {tail, 0, true};
    if (lightest < CUDART_INF_F) {
      if (rows.cluster.rank == 0 && threadIdx.x < kWarp) {
        rows.cluster.to_all_blocks(&scratch.gaps, listed_gaps(rows));
      }
      rows.cluster.synchronize();
      const Gaps gaps = *rows.cluster.received(&scratch.gaps);
      if (gaps.known) return gaps;
    }
    rows.stage_again([](const auto&, const auto&) {});
    return RowEntries<Rows>{rows, q, p, scratch}.gaps(mu);
  }
  template <class Rows>
  __device__ Gaps listed_gaps(const Rows& rows) const {
    int longest = 0;
    for (int block = 0; block < rows.cluster.size; ++block) {
      longest = max(longest, rows.cluster.in_block(&scratch, block)->listed);
    }
    if (longest > kListed) return {0, 0, false};
    return ListedEntries<Rows>{rows, p, scratch, rest}.gaps(mu, tail);
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
