// The teacher's row of `interpolated`: logits of both sides blended tile by tile, never stored whole.
#pragma once

#include "../math/row_divergence.h"
#include "tiles.h"

namespace distillm {
inline namespace DISTILLM_ISA {

template <class Real>
void blend_tile(const Real* student, const Real* teacher, int64_t count, Real t, Real* out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = blended_logit(student[i], teacher[i], t);
}

// Has what the passes use of LogitRow.
template <class Real>
struct BlendedRow {
  LogitRow<Real> student, teacher;
  Real t;
  int64_t vocab;  // of the wider side

  BlendedRow(const LogitRow<Real>& student, const LogitRow<Real>& teacher, Real t)
      : student(student),
        teacher(teacher),
        t(t),
        vocab(student.vocab > teacher.vocab ? student.vocab : teacher.vocab) {}

  const Real* tile(int64_t start, int64_t count, Real* buffer) const {
    alignas(64) Real student_buffer[kTile], teacher_buffer[kTile];
    const Real *zs = student.tile(start, count, student_buffer), *zt = teacher.tile(start, count, teacher_buffer);
    blend_tile(zs, zt, count, t, buffer);
    return buffer;
  }
};

}  // namespace DISTILLM_ISA
}  // namespace distillm
