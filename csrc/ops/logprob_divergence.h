// Contract of the operator `logprob_divergence`, shared by both backends: signature, argument checks, output shapes,
// raw views.
//
//   student [R, V] log-probabilities; teacher [R, V] likewise, or probabilities where probability_floor is given:
//   float32,
//     bfloat16 or float16 (float64 too on the CPU), dtypes may differ unless one is float64; any row stride;
//     weight [R], float32 (float64 for float64 students);
//     divergence: forward_kl, reverse_kl or generalized_js (0 < beta < 1, the teacher's weight);
//     probability_floor: what the logarithm of a smaller probability is taken of; for forward_kl alone.
//   -> loss [R]: weight * sum_v value_v, float32 (float64 for float64 students);
//      gradient of sum(loss) by the student's entries, each a variable of its own: weight * G_v, shape and dtype of
//      student; [0] when it is not asked for.
//   Nothing is normalised. A row of weight 0 is not read: loss and gradient are 0.
#pragma once

#include "logits.h"

namespace distillm {

// Everything a kernel reads and writes. Null pointers stand for absent optional tensors.
struct LogprobDivergenceCall {
  const void* student;
  const void* teacher;
  ScalarType student_type, teacher_type;
  int64_t rows, vocab;
  RowLayout student_rows, teacher_rows;
  const void* weight;  // the loss type
  void* loss;
  void* gradient;  // contiguous, null when not asked for
  double beta, floor;
  bool probabilities;
  std::string divergence;
};

// Keeps the tensors that a LogprobDivergenceCall points into alive.
struct LogprobDivergenceTensors {
  Tensor student, teacher;
  OptionalTensor weight;
  Tensor loss, gradient;
  LogprobDivergenceCall call;
};

// Checks every argument, brings layouts into the form above and allocates the outputs.
inline LogprobDivergenceTensors prepare_logprob_divergence(const Tensor& student, const Tensor& teacher,
                                                           const OptionalTensor& weight, std::string divergence,
                                                           double beta, std::optional<double> probability_floor,
                                                           bool need_gradient, NewGradient allocate) {
  check_pair(student, teacher);
  STD_TORCH_CHECK(student.dim() == 2 && teacher.dim() == 2 && vocab_of(student) == vocab_of(teacher),
                  "student and teacher must have the same shape [rows, vocabulary]");
  STD_TORCH_CHECK(divergence != "generalized_js" || (beta > 0 && beta < 1), "beta must lie between 0 and 1, got ",
                  beta);
  STD_TORCH_CHECK(!probability_floor || divergence == "forward_kl", "probability_floor is an option of forward_kl");
  const ScalarType type = loss_type(student.scalar_type());
  LogprobDivergenceTensors t;
  t.student = with_unit_column_stride(student);
  t.teacher = with_unit_column_stride(teacher);
  t.weight = checked_rows(weight, "weight", student.size(0), type, student);
  t.loss = torch::stable::new_empty(student, {student.size(0)}, type);
  t.gradient = new_gradient(student, need_gradient, allocate);
  t.call = {t.student.data_ptr(),
            t.teacher.data_ptr(),
            student.scalar_type(),
            teacher.scalar_type(),
            student.size(0),
            student.size(1),
            layout_of(t.student),
            layout_of(t.teacher),
            data_or_null(t.weight),
            t.loss.data_ptr(),
            need_gradient ? t.gradient.data_ptr() : nullptr,
            beta,
            probability_floor.value_or(0),
            probability_floor.has_value(),
            std::move(divergence)};
  return t;
}

// The operator on a backend, which supplies
//   static Tensor new_gradient(const Tensor& like)               uninitialised
//   static void run(const LogprobDivergenceTensors& tensors)     the kernel, on tensors.call
template <class Backend>
std::tuple<Tensor, Tensor> logprob_divergence(const Tensor& student, const Tensor& teacher,
                                              const OptionalTensor& weight, std::string name, double beta,
                                              std::optional<double> probability_floor, bool need_gradient) {
  const LogprobDivergenceTensors t = prepare_logprob_divergence(
      student, teacher, weight, std::move(name), beta, probability_floor, need_gradient, Backend::new_gradient);
  Backend::run(t);
  return {t.loss, t.gradient};
}

}  // namespace distillm
