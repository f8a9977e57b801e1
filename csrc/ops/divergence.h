// Contract of the operator `divergence`, shared by both backends: argument checks, output shapes, raw views.
//
//   student [R, Vs], teacher [R, Vt]: float32, bfloat16 or float16 (float64 too on the CPU), dtypes may differ unless
//   one
//     is float64; unit stride along the vocabulary, any stride along the rows; labels [R] int64; weight, alpha, cap
//     [R], float32 (float64 for float64 students).
//   -> loss [R]: weight * (min(divergence, cap) + ce_weight * cross-entropy), float32 (float64 for float64 students);
//      gradient [R, Vs] of sum(loss) in the student's dtype, or [0] when it is not asked for.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

namespace distillm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The hyper-parameters as the schema lists them.
struct DivergenceOptions {
  std::string divergence;
  double alpha;
  double beta;
  double temperature;
  double ce_weight;
  int64_t ignore_index;
  bool detach_mixture;
  bool need_gradient;
};

// Everything a kernel reads and writes. Null pointers stand for absent optional tensors.
struct DivergenceCall {
  const void* student;
  const void* teacher;
  ScalarType student_type, teacher_type;
  int64_t rows, student_vocab, teacher_vocab;
  int64_t student_stride, teacher_stride;  // elements from row to row
  const int64_t* labels;
  const void* weight;  // the loss type, like alpha and cap
  const void* alpha;
  const void* cap;
  void* loss;
  void* gradient;  // contiguous, null when not asked for
  DivergenceOptions options;
};

// Keeps the tensors that a DivergenceCall points into alive.
struct DivergenceTensors {
  Tensor student, teacher;
  std::optional<Tensor> labels, weight, alpha, cap;
  Tensor loss, gradient;
  DivergenceCall call;
};

inline ScalarType loss_type(ScalarType student) {
  return student == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Tensor with_unit_column_stride(const Tensor& x) {
  return x.size(1) <= 1 || x.stride(1) == 1 ? x : torch::stable::contiguous(x);
}

inline const void* data_or_null(const std::optional<Tensor>& x) { return x ? x->data_ptr() : nullptr; }

// A [rows] side input of the given type, contiguous.
inline std::optional<Tensor> checked_rows(const std::optional<Tensor>& x, const char* name, int64_t rows,
                                          ScalarType type, const Tensor& student) {
  if (!x) return std::nullopt;
  STD_TORCH_CHECK(x->dim() == 1 && x->size(0) == rows, name, " must have shape [", rows,
                  "], one entry per row of student");
  STD_TORCH_CHECK(x->scalar_type() == type, name, " must have dtype ", torch::headeronly::toString(type));
  STD_TORCH_CHECK(x->device() == student.device(), name, " must be on the device of student");
  return torch::stable::contiguous(*x);
}

inline void check_logits(const Tensor& x, const char* name) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(x.dim() == 2, name, " must have shape [rows, vocabulary], got ", x.dim(), " dimensions");
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half ||
                      (type == ScalarType::Double && x.is_cpu()),
                  name, " must be float32, bfloat16 or float16 (float64 on the CPU), got ",
                  torch::headeronly::toString(type));
}

inline void check_pair(const Tensor& student, const Tensor& teacher) {
  check_logits(student, "student");
  check_logits(teacher, "teacher");
  STD_TORCH_CHECK(student.size(0) == teacher.size(0), "teacher must have as many rows as student (", student.size(0),
                  "), got ", teacher.size(0));
  STD_TORCH_CHECK(student.device() == teacher.device(), "teacher must be on the device of student");
  STD_TORCH_CHECK((student.scalar_type() == ScalarType::Double) == (teacher.scalar_type() == ScalarType::Double),
                  "float64 logits need float64 on both sides, got student ",
                  torch::headeronly::toString(student.scalar_type()), " and teacher ",
                  torch::headeronly::toString(teacher.scalar_type()));
}

inline DivergenceCall raw_view(const DivergenceTensors& t, DivergenceOptions options) {
  return {t.student.data_ptr(),
          t.teacher.data_ptr(),
          t.student.scalar_type(),
          t.teacher.scalar_type(),
          t.student.size(0),
          t.student.size(1),
          t.teacher.size(1),
          t.student.stride(0),
          t.teacher.stride(0),
          static_cast<const int64_t*>(data_or_null(t.labels)),
          data_or_null(t.weight),
          data_or_null(t.alpha),
          data_or_null(t.cap),
          t.loss.data_ptr(),
          options.need_gradient ? t.gradient.data_ptr() : nullptr,
          std::move(options)};
}

// Checks every argument, brings layouts into the form above and allocates the outputs.
inline DivergenceTensors prepare_divergence(const Tensor& student, const Tensor& teacher,
                                            const std::optional<Tensor>& labels, const std::optional<Tensor>& weight,
                                            const std::optional<Tensor>& alpha, const std::optional<Tensor>& cap,
                                            DivergenceOptions options) {
  check_pair(student, teacher);
  STD_TORCH_CHECK(options.temperature > 0, "temperature must be positive, got ", options.temperature);
  STD_TORCH_CHECK(options.ce_weight == 0 || labels, "ce_weight needs labels");
  const int64_t rows = student.size(0);
  const ScalarType type = loss_type(student.scalar_type());
  DivergenceTensors t;
  t.student = with_unit_column_stride(student);
  t.teacher = with_unit_column_stride(teacher);
  t.labels = checked_rows(labels, "labels", rows, ScalarType::Long, student);
  t.weight = checked_rows(weight, "weight", rows, type, student);
  t.alpha = checked_rows(alpha, "alpha", rows, type, student);
  t.cap = checked_rows(cap, "cap", rows, type, student);
  t.loss = torch::stable::new_empty(student, {rows}, type);
  t.gradient = options.need_gradient ? torch::stable::new_empty(student, {rows, student.size(1)})
                                     : torch::stable::new_empty(student, {0});
  t.call = raw_view(t, std::move(options));
  return t;
}

}  // namespace distillm
