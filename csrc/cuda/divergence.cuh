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

// The reductions over the cluster of what its threads have summed up.
__device__ __forceinline__ RowSoftmaxes softmaxes_of(ShiftedSum student, ShiftedSum teacher, ShiftedSum unit,
                                                     bool own_unit, float scale, Origins origins, Scratch& scratch,
                                                     const Cluster& cluster) {
  scratch.student.publish({}, student);
  scratch.teacher.publish({}, teacher);
  if (own_unit) scratch.unit.publish({}, unit);
  __syncthreads();
  if (threadIdx.x < kWarp) {
    scratch.student.share({}, cluster);
    scratch.teacher.share({}, cluster);
    if (own_unit) scratch.unit.share({}, cluster);
  }
  cluster.synchronize();
  student = scratch.student.total({}, cluster);
  teacher = scratch.teacher.total({}, cluster);
  unit = own_unit ? scratch.unit.total({}, cluster) : student;
  const float unit_scale = own_unit ? static_cast<float>(kLog2E) : scale;
  return {Softmax::of(student, scale, origins.student), Softmax::of(teacher, scale, origins.teacher),
          Softmax::of(unit, unit_scale, origins.student), student.usable() && teacher.usable() && unit.usable()};
}

// Rows for which the product of a logit and the scale leaves the range of float, and those without a softmax: two more
// visits, of the largest logits and of the differences to them.
template <class Student, class Teacher>
__device__ RowSoftmaxes softmaxes_of_extreme_row(const RowPair<Student, Teacher>& rows, float scale, bool own_unit,
                                                 Scratch& scratch) {
  constexpr int N = RowPair<Student, Teacher>::N;
  const float unit_scale = static_cast<float>(kLog2E);
  const int vocab = max(rows.student.vocab, rows.teacher.vocab);
  Origins highest{-FLT_MAX, -FLT_MAX};
  ShiftedSum student{0, 0}, teacher{0, 0}, unit{0, 0};
#pragma unroll 1  // one copy of the walk serves both visits
  for (int visit = 0; visit < 2; ++visit) {
    rows.visit(vocab, [&](Place place) {
      float student_logits[N], teacher_logits[N];
      rows.logits(place, student_logits, teacher_logits);
      if (visit == 0) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
          highest.student = fmaxf(highest.student, student_logits[i]);
          highest.teacher = fmaxf(highest.teacher, teacher_logits[i]);
        }
        return;
      }
#pragma unroll
      for (int i = 0; i < N; ++i) {
        student_logits[i] -= highest.student;
        teacher_logits[i] -= highest.teacher;
      }
      student.add(student_logits, scale);
      teacher.add(teacher_logits, scale);
      if (own_unit) unit.add(student_logits, unit_scale);
    });
    if (visit == 0) {
      highest = {scratch.student_highest.over({}, highest.student, rows.cluster),
                 scratch.teacher_highest.over({}, highest.teacher, rows.cluster)};
    }
  }
  return softmaxes_of(student, teacher, unit, own_unit, scale, highest, scratch, rows.cluster);
}

template <class Watch, class Student, class Teacher>
__device__ RowSoftmaxes row_softmaxes(const RowPair<Student, Teacher>& rows, const DivergenceArguments& a, Watch& watch,
                                      Scratch& scratch) {
  constexpr int N = RowPair<Student, Teacher>::N;
  const float unit_scale = static_cast<float>(kLog2E), scale = unit_scale * a.inverse_temperature;
  const bool own_unit = a.ce_weight != 0 && a.inverse_temperature != 1;
  const float first_student = rows.first_logit(rows.student), first_teacher = rows.first_logit(rows.teacher);
  ShiftedSum student = ShiftedSum::from(first_student, scale), unit = ShiftedSum::from(first_student, unit_scale);
  ShiftedSum teacher = ShiftedSum::from(first_teacher, scale);
  rows.first_visit([&](const float (&student_logits)[N], const float (&teacher_logits)[N]) {
    student.add(student_logits, scale);
    teacher.add(teacher_logits, scale);
    watch.add(teacher_logits);
  });
  if (own_unit) {  // rare, and a visit of its own costs the usual one nothing
    rows.visit(a.student_vocab, [&](Place place) {
      float student_logits[N], teacher_logits[N];
      rows.logits(place, student_logits, teacher_logits);
      unit.add(student_logits, unit_scale);
    });
  }
  rows.cluster.await_start();
  const RowSoftmaxes usual = softmaxes_of(student, teacher, unit, own_unit, scale, {0, 0}, scratch, rows.cluster);
  return usual.legal ? usual : softmaxes_of_extreme_row(rows, scale, own_unit, scratch);
}

// Keeps what the gradient needs of the entries where there is room; the metrics come along.
template <class Terms, class Student, class Teacher>
__device__ Term<float> row_sums(const RowPair<Student, Teacher>& rows, Terms& terms, const RowSoftmaxes& softmaxes,
                                float* metrics_of_row, Scratch& scratch) {
  constexpr int N = RowPair<Student, Teacher>::N;
  Term<float> sum{0, 0};
  RowMetrics metrics = RowMetrics::of(softmaxes);
  rows.visit(max(rows.student.vocab, rows.teacher.vocab), [&](Place place) {
    float student_logits[N], teacher_logits[N], kept[N];
    rows.logits(place, student_logits, teacher_logits);
    const auto first = [&] { return rows.first_entry(place.position); };
    if (metrics_of_row) metrics.add(first(), student_logits, teacher_logits);
    terms.chunk(first, student_logits, teacher_logits, sum, kept);
    if (place.position < rows.kept) rows.keep(place, kept);
  });
  scratch.value.publish({}, sum.value);
  scratch.g.publish({}, sum.g);
  terms.publish();
  if (metrics_of_row) metrics.publish(scratch.metrics);
  __syncthreads();
  if (threadIdx.x < kWarp) {
    scratch.value.share({}, rows.cluster);
    scratch.g.share({}, rows.cluster);
    terms.share(rows);
    if (metrics_of_row) RowMetrics::share(scratch.metrics, rows.cluster);
  }
  rows.cluster.synchronize();
  if (metrics_of_row) RowMetrics::write(scratch.metrics, rows.cluster, metrics_of_row);
  return {scratch.value.total({}, rows.cluster), scratch.g.total({}, rows.cluster)};
}

// kept_positions: where row_sums has kept something for these terms.
template <class Terms, class Student, class Teacher>
__device__ void write_gradient(const RowPair<Student, Teacher>& rows, const Terms& terms,
                               const GradientTerms& gradient_terms, int kept_positions, Student* gradient) {
  constexpr int N = RowPair<Student, Teacher>::N;
  const int vocab = rows.student.vocab;
  Student* const out_row = settled(gradient);
  rows.visit(vocab, [&](Place place) {
    float student_logits[N], kept[N], out[N];
    if (place.position < kept_positions) {
      rows.student_logits(place, student_logits);
      rows.kept_values(place, kept);
    } else {
      float teacher_logits[N];
      rows.logits(place, student_logits, teacher_logits);
      terms.again(student_logits, teacher_logits, kept);
    }
    const int first = rows.first_entry(place.position);
    gradient_terms.chunk(terms, first, student_logits, kept, out);
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
                           const RowSoftmaxes& softmaxes, Terms& terms, Scratch& scratch, const Output& output) {
  // After row_sums the gradient may overwrite the label's logit.
  const float label_logit = a.ce_weight != 0 ? rows.student.entry(static_cast<int>(in.label)) : 0.0f;
  terms.prepare(rows);
  Term<float> sum;
  do {
    sum = row_sums(rows, terms, softmaxes, output.metrics, scratch);
  } while (terms.revise(rows, sum));
  const float cross_entropy = -softmaxes.unit.log2_probability(label_logit) * static_cast<float>(kLn2);
  const RowLoss loss = RowLoss::of(a, in, sum.value, cross_entropy);
  if (loss.value != loss.value) return output.fill(loss.value);
  output.write_loss(loss.value);
  if (!output.gradient) return;
  const GradientTerms gradient_terms = GradientTerms::of(a, in, softmaxes, sum.g, loss.constant);
  if (loss.constant) {
    write_gradient(rows, ConstantTerms{softmaxes.q}, gradient_terms, 0, output.gradient);
  } else {
    write_gradient(rows, terms, gradient_terms, rows.kept, output.gradient);
  }
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
  if (skipped || !in.legal(a) || !TermsOf<Member>::legal(in.parameters)) {
    return output.fill(skipped ? 0.0f : CUDART_NAN_F);
  }
  cluster.announce_start();
  const Rows rows(student, teacher, cluster, phase, slots, a.staged_turns, a.kept_turns);
  typename TermsOf<Member>::Watch watch;
  const RowSoftmaxes softmaxes = row_softmaxes(rows, a, watch, scratch);
  if (!softmaxes.legal) return output.fill(CUDART_NAN_F);
  TermsOf<Member> terms(softmaxes, in.parameters, watch, scratch.member);
  finish_row(rows, a, in, softmaxes, terms, scratch, output);
}

}  // namespace distillm
