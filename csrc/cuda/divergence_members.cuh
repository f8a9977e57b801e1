// What each member of the family does between the softmax statistics of a row and its last two passes.
//
// A member is a functor of math/divergence.h, or one of the two tags here. MemberOfRow<Member> has
//   Scratch      shared memory of its own
//   legal(row)   whether the hyper-parameters of the row are in range
//   finish(...)  calls use(functor, the teacher's logits as the functor wants them, the softmax of those)
#pragma once

#include "row_head.cuh"

namespace distillm {

struct NoScratch {};

// The teacher's logits are what they are.
struct OwnTeacher {
  template <int N>
  __device__ void replace(const float (&)[N], float (&)[N]) const {}
};

// Student's and teacher's logits blended, each less the logarithm of its own sum of exponentials. t, of the row, is
// looked at once per chunk. At its ends only one side counts.
struct BlendedTeacher {
  float student_shift, teacher_shift, t;

  template <int N>
  __device__ void replace(const float (&student)[N], float (&teacher)[N]) const {
    if (t > 0 && t < 1) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        teacher[i] = blended_between(student[i] - student_shift, teacher[i] - teacher_shift, t);
      }
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) teacher[i] = t == 0 ? student[i] - student_shift : teacher[i] - teacher_shift;
    }
  }
};

template <class Functor>
struct MemberOfRow {
  using Scratch = NoScratch;

  __device__ static bool legal(const RowParameters<float>& row) { return Functor::legal(row); }
  template <class Rows, class Use>
  __device__ static void finish(const Rows&, const RowSoftmaxes& softmaxes, const RowParameters<float>& row, Scratch&,
                                Use use) {
    use(Functor(row), OwnTeacher{}, softmaxes.p);
  }
};

// interpolated: forward KL from the blended row, whose softmax takes a visit of its own.
template <class Real>
struct Interpolated {};

template <>
struct MemberOfRow<Interpolated<float>> {
  using Scratch = Partials<AddExponentials>;

  __device__ static bool legal(const RowParameters<float>& row) { return in_unit_interval(row.alpha); }
  template <class Rows, class Use>
  __device__ static void finish(const Rows& rows, const RowSoftmaxes& softmaxes, const RowParameters<float>& row,
                                Scratch& scratch, Use use) {
    constexpr int N = Rows::N;
    const BlendedTeacher blend{softmaxes.q.reference, softmaxes.p.reference, row.alpha};
    const AddExponentials scaled{softmaxes.q.scale};
    ShiftedSum sum = ShiftedSum::from(0.0f);
    rows.visit(max(rows.student.vocab, rows.teacher.vocab), [&](Place place) {
      float student_logits[N], teacher_logits[N];
      rows.logits(place, student_logits, teacher_logits);
      blend.replace(student_logits, teacher_logits);
      sum.add(teacher_logits, scaled.scale);
    });
    scratch.publish(scaled, sum);
    __syncthreads();
    if (threadIdx.x < kWarp) scratch.share(scaled, rows.cluster);
    rows.cluster.synchronize();
    sum = scratch.total(scaled, rows.cluster);
    use(ForwardKl<float>(row), blend, Softmax::of(sum, scaled.scale));
  }
};

// adaptive_kl: the share of each direction comes from the teacher's head. A direction without a share is left out: it
// may be infinite.
template <class Real>
struct AdaptiveKl {};

struct AdaptiveTerms {
  float share;
  ForwardKl<float> forward;
  ReverseKl<float> reverse;
  SymmetricKl<float> both;

  __device__ explicit AdaptiveTerms(RowParameters<float> row)
      : share(row.beta), forward(row), reverse(row), both(row) {}
};

template <>
struct FunctorChoice<AdaptiveTerms> {
  template <class Use>
  __device__ static void make(const AdaptiveTerms& terms, Use use) {
    if (terms.share == 0) {
      use(terms.forward);
    } else if (terms.share == 1) {
      use(terms.reverse);
    } else {
      use(terms.both);
    }
  }
};

template <>
struct MemberOfRow<AdaptiveKl<float>> {
  using Scratch = HeadScratch;

  __device__ static bool legal(const RowParameters<float>& row) { return in_unit_interval(row.alpha); }
  template <class Student, class Teacher, class Use>
  __device__ static void finish(const RowPair<Student, Teacher>& rows, const RowSoftmaxes& softmaxes,
                                RowParameters<float> row, Scratch& scratch, Use use) {
    row.beta = HeadSelection<Student, Teacher>{rows, softmaxes, scratch}.share(row.alpha);
    use(AdaptiveTerms(row), OwnTeacher{}, softmaxes.p);
  }
};

}  // namespace distillm
