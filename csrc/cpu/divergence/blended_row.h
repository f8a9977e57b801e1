// The teacher's row of `interpolated`: logits of both sides blended tile by tile, never stored whole.
#pragma once

#include "../../math/row_divergence.h"
#include "../row/exponentials.h"

namespace distillm {
inline namespace DISTILLM_ISA {

template <class Real>
void blend_tile(const Real* student, Real student_max, const Real* teacher, Real teacher_max, int64_t count, Real t,
                Real* out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = blended_logit(student[i] - student_max, teacher[i] - teacher_max, t);
}

// The same less `origin`, with all digits where the two sides cancel; for 0 < t < 1.
template <class Real>
void blend_tile_precisely(const Real* student, double student_max, const Real* teacher, double teacher_max,
                          int64_t count, double t, double origin, Real* out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const double of_student = (1 - t) * (student[i] - student_max), of_teacher = t * (teacher[i] - teacher_max);
    out[i] = static_cast<Real>(of_student + of_teacher - origin);
  }
}

template <class Real>
Real row_maximum(const LogitRow<Real>& row) {
  alignas(64) Real buffer[kTile];
  Real maximum = kMinusInfinity<Real>;
  for (int64_t start = 0; start < row.vocab; start += kTile) {
    const int64_t count = row.vocab - start < kTile ? row.vocab - start : kTile;
    const Real here = tile_maximum(row.tile(start, count, buffer), count);
    maximum = here > maximum ? here : maximum;
  }
  return maximum;
}

// Has what the passes use of LogitRow. Where the sides are far apart, large numbers that cancel make up a blend: a row
// whose largest one says so is blended in double.
template <class Real>
struct BlendedRow {
  LogitRow<Real> student, teacher;
  Real student_max, teacher_max, t;
  int64_t vocab;  // of the wider side
  bool precise = false;
  double origin = 0;  // of the blends, where they are precise

  BlendedRow(const LogitRow<Real>& student, Real student_max, const LogitRow<Real>& teacher, Real t)
      : student(student),
        teacher(teacher),
        student_max(student_max),
        teacher_max(row_maximum(teacher)),
        t(t),
        vocab(student.vocab > teacher.vocab ? student.vocab : teacher.vocab) {}

  // The row as it is to be read once its largest blend is known.
  BlendedRow around(Real largest) const {
    constexpr Real kFar = -32;
    BlendedRow row = *this;
    row.precise = largest < kFar && largest > kMinusInfinity<Real>;
    row.origin = static_cast<double>(largest);
    return row;
  }

  const Real* tile(int64_t start, int64_t count, Real* buffer) const {
    alignas(64) Real student_buffer[kTile], teacher_buffer[kTile];
    const Real *zs = student.tile(start, count, student_buffer), *zt = teacher.tile(start, count, teacher_buffer);
    if (precise) {
      blend_tile_precisely(zs, student_max, zt, teacher_max, count, t, origin, buffer);
    } else {
      blend_tile(zs, student_max, zt, teacher_max, count, t, buffer);
    }
    return buffer;
  }
};

}  // namespace DISTILLM_ISA
}  // namespace distillm
