// Contract of the operators `sparse_divergence` and `sparse_divergence_`, shared by both backends: signatures,
// argument checks, output shapes, raw views.
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
  const OptionalTensor& counts;
  int64_t vocab;
};

struct SparseDivergenceTensors : LossTensors {
  Tensor ids, logprobs, log_norm, tail_logprob;
  OptionalTensor counts;
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

inline void check_sparse_arguments(const Tensor& student, const CompressedTeacher& teacher, const RowSides& sides,
                                   const DivergenceOptions& options, Tail tail) {
  check_logits(student, "student");
  STD_TORCH_CHECK(teacher.ids.dim() == 2 && teacher.ids.size(0) == rows_of(student),
                  "ids must have shape [rows, kept entries] with as many rows as student (", rows_of(student), ")");
  STD_TORCH_CHECK(teacher.vocab > 0 && teacher.vocab <= INT32_MAX, "teacher_vocab must lie in 1..", INT32_MAX, ", got ",
                  teacher.vocab);
  check_options(options, vocab_of(student), "the student's vocabulary", sides);
  STD_TORCH_CHECK(tail != Tail::kSampled || teacher.counts, "tail 'sampled' needs counts");
  STD_TORCH_CHECK(tail != Tail::kSampled || options.temperature == 1, "tail 'sampled' needs temperature 1, got ",
                  options.temperature);
}

inline SparseDivergenceTensors prepare_sparse_divergence(const Tensor& student, const CompressedTeacher& teacher,
                                                         const RowSides& sides, Tail tail, DivergenceOptions options,
                                                         GradientTo gradient_to, NewGradient allocate) {
  check_sparse_arguments(student, teacher, sides, options, tail);
  const int64_t rows = rows_of(student), kept = teacher.ids.size(1);
  const ScalarType type = loss_type(student.scalar_type());
  SparseDivergenceTensors t;
  prepare_loss(t, student, sides, gradient_to, allocate);
  t.ids = checked_kept(teacher.ids, "ids", rows, kept, ScalarType::Int, student);
  t.logprobs = checked_kept(teacher.logprobs, "logprobs", rows, kept, type, student);
  if (tail == Tail::kSampled) t.counts = checked_kept(*teacher.counts, "counts", rows, kept, ScalarType::Int, student);
  t.log_norm = *checked_rows(teacher.log_norm, "log_norm", rows, type, student);
  t.tail_logprob = *checked_rows(teacher.tail_logprob, "tail_logprob", rows, type, student);
  t.call = {call_of(t, std::move(options), gradient_to),
            static_cast<const int32_t*>(t.ids.data_ptr()),
            t.logprobs.data_ptr(),
            t.log_norm.data_ptr(),
            t.tail_logprob.data_ptr(),
            static_cast<const int32_t*>(data_or_null(t.counts)),
            kept,
            tail};
  t.call.dense.teacher_vocab = teacher.vocab;
  return t;
}

// The operators on a backend, which supplies
//   static Tensor new_gradient(const Tensor& like)              uninitialised
//   static void run(const SparseDivergenceTensors& tensors)     the kernel, on tensors.call
template <class Backend, class Options = OptionTypes>
struct SparseDivergenceOps;

template <class Backend, class... Option>
struct SparseDivergenceOps<Backend, Types<Option...>> {
  static std::tuple<Tensor, Tensor> sparse_divergence(const Tensor& student, const Tensor& ids, const Tensor& logprobs,
                                                      const Tensor& log_norm, const Tensor& tail_logprob,
                                                      const OptionalTensor& counts, const OptionalTensor& labels,
                                                      const OptionalTensor& weight, const OptionalTensor& alpha_rows,
                                                      const OptionalTensor& cap, std::string name, std::string tail,
                                                      Option... options, int64_t teacher_vocab, bool need_gradient) {
    const SparseDivergenceTensors t = prepare_sparse_divergence(
        student, {ids, logprobs, log_norm, tail_logprob, counts, teacher_vocab}, {labels, weight, alpha_rows, cap},
        tail_of(tail), {std::move(name), options...}, new_tensor_if(need_gradient), Backend::new_gradient);
    Backend::run(t);
    return {t.loss, t.gradient};
  }

  static Tensor sparse_divergence_(Tensor student, const Tensor& ids, const Tensor& logprobs, const Tensor& log_norm,
                                   const Tensor& tail_logprob, const OptionalTensor& counts,
                                   const OptionalTensor& labels, const OptionalTensor& weight,
                                   const OptionalTensor& alpha_rows, const OptionalTensor& cap, std::string name,
                                   std::string tail, Option... options, int64_t teacher_vocab) {
    const SparseDivergenceTensors t = prepare_sparse_divergence(
        student, {ids, logprobs, log_norm, tail_logprob, counts, teacher_vocab}, {labels, weight, alpha_rows, cap},
        tail_of(tail), {std::move(name), options...}, GradientTo::kStudent, Backend::new_gradient);
    Backend::run(t);
    return t.loss;
  }
};

}  // namespace distillm
