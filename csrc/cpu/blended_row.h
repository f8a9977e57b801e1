// The teacher's row of `interpolated`: logits of both sides blended tile by tile, never stored whole.
#pragma once

#include "../math/row_divergence.h"
#include "exponentials.h"

namespace distillm {
inline namespace DISTILLM_ISA {

template <class Real>
void blend_tile(const Real* student, Real student_max, const Real* teacher, Real teacher_max, int64_t count, Real t,
                Real* out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = blended_logit(student[i] - student_max, teacher[i] - teacher_max, t);
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

// Has what the passes use of LogitRow.
template <class Real>
struct BlendedRow {
  LogitRow<Real> student, teacher;
  Real student_max, teacher_max, t;
  int64_t vocab;  // of the wider side

  BlendedRow(const LogitRow<Real>& student, Real student_max, const LogitRow<Real>& teacher, Real t)
      : student(student),
        teacher(teacher),
        student_max(student_max),
        teacher_max(row_maximum(teacher)),
        t(t),
        vocab(student.vocab > teacher.vocab ? student.vocab : teacher.vocab) {}

  const Real* tile(int64_t start, int64_t count, Real* buffer) const {
    alignas(64) Real student_buffer[kTile], teacher_buffer[kTile];
    const Real *zs = student.tile(start, count, student_buffer), *zt = teacher.tile(start, count, teacher_buffer);
    blend_tile(zs, student_max, zt, teacher_max, count, t, buffer);
    return buffer;
  }
};

}  // namespace DISTILLM_ISA
}  // namespace distillm
