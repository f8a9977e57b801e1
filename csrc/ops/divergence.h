// Contract of the operators `divergence` and `divergence_`, shared by both backends: argument checks, output shapes,
// raw views.
//
//   student [R, Vs] or [B, S, Vs] with R = B S, teacher likewise with Vt: float32, bfloat16 or float16 (float64 too on
//   the
//     CPU), dtypes may differ unless one is float64; unit stride along the vocabulary, any stride along the others;
//     labels [R] int64; weight, alpha, cap [R], float32 (float64 for float64 students);
//     vocab_size: entries of both sides to use, 0 for all that each has.
//   -> loss [R]: weight * (min(divergence, cap) + ce_weight * cross-entropy), float32 (float64 for float64 students);
//      gradient of sum(loss), shape and dtype of student, 0 at entries beyond vocab_size; [0] when it is not asked for;
//      `divergence_` writes it over the student's logits instead;
//      metrics [R, 3] in the dtype of loss: entropy in nats of the teacher and of the student at the temperature, and 1
//      where both have their largest logit (of equal ones the first) at the same entry, else 0; [0] when not asked for.
//      0 in rows that are left out (weight 0, ignored label), NaN in rows whose loss is NaN.
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

#include "../math/metrics.h"
#include "../math/row_layout.h"

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
  int64_t vocab_size;
};

// Everything a kernel reads and writes. Null pointers stand for absent optional tensors.
struct DivergenceCall {
  const void* student;
  const void* teacher;
  ScalarType student_type, teacher_type;
  int64_t rows, student_vocab, teacher_vocab;  // entries to use
  RowLayout student_rows, teacher_rows;
  const int64_t* labels;
  const void* weight;  // the loss type, like alpha and cap
  const void* alpha;
  const void* cap;
  void* loss;
  void* gradient;  // null when not asked for, the student's own memory when in place
  RowLayout gradient_rows;
  int64_t gradient_vocab;  // entries of a gradient row, those from student_vocab on are 0
  void* metrics;           // [rows, kMetrics], null when not asked for
  DivergenceOptions options;
};

// Keeps the tensors that a DivergenceCall points into alive.
struct DivergenceTensors {
  Tensor student, teacher;
  std::optional<Tensor> labels, weight, alpha, cap;
  Tensor loss, gradient, metrics;
  DivergenceCall call;
};

inline ScalarType loss_type(ScalarType student) {
  return student == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline int64_t vocab_of(const Tensor& x) { return x.size(x.dim() - 1); }
inline int64_t rows_of(const Tensor& x) { return x.dim() == 2 ? x.size(0) : x.size(0) * x.size(1); }
inline bool has_unit_column_stride(const Tensor& x) { return vocab_of(x) <= 1 || x.stride(x.dim() - 1) == 1; }

inline Tensor with_unit_column_stride(const Tensor& x) {
  return has_unit_column_stride(x) ? x : torch::stable::contiguous(x);
}

inline RowLayout layout_of(const Tensor& x) {
  return x.dim() == 2 ? RowLayout::uniform(x.stride(0))
                      : RowLayout::of_blocks(x.size(0), x.size(1), x.stride(0), x.stride(1));
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
  STD_TORCH_CHECK(x.dim() == 2 || x.dim() == 3, name,
                  " must have shape [rows, vocabulary] or [blocks, rows, vocabulary], got ", x.dim(), " dimensions");
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half ||
                      (type == ScalarType::Double && x.is_cpu()),
                  name, " must be float32, bfloat16 or float16 (float64 on the CPU), got ",
                  torch::headeronly::toString(type));
}

inline void check_pair(const Tensor& student, const Tensor& teacher) {
  check_logits(student, "student");
  check_logits(teacher, "teacher");
  STD_TORCH_CHECK(rows_of(student) == rows_of(teacher), "teacher must have as many rows as student (", rows_of(student),
                  "), got ", rows_of(teacher));
  STD_TORCH_CHECK(student.device() == teacher.device(), "teacher must be on the device of student");
  STD_TORCH_CHECK((student.scalar_type() == ScalarType::Double) == (teacher.scalar_type() == ScalarType::Double),
                  "float64 logits need float64 on both sides, got student ",
                  torch::headeronly::toString(student.scalar_type()), " and teacher ",
                  torch::headeronly::toString(teacher.scalar_type()));
}

// Whether the gradient is formed, and where.
enum class GradientTo { kNowhere, kNewTensor, kStudent };

inline DivergenceCall raw_view(const DivergenceTensors& t, DivergenceOptions options, GradientTo gradient_to) {
  const int64_t limit = options.vocab_size == 0 ? INT64_MAX : options.vocab_size;
  const Tensor& gradient = gradient_to == GradientTo::kStudent ? t.student : t.gradient;
  return {t.student.data_ptr(),
          t.teacher.data_ptr(),
          t.student.scalar_type(),
          t.teacher.scalar_type(),
          rows_of(t.student),
          std::min(limit, vocab_of(t.student)),
          std::min(limit, vocab_of(t.teacher)),
          layout_of(t.student),
          layout_of(t.teacher),
          static_cast<const int64_t*>(data_or_null(t.labels)),
          data_or_null(t.weight),
          data_or_null(t.alpha),
          data_or_null(t.cap),
          t.loss.data_ptr(),
          gradient_to == GradientTo::kNowhere ? nullptr : gradient.data_ptr(),
          gradient_to == GradientTo::kNowhere ? RowLayout::uniform(0) : layout_of(gradient),
          vocab_of(t.student),
          t.metrics.numel() > 0 ? t.metrics.data_ptr() : nullptr,
          std::move(options)};
}

// How a backend allocates an uninitialised gradient for the logits `like`.
using NewGradient = Tensor (*)(const Tensor& like);

inline Tensor torch_empty_like(const Tensor& like) { return torch::stable::new_empty(like, like.sizes()); }

inline Tensor new_gradient(const Tensor& student, GradientTo gradient_to, NewGradient allocate) {
  return gradient_to == GradientTo::kNewTensor ? allocate(student) : torch::stable::new_empty(student, {0});
}

inline void check_options(const DivergenceOptions& options, const Tensor& student, const Tensor& teacher,
                          bool has_labels) {
  STD_TORCH_CHECK(options.temperature > 0, "temperature must be positive, got ", options.temperature);
  STD_TORCH_CHECK(options.ce_weight == 0 || has_labels, "ce_weight needs labels");
  const int64_t narrower = std::min(vocab_of(student), vocab_of(teacher));
  STD_TORCH_CHECK(options.vocab_size >= 0 && options.vocab_size <= narrower, "vocab_size must lie in 0..", narrower,
                  ", the narrower vocabulary, got ", options.vocab_size);
}

// Checks every argument, brings layouts into the form above and allocates the outputs.
inline DivergenceTensors prepare_divergence(const Tensor& student, const Tensor& teacher,
                                            const std::optional<Tensor>& labels, const std::optional<Tensor>& weight,
                                            const std::optional<Tensor>& alpha, const std::optional<Tensor>& cap,
                                            DivergenceOptions options, GradientTo gradient_to, bool need_metrics,
                                            NewGradient allocate = torch_empty_like) {
  check_pair(student, teacher);
  check_options(options, student, teacher, labels.has_value());
  STD_TORCH_CHECK(gradient_to != GradientTo::kStudent || has_unit_column_stride(student),
                  "student must have stride 1 along the vocabulary to be overwritten");
  const int64_t rows = rows_of(student);
  const ScalarType type = loss_type(student.scalar_type());
  DivergenceTensors t;
  t.student = with_unit_column_stride(student);
  t.teacher = with_unit_column_stride(teacher);
  t.labels = checked_rows(labels, "labels", rows, ScalarType::Long, student);
  t.weight = checked_rows(weight, "weight", rows, type, student);
  t.alpha = checked_rows(alpha, "alpha", rows, type, student);
  t.cap = checked_rows(cap, "cap", rows, type, student);
  t.loss = torch::stable::new_empty(student, {rows}, type);
  t.gradient = new_gradient(student, gradient_to, allocate);
  t.metrics = need_metrics ? torch::stable::new_empty(student, {rows, kMetrics}, type)
                           : torch::stable::new_empty(student, {0}, type);
  t.call = raw_view(t, std::move(options), gradient_to);
  return t;
}

}  // namespace distillm
