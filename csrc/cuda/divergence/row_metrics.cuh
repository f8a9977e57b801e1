// Entropies of both sides of a row and whether they agree on the top entry, for the log of a training run.
#pragma once

#include "../../math/metrics.h"
#include "../../math/ordered_key.h"
#include "../row/cluster_reduce.cuh"
#include "divergence_row.cuh"

namespace distillm {

// The largest logit so far and the first entry that has it.
struct TopEntry {
  float logit;
  int id;

  __device__ void add(float z, int v) {
    if (z > logit || (z == logit && v < id)) logit = z, id = v;
  }
  // Larger for larger logits and, of equal ones, for smaller ids.
  __device__ unsigned long long order() const {
    return static_cast<unsigned long long>(ordered_key(logit)) << 32 | (0xffffffffu - static_cast<uint32_t>(id));
  }
};

struct Largest {
  using Value = unsigned long long;

  __device__ Value empty(Value) const { return 0; }
  template <int kLanes>
  __device__ Value lanes(Value x) const {
#pragma unroll
    for (int lane = kLanes / 2; lane > 0; lane /= 2) {
      const Value other = __shfl_xor_sync(kAllLanes, x, lane);
      x = other > x ? other : x;
    }
    return x;
  }
};

struct MetricsScratch {
  Partials<Add> student_entropy, teacher_entropy;
  Partials<Largest> student_top, teacher_top;
};

// A thread's share. q and p: the softmax of each side's own logits.
struct RowMetrics {
  Softmax q, p;
  float student_entropy, teacher_entropy;  // -sum p log2 p
  TopEntry student_top, teacher_top;

  __device__ static RowMetrics of(const RowSoftmaxes& softmaxes) {
    const TopEntry none{-CUDART_INF_F, INT32_MAX};
    return {softmaxes.q, softmaxes.p, 0, 0, none, none};
  }

  template <int N>
  __device__ void add(int first, const float (&student_logits)[N], const float (&teacher_logits)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      student_entropy -= negative_entropy(q, student_logits[i]);
      teacher_entropy -= negative_entropy(p, teacher_logits[i]);
      student_top.add(student_logits[i], first + i);
      teacher_top.add(teacher_logits[i], first + i);
    }
  }

  __device__ void publish(MetricsScratch& scratch) const {
    scratch.student_entropy.publish({}, student_entropy);
    scratch.teacher_entropy.publish({}, teacher_entropy);
    scratch.student_top.publish({}, student_top.order());
    scratch.teacher_top.publish({}, teacher_top.order());
  }
  __device__ static void share(MetricsScratch& scratch, const Cluster& cluster) {
    scratch.student_entropy.share({}, cluster);
    scratch.teacher_entropy.share({}, cluster);
    scratch.student_top.share({}, cluster);
    scratch.teacher_top.share({}, cluster);
  }
  // By every thread of the cluster; one writes.
  __device__ static void write(const MetricsScratch& scratch, const Cluster& cluster, float* out) {
    const float nats = static_cast<float>(kLn2);
    const float teacher = nats * scratch.teacher_entropy.total({}, cluster);
    const float student = nats * scratch.student_entropy.total({}, cluster);
    const bool agree = static_cast<uint32_t>(scratch.teacher_top.total({}, cluster)) ==
                       static_cast<uint32_t>(scratch.student_top.total({}, cluster));
    if (cluster.thread() != 0) return;
    out[0] = fmaxf(teacher, 0.0f);
    out[1] = fmaxf(student, 0.0f);
    out[2] = agree ? 1.0f : 0.0f;
  }

 private:
  // A probability that is 0 has a logarithm that counts as finite, so that its product is 0.
  __device__ static float negative_entropy(const Softmax& softmax, float z) {
    const float log2_p = fmaxf(softmax.log2_probability(z), -1e4f);
    return exp2_fast(log2_p) * log2_p;
  }
};

}  // namespace distillm
