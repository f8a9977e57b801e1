// Divergence between teacher and student of every row, and its gradient with respect to the student's logits.
//
//   student [R, Vs], teacher [R, Vt], float, bfloat16 or float16, any row stride -> loss [R] float, gradient [R, Vs]
//
// One cluster of blocks per row; each thread visits chunks of 16 bytes per side, strided by the cluster (row_pair.cuh).
// Three passes: softmax statistics of both sides (online); value, G and the sum of G; gradient. Between them the row
// lives in the shared memory of the cluster, first as logits, then as the student's logits and G, so that nothing
// row-sized is written but the gradient, and the third pass computes one exponential per entry.
// Bytes per entry in bf16: 4 read and 2 written where the logits fit in the cluster's shared memory (V <= 58,000 at 227
// KB without clusters, 464,000 with clusters of 8); of longer rows it keeps the part that fits, and the rest is read
// once more in each of the two later passes.
#pragma once

#include "divergence_members.cuh"
#include "row_metrics.cuh"

namespace distillm {

constexpr int kMaxBlockThreads = kMaxBlockWarps * kWarp;

struct Scratch {
  Partials<AddExponentials> student, teacher, unit;
  Partials<Add> value, g;
  MetricsScratch metrics;
};

// All static shared memory of a block.
template <class Member>
struct MemberScratch : Scratch {
  typename MemberOfRow<Member>::Scratch member;
};

template <class Student, class Teacher>
__device__ RowSoftmaxes row_softmaxes(const RowPair<Student, Teacher>& rows, const DivergenceArguments& a,
                                      Scratch& scratch) {
  constexpr int N = RowPair<Student, Teacher>::N;
  const float log2_e = static_cast<float>(kLog2E);
  const AddExponentials scaled{log2_e * a.inverse_temperature}, unscaled{log2_e};
  const bool own_unit = a.ce_weight != 0 && a.inverse_temperature != 1;
  ShiftedSum student = ShiftedSum::from(rows.first_logit(rows.student));
  ShiftedSum teacher = ShiftedSum::from(rows.first_logit(rows.teacher));
  ShiftedSum unit = student;
  rows.first_visit([&](const float (&student_logits)[N], const float (&teacher_logits)[N]) {
    student.add(student_logits, scaled.scale);
    teacher.add(teacher_logits, scaled.scale);
  });
  if (own_unit) {  // rare, and a visit of its own costs the usual one nothing
    rows.visit(a.student_vocab, [&](Place place) {
      float student_logits[N], teacher_logits[N];
      rows.logits(place, student_logits, teacher_logits);
      unit.add(student_logits, unscaled.scale);
    });
  }
  scratch.student.publish(scaled, student);
  scratch.teacher.publish(scaled, teacher);
  if (own_unit) scratch.unit.publish(unscaled, unit);
  rows.cluster.await_start();
  __syncthreads();
  if (threadIdx.x < kWarp) {
    scratch.student.share(scaled, rows.cluster);
    scratch.teacher.share(scaled, rows.cluster);
    if (own_unit) scratch.unit.share(unscaled, rows.cluster);
  }
  rows.cluster.synchronize();
  student = scratch.student.total(scaled, rows.cluster);
  teacher = scratch.teacher.total(scaled, rows.cluster);
  const Softmax q = Softmax::of(student, scaled.scale), p = Softmax::of(teacher, scaled.scale);
  const bool legal = student.sum > 0 && teacher.sum > 0;
  if (!own_unit) return {q, p, q, legal};
  return {q, p, Softmax::of(scratch.unit.total(unscaled, rows.cluster), unscaled.scale), legal};
}

// Keeps G of the entries where there is room; the metrics come along.
template <class Terms, class Student, class Teacher>
__device__ Term<float> row_sums(const RowPair<Student, Teacher>& rows, const Terms& terms,
                                const RowSoftmaxes& softmaxes, float* metrics_of_row, Scratch& scratch) {
  constexpr int N = RowPair<Student, Teacher>::N;
  Term<float> sum{0, 0};
  RowMetrics metrics = RowMetrics::of(softmaxes);
  rows.visit(max(rows.student.vocab, rows.teacher.vocab), [&](Place place) {
    float student_logits[N], teacher_logits[N], g[N];
    rows.logits(place, student_logits, teacher_logits);
    if (metrics_of_row) metrics.add(rows.first_entry(place.position), student_logits, teacher_logits);
    terms.chunk(student_logits, teacher_logits, sum.value, g);
#pragma unroll
    for (int i = 0; i < N; ++i) sum.g += g[i];
    if (place.position < rows.kept) rows.keep(place, g);
  });
  scratch.value.publish({}, sum.value);
  scratch.g.publish({}, sum.g);
  if (metrics_of_row) metrics.publish(scratch.metrics);
  __syncthreads();
  if (threadIdx.x < kWarp) {
    scratch.value.share({}, rows.cluster);
    scratch.g.share({}, rows.cluster);
    if (metrics_of_row) RowMetrics::share(scratch.metrics, rows.cluster);
  }
  rows.cluster.synchronize();
  if (metrics_of_row) RowMetrics::write(scratch.metrics, rows.cluster, metrics_of_row);
  return {scratch.value.total({}, rows.cluster), scratch.g.total({}, rows.cluster)};
}

// constant: G counts as 0, and may be infinite.
template <class Terms, class Student, class Teacher>
__device__ void write_gradient(const RowPair<Student, Teacher>& rows, const Terms& terms,
                               const GradientTerms& gradient_terms, bool constant, Student* gradient) {
  constexpr int N = RowPair<Student, Teacher>::N;
  const int vocab = rows.student.vocab, kept = constant ? 0 : rows.kept;
  Student* const out_row = settled(gradient);
  rows.visit(vocab, [&](Place place) {
    float student_logits[N], g[N], out[N];
    if (place.position < kept) {
      rows.student_logits(place, student_logits);
      rows.kept_values(place, g);
    } else {
      float teacher_logits[N], value = 0;
      rows.logits(place, student_logits, teacher_logits);
      if (constant) {
#pragma unroll
        for (int i = 0; i < N; ++i) g[i] = 0;
      } else {
        terms.chunk(student_logits, teacher_logits, value, g);
      }
    }
    const int first = rows.first_entry(place.position);
    gradient_terms.chunk(first, student_logits, g, out);
    rows.store(out_row, vocab, place.position, first, out);
  });
}

// Where the row's results go.
template <class Student, int N>
struct RowOutput {
  float* loss;
  float* metrics;  // null when not asked for, like the next
  Student* gradient;
  int vocab, gradient_vocab, phase;
  Cluster cluster;

  __device__ void write_loss(float value) const {
    if (cluster.thread() == 0) *loss = value;
  }
  __device__ void clear_beyond_vocab() const {
    for (int v = vocab + cluster.thread(); v < gradient_vocab; v += cluster.threads()) {
      Packing<Student>::store(gradient + v, 0.0f);
    }
  }
  // A row without a divergence: 0 or NaN in everything.
  __device__ void fill(float value) const {
    write_loss(value);
    if (metrics && cluster.thread() == 0) {
      for (int i = 0; i < kMetrics; ++i) metrics[i] = value;
    }
    if (!gradient) return;
    float out[N];
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = value;
    for (int first = cluster.thread() * N - phase; first < vocab; first += cluster.threads() * N) {
      store_chunk<Student, N>(gradient, vocab, first, out);
    }
    clear_beyond_vocab();
  }
};

// The second and third pass.
template <class Terms, class Student, class Teacher, class Output>
__device__ void finish_row(const RowPair<Student, Teacher>& rows, const DivergenceArguments& a, const RowInputs& in,
                           const RowSoftmaxes& softmaxes, const Terms& terms, Scratch& scratch, const Output& output) {
  // After row_sums the gradient may overwrite the label's logit.
  const float label_logit = a.ce_weight != 0 ? rows.student.entry(static_cast<int>(in.label)) : 0.0f;
  const Term<float> sum = row_sums(rows, terms, softmaxes, output.metrics, scratch);
  const float cross_entropy = -softmaxes.unit.log2_probability(label_logit) * static_cast<float>(kLn2);
  const RowLoss loss = RowLoss::of(a, in, sum.value, cross_entropy);
  if (loss.value != loss.value) return output.fill(loss.value);
  output.write_loss(loss.value);
  if (!output.gradient) return;
  write_gradient(rows, terms, GradientTerms::of(a, in, softmaxes, sum.g, loss.constant), loss.constant,
                 output.gradient);
  output.clear_beyond_vocab();
}

// Member: of divergence_members.cuh. Teacher: the type of Student, or AnyElement for another one.
// Blocks of whole warps, in clusters of a power of two; grid.x = rows * blocks of a cluster; dynamic shared memory of
// (staged_turns * RowPair::kSlotBytes + kept_turns * RowPair::kKeptBytes) * threads of a block.
template <class Member, class Student, class Teacher>
__global__ void __launch_bounds__(kMaxBlockThreads, 1) divergence_kernel(const DivergenceArguments a) {
  using Rows = RowPair<Student, Teacher>;
  __shared__ MemberScratch<Member> scratch;
  extern __shared__ float4 slots[];
  const Cluster cluster = Cluster::current();
  const int64_t row = blockIdx.x / cluster.size;
  Student* gradient = a.gradient ? static_cast<Student*>(a.gradient) + a.gradient_rows.offset(row) : nullptr;
  const typename Rows::StudentRow student(a.student, a.student_rows.offset(row), a.student_vocab, ElementType{});
  const typename Rows::TeacherRow teacher(a.teacher, a.teacher_rows.offset(row), a.teacher_vocab, a.teacher_type);
  const int phase = phase_of<Student, Rows::N>(gradient ? gradient : student.row);
  float* metrics = a.metrics ? a.metrics + row * kMetrics : nullptr;
  const RowOutput<Student, Rows::N> output{a.loss + row,     metrics, gradient, a.student_vocab,
                                           a.gradient_vocab, phase,   cluster};

  const RowInputs in = RowInputs::of(a, row);
  const bool skipped = in.skipped(a);
  if (skipped || !in.legal(a) || !MemberOfRow<Member>::legal(in.parameters)) {
    return output.fill(skipped ? 0.0f : CUDART_NAN_F);
  }
  cluster.announce_start();
  const Rows rows(student, teacher, cluster, phase, slots, a.staged_turns, a.kept_turns);
  const RowSoftmaxes softmaxes = row_softmaxes(rows, a, scratch);
  if (!softmaxes.legal) return output.fill(CUDART_NAN_F);
  MemberOfRow<Member>::finish(
      rows, softmaxes, in.parameters, scratch.member, [&](auto functor, auto teacher_logits, const Softmax& p) {
        const EntryTerms<decltype(functor), decltype(teacher_logits)> terms{softmaxes.q, p, functor, teacher_logits};
        finish_row(rows, a, in, softmaxes, terms, scratch, output);
      });
}

}  // namespace distillm
