// Divergence between teacher and student of every row, and its gradient with respect to the student's logits.
//
//   student [R, Vs], teacher [R, Vt], float, bfloat16 or float16, any row stride -> loss [R] float, gradient [R, Vs]
//
// One block per row; each thread visits chunks of 16 bytes per side, strided by the block (row_pair.cuh).
// Three passes: softmax statistics of both sides (online); value and sum of G; gradient. Probabilities, mixtures and
// log-probabilities exist in registers only, and nothing row-sized is written but the gradient.
// Bytes per entry in bf16: 4 read and 2 written where the pair of rows fits in shared memory (V <= 57,900 at 227 KB).
// Of longer rows shared memory keeps the part that fits, and the rest is read once more in each of the two later
// passes.
#pragma once

#include <math_constants.h>

#include "../math/divergence.h"
#include "../math/metrics.h"
#include "../math/row_layout.h"
#include "reduce.cuh"
#include "row_pair.cuh"

namespace distillm {

constexpr int kMaxBlockThreads = 1024;

struct DivergenceArguments {
  const void* student;
  const void* teacher;
  RowLayout student_rows, teacher_rows, gradient_rows;
  int32_t student_vocab, teacher_vocab;
  ElementType teacher_type;
  int32_t staged_chunks;  // per row, that dynamic shared memory has room for
  const int64_t* labels;  // null when absent, like the next three
  const float* weight;
  const float* alpha_rows;
  const float* cap;
  float* loss;
  void* gradient;  // may be the student itself; null when not asked for
  float* metrics;  // [R, 3]: teacher and student entropy in nats, top-1 agreement; null when not asked for
  int64_t ignore_index;
  float alpha, beta, inverse_temperature, ce_weight;
  int32_t detach_mixture;
};

// Maps a logit to its base-2 log-probability. The maximum is subtracted before scaling, which keeps all digits of large
// logits.
struct Softmax {
  float maximum, scale, log2_sum;

  __device__ static Softmax of(ExpSum s, float scale) { return {s.maximum, scale, log2f(s.sum)}; }
  __device__ float log2_probability(float z) const { return (z - maximum) * scale - log2_sum; }
};

// The side inputs of a row.
struct RowInputs {
  float weight, cap;
  int64_t label;
  RowParameters<float> parameters;

  __device__ static RowInputs of(const DivergenceArguments& a, int64_t row) {
    return {a.weight ? a.weight[row] : 1.0f,
            a.cap ? a.cap[row] : CUDART_INF_F,
            a.labels ? a.labels[row] : 0,
            {a.alpha_rows ? a.alpha_rows[row] : a.alpha, a.beta, a.detach_mixture != 0}};
  }
  __device__ bool skipped(const DivergenceArguments& a) const {
    return weight == 0 || (a.labels && label == a.ignore_index);
  }
  template <class Functor>
  __device__ bool legal(const DivergenceArguments& a) const {
    const bool label_legal = a.ce_weight == 0 || (label >= 0 && label < a.student_vocab);
    return weight == weight && cap == cap && label_legal && Functor::legal(parameters);
  }
};

// The softmax of both sides, and of the student at T = 1 for the cross-entropy where T is another.
struct RowSoftmaxes {
  Softmax q, p, unit;
  bool legal;  // false for a side that is all -inf or holds a NaN or +inf
};

struct Scratch {
  PartialExpSums student, teacher, unit;
  PartialSums value, g;
};

template <class Student, class Teacher>
__device__ RowSoftmaxes row_softmaxes(const RowPair<Student, Teacher>& rows, const DivergenceArguments& a,
                                      Scratch& scratch) {
  constexpr int N = RowPair<Student, Teacher>::N;
  const float unit_scale = static_cast<float>(kLog2E), scale = unit_scale * a.inverse_temperature;
  const bool own_unit = a.ce_weight != 0 && a.inverse_temperature != 1;
  ExpSum student = ExpSum::empty(), teacher = ExpSum::empty(), unit = ExpSum::empty();
  const auto add = [&](int, const float (&student_logits)[N], const float (&teacher_logits)[N]) {
    student.add(student_logits, scale);
    teacher.add(teacher_logits, scale);
    if (own_unit) unit.add(student_logits, unit_scale);
  };
  rows.template visit<true>(max(a.student_vocab, a.teacher_vocab), add);
  publish(student, scale, scratch.student);
  publish(teacher, scale, scratch.teacher);
  if (own_unit) publish(unit, unit_scale, scratch.unit);
  __syncthreads();
  student = collect(scratch.student, scale);
  teacher = collect(scratch.teacher, scale);
  unit = own_unit ? collect(scratch.unit, unit_scale) : student;
  return {Softmax::of(student, scale), Softmax::of(teacher, scale), Softmax::of(unit, unit_scale),
          student.sum > 0 && teacher.sum > 0};
}

// The logits of one entry -> its Entry -> the divergence's Term.
template <class Functor>
struct EntryTerm {
  Softmax q, p;
  Functor functor;

  __device__ Entry<float> entry(float student_logit, float teacher_logit) const {
    const float log2_q = q.log2_probability(student_logit), log2_p = p.log2_probability(teacher_logit);
    return {log2_p, log2_q, exp2_fast(log2_p), exp2_fast(log2_q)};
  }
};

template <class Functor, class Student, class Teacher>
__device__ Term<float> row_sums(const RowPair<Student, Teacher>& rows, const EntryTerm<Functor>& terms,
                                Scratch& scratch) {
  constexpr int N = RowPair<Student, Teacher>::N;
  Term<float> sum{0, 0};
  const auto add = [&](int, const float (&student_logits)[N], const float (&teacher_logits)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const Term<float> term = terms.functor(terms.entry(student_logits[i], teacher_logits[i]));
      sum.value += term.value;
      sum.g += term.g;
    }
  };
  rows.template visit<false>(max(rows.student.vocab, rows.teacher.vocab), add);
  publish(sum.value, scratch.value);
  publish(sum.g, scratch.g);
  __syncthreads();
  return {collect(scratch.value), collect(scratch.g)};
}

struct RowLoss {
  float value;
  bool constant;  // a capped or infinite divergence: it has no gradient, and G may be infinite

  __device__ static RowLoss of(const DivergenceArguments& a, const RowInputs& in, float divergence,
                               float cross_entropy) {
    const bool capped = divergence > in.cap, infinite = divergence == CUDART_INF_F;
    const float uncapped = a.ce_weight != 0 ? a.ce_weight * cross_entropy : 0.0f;
    return {in.weight * ((capped ? in.cap : divergence) + uncapped), capped || infinite};
  }
};

// gradient_v = g_scale G_v + q_scale q_v + unit_scale * (softmax of the student at T = 1); at the label less
// label_scale.
//
// The cross-entropy's own G is -1 at the label and 0 elsewhere: at T = 1 it shifts q_scale and one entry, at another
// temperature it needs the softmax of its own.
template <class Functor>
struct GradientTerm {
  EntryTerm<Functor> terms;
  Softmax unit;
  float g_scale, q_scale, unit_scale, label_scale;
  bool constant;

  __device__ static GradientTerm of(const DivergenceArguments& a, const EntryTerm<Functor>& terms, const Softmax& unit,
                                    float weight, float sum_g, bool constant) {
    const float g_scale = weight * a.inverse_temperature, label_scale = weight * a.ce_weight;
    const bool own_unit = a.inverse_temperature != 1;
    const float q_scale = (constant ? 0.0f : -g_scale * sum_g) + (own_unit ? 0.0f : label_scale);
    return {terms, unit, g_scale, q_scale, own_unit ? label_scale : 0.0f, label_scale, constant};
  }
  // Conditions of the row are tested per chunk, not per entry.
  template <int N>
  __device__ void operator()(const float (&student_logits)[N], const float (&teacher_logits)[N],
                             float (&out)[N]) const {
    if (constant) {
#pragma unroll
      for (int i = 0; i < N; ++i) out[i] = q_scale * exp2_fast(terms.q.log2_probability(student_logits[i]));
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const Entry<float> e = terms.entry(student_logits[i], teacher_logits[i]);
        out[i] = g_scale * terms.functor(e).g + q_scale * e.q;
      }
    }
    if (unit_scale != 0) {
#pragma unroll
      for (int i = 0; i < N; ++i) out[i] += unit_scale * exp2_fast(unit.log2_probability(student_logits[i]));
    }
  }
};

template <class Functor, class Student, class Teacher>
__device__ void write_gradient(const RowPair<Student, Teacher>& rows, const GradientTerm<Functor>& term,
                               Student* gradient) {
  constexpr int N = RowPair<Student, Teacher>::N;
  const int vocab = rows.student.vocab;
  const auto write = [&](int first, const float (&student_logits)[N], const float (&teacher_logits)[N]) {
    float out[N];
    term(student_logits, teacher_logits, out);
    store_chunk<Student, N>(gradient, vocab, first, out);
  };
  rows.template visit<false>(vocab, write);
}

struct LabelLogits {
  float student, teacher;

  template <class Rows>
  __device__ static LabelLogits of(const DivergenceArguments& a, const Rows& rows, int label) {
    if (a.ce_weight == 0) return {0.0f, 0.0f};
    return {rows.student.entry(label), rows.teacher.entry(label)};
  }
};

// The entry of the label, which the pass over the row wrote without its own part.
template <class Functor, class Student>
__device__ void write_label_gradient(const GradientTerm<Functor>& term, LabelLogits logits, Student* entry) {
  const float student_logits[1] = {logits.student}, teacher_logits[1] = {logits.teacher};
  float out[1];
  term(student_logits, teacher_logits, out);
  Packing<Student>::store(entry, out[0] - term.label_scale);
}

template <int N, class Student>
__device__ void fill_row(Student* gradient, int vocab, int phase, float value) {
  float out[N];
#pragma unroll
  for (int i = 0; i < N; ++i) out[i] = value;
  for (int first = static_cast<int>(threadIdx.x) * N - phase; first < vocab; first += blockDim.x * N) {
    store_chunk<Student, N>(gradient, vocab, first, out);
  }
}

// Functor: of math/divergence.h. Teacher: the type of Student, or AnyElement for another one.
// Blocks of whole warps; dynamic shared memory of staged_chunks * RowPair::kSlotBytes; grid.x = rows.
template <class Functor, class Student, class Teacher>
__global__ void __launch_bounds__(kMaxBlockThreads) divergence_kernel(const DivergenceArguments a) {
  using Rows = RowPair<Student, Teacher>;
  __shared__ Scratch scratch;
  extern __shared__ uint4 slots[];
  const int64_t row = blockIdx.x;
  Student* gradient = a.gradient ? static_cast<Student*>(a.gradient) + a.gradient_rows.offset(row) : nullptr;
  const typename Rows::StudentRow student(a.student, a.student_rows.offset(row), a.student_vocab, ElementType{});
  const typename Rows::TeacherRow teacher(a.teacher, a.teacher_rows.offset(row), a.teacher_vocab, a.teacher_type);
  const int phase = phase_of<Student, Rows::N>(gradient ? gradient : student.row);

  // row_metrics.cuh wrote them before this launch; they follow the loss where it is left out or NaN.
  const auto fill_metrics = [&](float value) {
    if (a.metrics && threadIdx.x == 0) {
      float* m = a.metrics + kMetrics * static_cast<int64_t>(blockIdx.x);
      m[0] = m[1] = m[2] = value;
    }
  };
  const auto constant_row = [&](float value) {
    if (threadIdx.x == 0) a.loss[row] = value;
    if (gradient) fill_row<Rows::N>(gradient, a.student_vocab, phase, value);
  };
  const RowInputs in = RowInputs::of(a, row);
  const bool skipped = in.skipped(a);
  if (skipped || !in.legal<Functor>(a)) {
    const float value = skipped ? 0.0f : CUDART_NAN_F;
    fill_metrics(value);
    return constant_row(value);
  }

  const Rows rows(student, teacher, phase, slots, a.staged_chunks);
  const RowSoftmaxes softmaxes = row_softmaxes(rows, a, scratch);
  if (!softmaxes.legal) {
    fill_metrics(CUDART_NAN_F);
    return constant_row(CUDART_NAN_F);
  }

  const int label = static_cast<int>(in.label);
  const LabelLogits label_logits = LabelLogits::of(a, rows, label);  // after row_sums the gradient may overwrite them
  const EntryTerm<Functor> terms{softmaxes.q, softmaxes.p, Functor(in.parameters)};
  const Term<float> sum = row_sums(rows, terms, scratch);
  const float cross_entropy = -softmaxes.unit.log2_probability(label_logits.student) * static_cast<float>(kLn2);
  const RowLoss loss = RowLoss::of(a, in, sum.value, cross_entropy);
  if (loss.value != loss.value) fill_metrics(loss.value);
  if (loss.value != loss.value || !gradient) return constant_row(loss.value);

  if (threadIdx.x == 0) a.loss[row] = loss.value;
  const auto term = GradientTerm<Functor>::of(a, terms, softmaxes.unit, in.weight, sum.g, loss.constant);
  write_gradient(rows, term, gradient);
  if (a.ce_weight == 0) return;
  __syncthreads();
  if (threadIdx.x == 0) write_label_gradient(term, label_logits, gradient + label);
}

}  // namespace distillm
