// Teacher entropy, student entropy and top-1 agreement of every row, for the trainer's log.
//
//   student [R, Vs], teacher [R, Vt] as in divergence.cuh -> metrics [R, 3] float
//
// One block per row, two visits: softmax statistics, then entropies and the place of the largest logit. A launch of its
// own, before the divergence's, which may overwrite the student: in that kernel, at its limit of registers, these sums
// would spill. So metrics cost one more read of both rows; rows that are left out are not read.
#pragma once

#include <cfloat>

#include "divergence.cuh"

namespace distillm {

struct MetricScratch {
  PartialSums teacher_entropy, student_entropy;
  PartialFirsts teacher_top, student_top;
};

// What the metrics see of one side.
struct SideMetrics {
  float entropy;  // base 2, of the entries seen
  int top;        // the first entry seen that has the largest logit

  template <int N>
  __device__ void add(const Softmax& side, int first, const float (&z)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float log2_p = at_least(side.log2_probability(z[i]), -FLT_MAX);  // finite: 0 times it is 0
      entropy -= exp2_fast(log2_p) * log2_p;
      top = z[i] == side.maximum ? min(top, first + i) : top;
    }
  }
};

// Entropies and top-1 agreement of a row whose softmaxes are known.
template <class Student, class Teacher>
__device__ void write_metrics(const RowPair<Student, Teacher>& rows, const RowSoftmaxes& softmaxes,
                              MetricScratch& scratch, float* metrics) {
  constexpr int N = RowPair<Student, Teacher>::N;
  SideMetrics student{0.0f, INT32_MAX}, teacher{0.0f, INT32_MAX};
  const auto add = [&](int first, const float (&student_logits)[N], const float (&teacher_logits)[N]) {
    student.add(softmaxes.q, first, student_logits);
    teacher.add(softmaxes.p, first, teacher_logits);
  };
  rows.template visit<false>(max(rows.student.vocab, rows.teacher.vocab), add);
  publish(teacher.entropy, scratch.teacher_entropy);
  publish(student.entropy, scratch.student_entropy);
  publish_first(teacher.top, scratch.teacher_top);
  publish_first(student.top, scratch.student_top);
  __syncthreads();
  if (threadIdx.x >= kWarp) return;
  const float of_teacher = collect(scratch.teacher_entropy), of_student = collect(scratch.student_entropy);
  const int teacher_top = collect_first(scratch.teacher_top), student_top = collect_first(scratch.student_top);
  if (threadIdx.x != 0) return;
  metrics[0] = fmaxf(of_teacher, 0.0f) * static_cast<float>(kLn2);
  metrics[1] = fmaxf(of_student, 0.0f) * static_cast<float>(kLn2);
  metrics[2] = teacher_top == student_top ? 1.0f : 0.0f;
}

// Launched like divergence_kernel.
template <class Student, class Teacher>
__global__ void __launch_bounds__(kMaxBlockThreads) row_metrics_kernel(const DivergenceArguments a) {
  using Rows = RowPair<Student, Teacher>;
  __shared__ Scratch scratch;
  __shared__ MetricScratch metric_scratch;
  extern __shared__ uint4 slots[];
  const int64_t row = blockIdx.x;
  if (RowInputs::of(a, row).skipped(a)) return;
  const typename Rows::StudentRow student(a.student, a.student_rows.offset(row), a.student_vocab, ElementType{});
  const typename Rows::TeacherRow teacher(a.teacher, a.teacher_rows.offset(row), a.teacher_vocab, a.teacher_type);
  const Rows rows(student, teacher, phase_of<Student, Rows::N>(student.row), slots, a.staged_chunks);
  const RowSoftmaxes softmaxes = row_softmaxes(rows, a, scratch);
  if (softmaxes.legal) write_metrics(rows, softmaxes, metric_scratch, a.metrics + kMetrics * row);
}

}  // namespace distillm
