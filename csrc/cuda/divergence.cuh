// Divergence between teacher and student of every row, and its gradient with respect to the student's logits.
//
//   student [R, Vs], teacher [R, Vt], float, bfloat16 or float16, any row stride -> loss [R] float, gradient [R, Vs]
//
// One cluster of blocks per row; each thread visits chunks of 16 bytes per side, strided by the cluster (row_pair.cuh).
// Three passes: softmax statistics of both sides (online); value, G and the sum of G; gradient. Between them the row
// lives in the shared memory of the cluster, first as logits, then as G and q, so that nothing row-sized is written but
// the gradient, and no exponential is computed more than twice.
// Bytes per entry in bf16: 4 read and 2 written where the logits fit in the cluster's shared memory (V <= 58,000 at 227
// KB without clusters, 464,000 with clusters of 8); of longer rows it keeps the part that fits, and the rest is read
// once more in each of the two later passes.
#pragma once

#include "divergence_row.cuh"

namespace distillm {

constexpr int kMaxBlockThreads = 1024;

struct Scratch {
  Partials<AddExponentials> student, teacher, unit;
  Partials<Add> value, g;
};

template <class Student, class Teacher>
__device__ RowSoftmaxes row_softmaxes(const RowPair<Student, Teacher>& rows, const DivergenceArguments& a,
                                      Scratch& scratch) {
  constexpr int N = RowPair<Student, Teacher>::N;
  const float log2_e = static_cast<float>(kLog2E);
  const AddExponentials scaled{log2_e * a.inverse_temperature}, unscaled{log2_e};
  const bool own_unit = a.ce_weight != 0 && a.inverse_temperature != 1;
  ExpSum student = ExpSum::empty(), teacher = ExpSum::empty(), unit = ExpSum::empty();
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

// Keeps G and q of the entries where there is room.
template <class Functor, class Student, class Teacher>
__device__ Term<float> row_sums(const RowPair<Student, Teacher>& rows, const EntryTerms<Functor>& terms,
                                Scratch& scratch) {
  constexpr int N = RowPair<Student, Teacher>::N;
  Term<float> sum{0, 0};
  rows.visit(max(rows.student.vocab, rows.teacher.vocab), [&](Place place) {
    float student_logits[N], teacher_logits[N], g[N], q[N];
    rows.logits(place, student_logits, teacher_logits);
    sum.value += terms.chunk(student_logits, teacher_logits, g, q);
#pragma unroll
    for (int i = 0; i < N; ++i) sum.g += g[i];
    if (place.slot < rows.kept) rows.keep(place.slot, g, q);
  });
  scratch.value.publish({}, sum.value);
  scratch.g.publish({}, sum.g);
  __syncthreads();
  if (threadIdx.x < kWarp) {
    scratch.value.share({}, rows.cluster);
    scratch.g.share({}, rows.cluster);
  }
  rows.cluster.synchronize();
  return {scratch.value.total({}, rows.cluster), scratch.g.total({}, rows.cluster)};
}

template <bool kConstant, class Functor, class Student, class Teacher>
__device__ void write_gradient(const RowPair<Student, Teacher>& rows, const EntryTerms<Functor>& terms,
                               const GradientTerms& gradient_terms, Student* gradient) {
  constexpr int N = RowPair<Student, Teacher>::N;
  const int vocab = rows.student.vocab;
  rows.visit(vocab, [&](Place place) {
    float g[N], q[N], out[N];
    if (place.slot < rows.kept) {
      rows.kept_values(place.slot, g, q);
      gradient_terms.combine<kConstant>(g, q, out);
    } else {
      float student_logits[N], teacher_logits[N];
      rows.logits(place, student_logits, teacher_logits);
      terms.chunk(student_logits, teacher_logits, g, q);
      gradient_terms.combine<kConstant>(g, q, out);
      gradient_terms.add_unit(student_logits, out);
    }
    const int first = rows.first_entry(place.chunk);
    gradient_terms.subtract_label(first, out);
    store_chunk<Student, N>(gradient, vocab, first, out);
  });
}

// Where the row's results go.
template <class Student, int N>
struct RowOutput {
  float* loss;
  Student* gradient;  // null when not asked for
  int vocab, phase;
  Cluster cluster;

  __device__ void write_loss(float value) const {
    if (cluster.thread() == 0) *loss = value;
  }
  __device__ void fill(float value) const {
    write_loss(value);
    if (!gradient) return;
    float out[N];
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = value;
    for (int first = cluster.thread() * N - phase; first < vocab; first += cluster.threads() * N) {
      store_chunk<Student, N>(gradient, vocab, first, out);
    }
  }
};

// The second and third pass.
template <class Functor, class Student, class Teacher, class Output>
__device__ void finish_row(const RowPair<Student, Teacher>& rows, const DivergenceArguments& a, const RowInputs& in,
                           const RowSoftmaxes& softmaxes, Functor functor, Scratch& scratch, const Output& output) {
  // After row_sums the gradient may overwrite the label's logit.
  const float label_logit = a.ce_weight != 0 ? rows.student.entry(static_cast<int>(in.label)) : 0.0f;
  const EntryTerms<Functor> terms{softmaxes.q, softmaxes.p, functor};
  const Term<float> sum = row_sums(rows, terms, scratch);
  const float cross_entropy = -softmaxes.unit.log2_probability(label_logit) * static_cast<float>(kLn2);
  const RowLoss loss = RowLoss::of(a, in, sum.value, cross_entropy);
  if (loss.value != loss.value) return output.fill(loss.value);
  output.write_loss(loss.value);
  if (!output.gradient) return;
  const GradientTerms gradient_terms = GradientTerms::of(a, in, softmaxes.unit, sum.g, loss.constant);
  if (loss.constant) {
    write_gradient<true>(rows, terms, gradient_terms, output.gradient);
  } else {
    write_gradient<false>(rows, terms, gradient_terms, output.gradient);
  }
}

// Calls use(functor) with the functor of a row's parameters: a choice that is the same for a whole row is made once.
template <class Functor>
struct FunctorOfRow {
  template <class Use>
  __device__ static void choose(const RowParameters<float>& row, Use use) {
    use(Functor(row));
  }
};

template <class Functor, class AtZero>
struct FunctorOfRow<OrAtZero<Functor, AtZero, float>> {
  template <class Use>
  __device__ static void choose(const RowParameters<float>& row, Use use) {
    if (row.alpha == 0) {
      use(AtZero(row));
    } else {
      use(Functor(row));
    }
  }
};

// Functor: of math/divergence.h. Teacher: the type of Student, or AnyElement for another one.
// Blocks of whole warps, in clusters of a power of two; grid.x = rows * blocks of a cluster; dynamic shared memory of
// staged_slots * RowPair::kSlotBytes + kept_slots * RowPair::kKeptBytes, kept_slots <= staged_slots. Kept slots hold no
// logits for a cross-entropy at a temperature other than 1: kept_slots is 0 then.
template <class Functor, class Student, class Teacher>
__global__ void __launch_bounds__(kMaxBlockThreads) divergence_kernel(const DivergenceArguments a) {
  using Rows = RowPair<Student, Teacher>;
  __shared__ Scratch scratch;
  extern __shared__ float4 slots[];
  const Cluster cluster = Cluster::current();
  const int64_t row = blockIdx.x / cluster.size;
  Student* gradient = a.gradient ? static_cast<Student*>(a.gradient) + row * a.student_vocab : nullptr;
  const typename Rows::StudentRow student(a.student, row * a.student_stride, a.student_vocab, ElementType{});
  const typename Rows::TeacherRow teacher(a.teacher, row * a.teacher_stride, a.teacher_vocab, a.teacher_type);
  const int phase = phase_of<Student, Rows::N>(gradient ? gradient : student.row);
  const RowOutput<Student, Rows::N> output{a.loss + row, gradient, a.student_vocab, phase, cluster};

  const RowInputs in = RowInputs::of(a, row);
  const bool skipped = in.skipped(a);
  if (skipped || !in.legal<Functor>(a)) return output.fill(skipped ? 0.0f : CUDART_NAN_F);

  cluster.announce_start();
  const Rows rows(student, teacher, cluster, phase, slots, a.staged_slots, a.kept_slots);
  const RowSoftmaxes softmaxes = row_softmaxes(rows, a, scratch);
  if (!softmaxes.legal) return output.fill(CUDART_NAN_F);
  FunctorOfRow<Functor>::choose(in.parameters,
                                [&](auto functor) { finish_row(rows, a, in, softmaxes, functor, scratch, output); });
}

}  // namespace distillm
