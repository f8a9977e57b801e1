// Contract of the operators `sparse_divergence` and `sparse_divergence_`, shared by both backends: argument checks,
// output shapes, raw views.
//
//   student [R, V] or [B, S, V] as in ops/divergence.h; ids [R, K] int32; logprobs [R, K] of the teacher at T = 1;
//   log_norm [R] = log sum_v p_v^(1/T) and tail_logprob [R] = log of the teacher's mass off the kept entries, both at
//   the loss's temperature; counts [R, K] int32, how often each entry was drawn, for tail "sampled"; labels, weight,
//   alpha, cap as in ops/divergence.h. logprobs, log_norm and tail_logprob are float32 (float64 for float64 students).
//   Kept entries: 0 <= id < teacher_vocab, the first of equal ids; all other ids are padding. The student's probability
//   of an id from V on is 0.
//   vocab_size: entries of the student to use, 0 for all.
//   -> loss [R] and gradient as in ops/divergence.h; `sparse_divergence_` writes it over the student's logits.
#pragma once

#include "../math/tail.h"
#include "divergence.h"

namespace distillm {

struct SparseDivergenceCall {
  DivergenceCall dense;  // all but the teacher's logits
  const int32_t* ids;
  const void* logprobs;  // the loss type, like log_norm and tail_logprob
  const void* log_norm;
  const void* tail_logprob;
  const int32_t* counts;  // null where the tail is not sampled
  int64_t kept;           // K
  Tail tail;
};

// The teacher's side as the schema lists it.
struct CompressedTeacher {
  const Tensor& ids;
  const Tensor& logprobs;
  const Tensor& log_norm;
  const Tensor& tail_logprob;
  const std::optional<Tensor>& counts;
  int64_t vocab;
};

// Keeps the tensors that a SparseDivergenceCall points into alive.
struct SparseDivergenceTensors {
  Tensor student, ids, logprobs, log_norm, tail_logprob;
  std::optional<Tensor> counts, labels, weight, alpha, cap;
  Tensor loss, gradient;
  SparseDivergenceCall call;
};

inline Tail tail_of(const std::string& name) {
  if (name == "bucket") return Tail::kBucket;
  if (name == "truncate") return Tail::kTruncate;
  if (name == "renormalize") return Tail::kRenormalize;
  STD_TORCH_CHECK(name == "sampled", "tail must be bucket, truncate, renormalize or sampled, got '", name, "'");
  return Tail::kSampled;
}

// A side input of the given shape and type, contiguous.
inline Tensor checked_kept(const Tensor& x, const char* name, int64_t rows, int64_t kept, ScalarType type,
                           const Tensor& student) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == rows && x.size(1) == kept, name, " must have shape [", rows, ", ", kept,
                  "], that of ids");
  STD_TORCH_CHECK(x.scalar_type() == type, name, " must have dtype ", torch::headeronly::toString(type));
  STD_TORCH_CHECK(x.device() == student.device(), name, " must be on the device of student");
  return torch::stable::contiguous(x);
}

inline void check_sparse_arguments(const Tensor& student, const CompressedTeacher& teacher,
                                   const DivergenceOptions& options, Tail tail, bool has_labels) {
  check_logits(student, "student");
  STD_TORCH_CHECK(teacher.ids.dim() == 2 && teacher.ids.size(0) == rows_of(student),
                  "ids must have shape [rows, kept entries] with as many rows as student (", rows_of(student), ")");
  STD_TORCH_CHECK(teacher.vocab > 0 && teacher.vocab <= INT32_MAX, "teacher_vocab must lie in 1..", INT32_MAX, ", got ",
                  teacher.vocab);
  STD_TORCH_CHECK(options.temperature > 0, "temperature must be positive, got ", options.temperature);
  STD_TORCH_CHECK(options.ce_weight == 0 || has_labels, "ce_weight needs labels");
  STD_TORCH_CHECK(options.vocab_size >= 0 && options.vocab_size <= vocab_of(student), "vocab_size must lie in 0..",
                  vocab_of(student), ", the student's vocabulary, got ", options.vocab_size);
  STD_TORCH_CHECK(tail != Tail::kSampled || teacher.counts, "tail 'sampled' needs counts");
  STD_TORCH_CHECK(tail != Tail::kSampled || options.temperature == 1, "tail 'sampled' needs temperature 1, got ",
                  options.temperature);
}

inline SparseDivergenceCall raw_view(const SparseDivergenceTensors& t, int64_t teacher_vocab, Tail tail,
                                     DivergenceOptions options, GradientTo gradient_to) {
  const Tensor& gradient = gradient_to == GradientTo::kStudent ? t.student : t.gradient;
  DivergenceCall dense{};
  dense.student = t.student.data_ptr();
  dense.student_type = t.student.scalar_type();
  dense.rows = rows_of(t.student);
  dense.student_vocab = options.vocab_size == 0 ? vocab_of(t.student) : options.vocab_size;
  dense.teacher_vocab = teacher_vocab;
  dense.student_rows = layout_of(t.student);
  dense.teacher_rows = RowLayout::uniform(0);
  dense.labels = static_cast<const int64_t*>(data_or_null(t.labels));
  dense.weight = data_or_null(t.weight);
  dense.alpha = data_or_null(t.alpha);
  dense.cap = data_or_null(t.cap);
  dense.loss = t.loss.data_ptr();
  dense.gradient = gradient_to == GradientTo::kNowhere ? nullptr : gradient.data_ptr();
  dense.gradient_rows = gradient_to == GradientTo::kNowhere ? RowLayout::uniform(0) : layout_of(gradient);
  dense.gradient_vocab = vocab_of(t.student);
  dense.options = std::move(options);
  return {std::move(dense),
          static_cast<const int32_t*>(t.ids.data_ptr()),
          t.logprobs.data_ptr(),
          t.log_norm.data_ptr(),
          t.tail_logprob.data_ptr(),
          static_cast<const int32_t*>(data_or_null(t.counts)),
          t.ids.size(1),
          tail};
}

// Checks every argument, brings layouts into the form above and allocates the outputs.
inline SparseDivergenceTensors prepare_sparse_divergence(const Tensor& student, const CompressedTeacher& teacher,
                                                         const std::optional<Tensor>& labels,
                                                         const std::optional<Tensor>& weight,
                                                         const std::optional<Tensor>& alpha,
                                                         const std::optional<Tensor>& cap, const std::string& tail_name,
                                                         DivergenceOptions options, GradientTo gradient_to,
                                                         NewGradient allocate = torch_empty_like) {
  const Tail tail = tail_of(tail_name);
  check_sparse_arguments(student, teacher, options, tail, labels.has_value());
  STD_TORCH_CHECK(gradient_to != GradientTo::kStudent || has_unit_column_stride(student),
                  "student must have stride 1 along the vocabulary to be overwritten");
  const int64_t rows = rows_of(student), kept = teacher.ids.size(1);
  const ScalarType type = loss_type(student.scalar_type());
  SparseDivergenceTensors t;
  t.student = with_unit_column_stride(student);
  t.ids = checked_kept(teacher.ids, "ids", rows, kept, ScalarType::Int, student);
  t.logprobs = checked_kept(teacher.logprobs, "logprobs", rows, kept, type, student);
  if (tail == Tail::kSampled) t.counts = checked_kept(*teacher.counts, "counts", rows, kept, ScalarType::Int, student);
  t.log_norm = *checked_rows(teacher.log_norm, "log_norm", rows, type, student);
  t.tail_logprob = *checked_rows(teacher.tail_logprob, "tail_logprob", rows, type, student);
  t.labels = checked_rows(labels, "labels", rows, ScalarType::Long, student);
  t.weight = checked_rows(weight, "weight", rows, type, student);
  t.alpha = checked_rows(alpha, "alpha", rows, type, student);
  t.cap = checked_rows(cap, "cap", rows, type, student);
  t.loss = torch::stable::new_empty(student, {rows}, type);
  t.gradient = new_gradient(student, gradient_to, allocate);
  t.call = raw_view(t, teacher.vocab, tail, std::move(options), gradient_to);
  return t;
}

}  // namespace distillm
