// Contract of the operators `divergence` and `divergence_`, shared by both backends: signatures, argument checks,
// output shapes, raw views.
//
//   student [R, Vs] or [B, S, Vs] with R = B S, teacher likewise with Vt: float32, bfloat16 or float16 (float64 too on
//     the CPU), dtypes may differ unless one is float64; unit stride along the vocabulary, any stride along the others;
//     labels [R] int64; weight, alpha, cap [R], float32 (float64 for float64 students);
//     vocab_size: entries of both sides to use, 0 for all that each has.
//   -> loss [R]: weight * (min(divergence, cap) + ce_weight * cross-entropy), float32 (float64 for float64 students);
//      gradient of sum(loss), shape and dtype of student, 0 at entries beyond vocab_size; [0] when it is not asked for;
//      `divergence_` writes it over the student's logits instead;
//      metrics [R, 3] in the dtype of loss: entropy in nats of the teacher and of the student at the temperature, and 1
//      where both have their largest logit (of equal ones the first) at the same entry, else 0; [0] when not asked for.
//      0 in rows that are left out (weight 0, ignored label), NaN in rows whose loss is NaN.
//
// A new hyper-parameter is a field of DivergenceOptions, with its type in OptionTypes and its place in
// DISTILLM_OPTIONS; LossScalars of math/row_loss.h hands it to the kernels of both backends.
#pragma once

#include <algorithm>

#include "../math/metrics.h"
#include "logits.h"

namespace distillm {

// The hyper-parameters, in the order of the schemas.
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

template <class... T>
struct Types {};

// Of its fields after the name, as the schemas and the signatures below list them.
#define DISTILLM_OPTIONS                                                                                     \
  "float alpha, float beta, float temperature, float ce_weight, int ignore_index, bool detach_mixture, int " \
  "vocab_size"
using OptionTypes = Types<double, double, double, double, int64_t, bool, int64_t>;

// The side inputs of the rows, [R] each.
struct RowSides {
  OptionalTensor labels, weight, alpha, cap;

  RowSides checked(const Tensor& student) const {
    const int64_t rows = rows_of(student);
    const ScalarType type = loss_type(student.scalar_type());
    return {checked_rows(labels, "labels", rows, ScalarType::Long, student),
            checked_rows(weight, "weight", rows, type, student), checked_rows(alpha, "alpha", rows, type, student),
            checked_rows(cap, "cap", rows, type, student)};
  }
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

// Keeps what a call points into alive, but for the teacher.
struct LossTensors {
  Tensor student;
  RowSides sides;
  Tensor loss, gradient;
};

struct DivergenceTensors : LossTensors {
  Tensor teacher, metrics;
  DivergenceCall call;
};

// Whether the gradient is formed, and where.
enum class GradientTo { kNowhere, kNewTensor, kStudent };

inline GradientTo new_tensor_if(bool need_gradient) {
  return need_gradient ? GradientTo::kNewTensor : GradientTo::kNowhere;
}

// widest: most entries that vocab_size may ask for, `of`: whose.
inline void check_options(const DivergenceOptions& options, int64_t widest, const char* of, const RowSides& sides) {
  STD_TORCH_CHECK(options.temperature > 0, "temperature must be positive, got ", options.temperature);
  STD_TORCH_CHECK(options.ce_weight == 0 || sides.labels, "ce_weight needs labels");
  STD_TORCH_CHECK(options.vocab_size >= 0 && options.vocab_size <= widest, "vocab_size must lie in 0..", widest, ", ",
                  of, ", got ", options.vocab_size);
}

// Checks the student and the side inputs, brings their layouts into the form above and allocates loss and gradient.
inline void prepare_loss(LossTensors& t, const Tensor& student, const RowSides& sides, GradientTo gradient_to,
                         NewGradient allocate) {
  STD_TORCH_CHECK(gradient_to != GradientTo::kStudent || has_unit_column_stride(student),
                  "student must have stride 1 along the vocabulary to be overwritten");
  t.student = with_unit_column_stride(student);
  t.sides = sides.checked(student);
  t.loss = torch::stable::new_empty(student, {rows_of(student)}, loss_type(student.scalar_type()));
  t.gradient = new_gradient(student, gradient_to == GradientTo::kNewTensor, allocate);
}

// The raw view, without teacher and metrics.
inline DivergenceCall call_of(const LossTensors& t, DivergenceOptions options, GradientTo gradient_to) {
  DivergenceCall call{};
  call.student = t.student.data_ptr();
  call.student_type = t.student.scalar_type();
  call.rows = rows_of(t.student);
  call.student_vocab = entries_to_use(t.student, options.vocab_size);
  call.student_rows = layout_of(t.student);
  call.teacher_rows = RowLayout::uniform(0);
  call.labels = static_cast<const int64_t*>(data_or_null(t.sides.labels));
  call.weight = data_or_null(t.sides.weight);
  call.alpha = data_or_null(t.sides.alpha);
  call.cap = data_or_null(t.sides.cap);
  call.loss = t.loss.data_ptr();
  const Tensor& gradient = gradient_to == GradientTo::kStudent ? t.student : t.gradient;
  const bool forms_gradient = gradient_to != GradientTo::kNowhere;
  call.gradient = forms_gradient ? gradient.data_ptr() : nullptr;
  call.gradient_rows = forms_gradient ? layout_of(gradient) : RowLayout::uniform(0);
  call.gradient_vocab = vocab_of(t.student);
  call.options = std::move(options);
  return call;
}

inline DivergenceTensors prepare_divergence(const Tensor& student, const Tensor& teacher, const RowSides& sides,
                                            DivergenceOptions options, GradientTo gradient_to, bool need_metrics,
                                            NewGradient allocate) {
  check_pair(student, teacher);
  check_options(options, std::min(vocab_of(student), vocab_of(teacher)), "the narrower vocabulary", sides);
  DivergenceTensors t;
  prepare_loss(t, student, sides, gradient_to, allocate);
  t.teacher = with_unit_column_stride(teacher);
  t.metrics = need_metrics ? torch::stable::new_empty(t.loss, {rows_of(student), kMetrics})
                           : torch::stable::new_empty(t.loss, {0});
  t.call = call_of(t, std::move(options), gradient_to);
  t.call.teacher = t.teacher.data_ptr();
  t.call.teacher_type = teacher.scalar_type();
  t.call.teacher_vocab = entries_to_use(teacher, t.call.options.vocab_size);
  t.call.teacher_rows = layout_of(t.teacher);
  t.call.metrics = need_metrics ? t.metrics.data_ptr() : nullptr;
  return t;
}

// The operators on a backend, which supplies
//   static Tensor new_gradient(const Tensor& like)         uninitialised
//   static void run(const DivergenceTensors& tensors)      the kernel, on tensors.call
template <class Backend, class Options = OptionTypes>
struct DivergenceOps;

template <class Backend, class... Option>
struct DivergenceOps<Backend, Types<Option...>> {
  static std::tuple<Tensor, Tensor, Tensor> divergence(const Tensor& student, const Tensor& teacher,
                                                       const OptionalTensor& labels, const OptionalTensor& weight,
                                                       const OptionalTensor& alpha_rows, const OptionalTensor& cap,
                                                       std::string name, Option... options, bool need_gradient,
                                                       bool need_metrics) {
    const DivergenceTensors t =
        prepare_divergence(student, teacher, {labels, weight, alpha_rows, cap}, {std::move(name), options...},
                           new_tensor_if(need_gradient), need_metrics, Backend::new_gradient);
    Backend::run(t);
    return {t.loss, t.gradient, t.metrics};
  }

  static std::tuple<Tensor, Tensor> divergence_(Tensor student, const Tensor& teacher, const OptionalTensor& labels,
                                                const OptionalTensor& weight, const OptionalTensor& alpha_rows,
                                                const OptionalTensor& cap, std::string name, Option... options,
                                                bool need_metrics) {
    const DivergenceTensors t =
        prepare_divergence(student, teacher, {labels, weight, alpha_rows, cap}, {std::move(name), options...},
                           GradientTo::kStudent, need_metrics, Backend::new_gradient);
    Backend::run(t);
    return {t.loss, t.metrics};
  }
};

}  // namespace distillm
