// Divergence between teacher and student of every row, and its gradient with respect to the student's logits.
//
//   student [R, Vs], teacher [R, Vt], float, bfloat16 or float16, any row stride -> loss [R] float, gradient [R, Vs]
//
// One cluster of blocks per row (cluster.cuh); each thread visits chunks of 16 bytes per side, strided by the cluster
// (row_pair.cuh). Three passes: softmax statistics of both sides (online); value, G and the sum of G; gradient.
// Between them the row lives in the shared memory of the cluster, first as logits, then as the student's logits and G,
// so that nothing row-sized is written but the gradient, and the third pass computes one exponential per entry.
// Bytes per entry in bf16: 4 read and 2 written where the logits fit in the cluster's shared memory (V <= 442,000 in 8
// blocks of 227 KB, 196,000 of 99 KB; before 9.0 in one block: 39,900 of 163 KB, 24,500 of 99 KB); of longer rows it
// keeps the part that fits, and the rest is read once more in each of the two later passes. adaptive_kl looks at the
// teacher's logits a few times more, between the first pass and the second (adaptive_head.cuh).
#pragma once

#include "row_metrics.cuh"
#include "terms/divergence_members.cuh"

namespace distillm {

constexpr int kMaxBlockThreads = kMaxBlockWarps * kWarp;

struct Scratch {
  Partials<AddExponentials> student, teacher, unit;
  JointPartials<2> terms;  // value and G
  Partials<Highest> student_highest, teacher_highest;
  MetricsScratch metrics;
};

// All static shared memory of a block.
template <class Member>
struct MemberScratch : Scratch {
  typename TermsOf<Member>::Scratch member;
};

// What the sums of a row's exponentials are taken of: the logits less these.
struct Origins {
  float student, teacher;
};

// What the threads of a cluster sum up for the softmaxes; unit: for the student's at T = 1, where that is another.
struct RowSums {
  ShiftedSum student, teacher, unit;
};

struct SoftmaxScales {
  float own, unit;
  bool own_unit;
};

// The reductions over the cluster of what its threads have summed up.
__device__ __forceinline__ RowSoftmaxes softmaxes_of(RowSums sums, const SoftmaxScales& scales, Origins origins,
                                                     Scratch& scratch, const Cluster& cluster) {
  scratch.student.publish({}, sums.student);
  scratch.teacher.publish({}, sums.teacher);
  if (scales.own_unit) scratch.unit.publish({}, sums.unit);
  __syncthreads();
  if (threadIdx.x < kWarp) {
    scratch.student.share({}, cluster);
    scratch.teacher.share({}, cluster);
    if (scales.own_unit) scratch.unit.share({}, cluster);
  }
  cluster.synchronize();
  const ShiftedSum student = scratch.student.total({}, cluster), teacher = scratch.teacher.total({}, cluster);
  const float inverse = reciprocal_fast(scales.own);
  const Softmax q = Softmax::of(student, scales.own, inverse, origins.student);
  const Softmax p = Softmax::of(teacher, scales.own, inverse, origins.teacher);
  const bool legal = student.usable() && teacher.usable();
  if (!scales.own_unit) return {q, p, q, legal};
  const ShiftedSum unit = scratch.unit.total({}, cluster);
  return {q, p, Softmax::of(unit, scales.unit, reciprocal_fast(scales.unit), origins.student), legal && unit.usable()};
}

// The largest logits of both sides, -FLT_MAX at least.
template <class T>
__device__ Origins largest_logits(const RowPair<T>& rows, Scratch& scratch) {
  constexpr int N = RowPair<T>::N;
  float student = -FLT_MAX, teacher = -FLT_MAX;
  rows.visit(max(rows.student.vocab, rows.teacher.vocab), [&](Place place) {
    float student_logits[N], teacher_logits[N];
    rows.logits(place, student_logits, teacher_logits);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      student = fmaxf(student, student_logits[i]);
      teacher = fmaxf(teacher, teacher_logits[i]);
    }
  });
  return {scratch.student_highest.over({}, student, rows.cluster),
          scratch.teacher_highest.over({}, teacher, rows.cluster)};
}

// Of a row for which the product of a logit and the scale leaves the range of float, or that has no softmax: from the
// differences to the largest logits.
template <class T>
__device__ RowSoftmaxes softmaxes_of_differences(const RowPair<T>& rows, const SoftmaxScales& scales,
                                                 Scratch& scratch) {
  constexpr int N = RowPair<T>::N;
  const Origins origins = largest_logits(rows, scratch);
  RowSums sums{{0, 0}, {0, 0}, {0, 0}};
  rows.visit(max(rows.student.vocab, rows.teacher.vocab), [&](Place place) {
    float student_logits[N], teacher_logits[N];
    rows.logits(place, student_logits, teacher_logits);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      student_logits[i] -= origins.student;
      teacher_logits[i] -= origins.teacher;
    }
    sums.student.add(student_logits, scales.own);
    sums.teacher.add(teacher_logits, scales.own);
    if (scales.own_unit) sums.unit.add(student_logits, scales.unit);
  });
  return softmaxes_of(sums, scales, origins, scratch, rows.cluster);
}

template <class T>
__device__ RowSoftmaxes row_softmaxes(const RowPair<T>& rows, const DivergenceArguments& a, Scratch& scratch) {
  constexpr int N = RowPair<T>::N;
  const float unit = static_cast<float>(kLog2E);
  const SoftmaxScales scales{unit * a.loss.inverse_temperature, unit,
                             a.loss.ce_weight != 0 && a.loss.inverse_temperature != 1};
  const float first_student = rows.first_logit(rows.student), first_teacher = rows.first_logit(rows.teacher);
  RowSums sums{ShiftedSum::from(first_student, scales.own), ShiftedSum::from(first_teacher, scales.own),
               ShiftedSum::from(first_student, scales.unit)};
  rows.first_visit([&](const float (&student_logits)[N], const float (&teacher_logits)[N]) {
    sums.student.add(student_logits, scales.own);
    sums.teacher.add(teacher_logits, scales.own);
  });
  rows.cluster.wait();
  if (scales.own_unit) {  // rare
    rows.visit(rows.student.vocab, [&](Place place) {
      float student_logits[N], teacher_logits[N];
      rows.logits(place, student_logits, teacher_logits);
      sums.unit.add(student_logits, scales.unit);
    });
  }
  const RowSoftmaxes softmaxes = softmaxes_of(sums, scales, {0, 0}, scratch, rows.cluster);
  return softmaxes.legal ? softmaxes : softmaxes_of_differences(rows, scales, scratch);
}

// Keeps what the gradient needs of the entries where there is room; the metrics come along.
template <class Terms, class T, class Output>
__device__ Term<float> row_sums(const RowPair<T>& rows, Terms& terms, const RowSoftmaxes& softmaxes,
                                const Output& output, Scratch& scratch) {
  constexpr int N = RowPair<T>::N;
  Term<float> sum{0, 0};
  RowMetrics metrics = RowMetrics::of(softmaxes);
  rows.visit(max(rows.student.vocab, rows.teacher.vocab), [&](Place place) {
    float student_logits[N], teacher_logits[N], kept[N];
    rows.logits(place, student_logits, teacher_logits);
    const auto first = [&] { return rows.first_entry(place.position); };
    if (output.a.metrics) metrics.add(first(), student_logits, teacher_logits);
    terms.chunk(first, student_logits, teacher_logits, sum, kept);
    if (mostly(place.position < rows.kept)) rows.keep(place, kept);
  });
  scratch.terms.publish({sum.value, sum.g});
  terms.publish();
  if (output.a.metrics) metrics.publish(scratch.metrics);
  __syncthreads();
  if (threadIdx.x < kWarp) {
    scratch.terms.share(rows.cluster);
    terms.share(rows.cluster);
    if (output.a.metrics) RowMetrics::share(scratch.metrics, rows.cluster);
  }
  rows.cluster.synchronize();
  if (output.a.metrics) RowMetrics::write(scratch.metrics, rows.cluster, output.metrics());
  float totals[2];
  scratch.terms.totals(rows.cluster, totals);
  return {totals[0], totals[1]};
}

template <class Terms, class T, class Output>
__device__ void write_gradient(const RowPair<T>& rows, const Terms& terms, const GradientTerms& gradient_terms,
                               const Output& gradient) {
  constexpr int N = RowPair<T>::N;
  const int vocab = rows.student.vocab;
  rows.visit(vocab, [&](Place place) {
    float student_logits[N], kept[N], out[N];
    if (mostly(place.position < rows.kept)) {
      rows.student_logits(place, student_logits);
      rows.kept_values(place, kept);
    } else {
      float teacher_logits[N];
      rows.logits(place, student_logits, teacher_logits);
      terms.again(student_logits, teacher_logits, kept);
    }
    const int first = rows.first_entry(place.position);
    gradient_terms.chunk(terms, first, student_logits, kept, out);
    rows.store(gradient, vocab, place.position, first, out);
  });
}

// Where the row's results go. Pointers that are used once are made there, for the sake of registers.
template <class T, int N>
struct RowOutput {
  const DivergenceArguments& a;
  int row;
  OutputRow<T, N> gradient;  // of use only where it is asked for
  int phase;
  Cluster cluster;

  __device__ float* metrics() const { return a.metrics + int64_t{row} * kMetrics; }
  __device__ void write_loss(float value) const {
    if (cluster.thread() == 0) a.loss.values[row] = value;
  }
  __device__ void clear_beyond_vocab() const {
    for (int v = a.student_vocab + cluster.thread(); v < a.gradient_vocab; v += cluster.threads()) {
      gradient.store_entry(v, 0.0f);
    }
  }
  // A row without a divergence: 0 or NaN in everything.
  __device__ void fill(float value) const {
    write_loss(value);
    if (a.metrics && cluster.thread() == 0) {
      for (int i = 0; i < kMetrics; ++i) metrics()[i] = value;
    }
    if (!a.gradient) return;
    float out[N];
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = value;
    for (int first = cluster.thread() * N - phase; first < a.student_vocab; first += cluster.threads() * N) {
      gradient.store(a.student_vocab, first, out);
    }
    clear_beyond_vocab();
  }
};

// The second and third pass.
template <class Terms, class T, class Output>
__device__ void finish_row(const RowPair<T>& rows, const DivergenceArguments& a, const RowInputs& in,
                           const RowSoftmaxes& softmaxes, Terms& terms, Scratch& scratch, const Output& output) {
  // After row_sums the gradient may overwrite the label's logit.
  const float label_logit = a.loss.ce_weight != 0 ? rows.student.entry(static_cast<int>(in.label)) : 0.0f;
  terms.prepare(rows);
  Term<float> sum = row_sums(rows, terms, softmaxes, output, scratch);
  if (terms.inexact(sum)) {  // rare, and of interpolated alone
    terms.restart(rows);
    sum = row_sums(rows, terms, softmaxes, output, scratch);
  }
  sum = terms.result(rows.cluster, sum);
  const float cross_entropy = -softmaxes.unit.log2_probability(label_logit) * static_cast<float>(kLn2);
  const RowLoss<float> loss = RowLoss<float>::of(a.loss, in.weight, in.cap, sum.value, cross_entropy);
  if (loss.value != loss.value) return output.fill(loss.value);
  output.write_loss(loss.value);
  if (!a.gradient) return;
  const GradientTerms gradient_terms = GradientTerms::of(a, in, softmaxes, sum.g, loss);
  write_gradient(rows, terms, gradient_terms, output.gradient);
  output.clear_beyond_vocab();
}

// Member: of divergence_members.cuh. T: the dtype of both sides, or AnyElement where they have two.
// Blocks of whole warps, in clusters of a power of two; grid.x = rows * blocks of a cluster; dynamic shared memory of
// (staged_turns * RowPair::kSlotBytes + kept_turns * RowPair::kKeptBytes) * threads of a block.
template <class Member, class T>
__global__ void __launch_bounds__(kMaxBlockThreads, 1) divergence_kernel(const DivergenceArguments a) {
  using Rows = RowPair<T>;
  __shared__ MemberScratch<Member> scratch;
  extern __shared__ float4 slots[];
  const Cluster cluster = Cluster::current();
  const int row = cluster.row();
  const typename Rows::Row student(a.student, a.student_rows.offset(row), a.student_vocab, a.student_type);
  const typename Rows::Row teacher(a.teacher, a.teacher_rows.offset(row), a.teacher_vocab, a.teacher_type);
  const OutputRow<T, Rows::N> gradient(a.gradient, a.gradient_rows.offset(row), a.student_type);
  const int phase = a.gradient ? gradient.phase() : student.phase();
  const RowOutput<T, Rows::N> output{a, row, gradient, phase, cluster};

  const RowInputs in = RowInputs::of(a.loss, row);
  const bool skipped = in.skipped(a.loss);
  if (skipped || !in.legal(a.loss, a.student_vocab) || !TermsOf<Member>::legal(in.parameters)) {
    return output.fill(skipped ? 0.0f : CUDART_NAN_F);
  }
  cluster.arrive();
  const Rows rows(student, teacher, cluster, phase, slots, a.staged_turns, a.kept_turns);
  const RowSoftmaxes softmaxes = row_softmaxes(rows, a, scratch);
  if (!softmaxes.legal) return output.fill(CUDART_NAN_F);
  TermsOf<Member> terms(softmaxes, in.parameters, scratch.member);
  finish_row(rows, a, in, softmaxes, terms, scratch, output);
}

}  // namespace distillm
