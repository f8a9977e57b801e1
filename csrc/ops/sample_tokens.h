// Contract of the operator `sample_tokens`, shared by both backends: signature, argument checks, output shapes, raw
// views.
//
//   logits [R, V]: float32, bfloat16 or float16, V < 2^20; unit stride along the vocabulary, any along the rows.
//   temperature, top_p, min_p, repetition_penalty: a number, or [R] float32; top_k, seed, position: an int, or [R]
//   int64; previous [R, n] int64, ids outside the vocabulary are padding; banned [R, V] or [V] bool; bits [R] int64:
//   the draw itself in place of seed and position (tests place draws with it).
//   -> token [R] int64; log-probability under softmax(logits) and under the filtered distribution [R] float32; valid
//      [R] bool. A row without a legal token, or with illegal parameters: token 0, NaN, NaN, false.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <tuple>

#include "sample_call.h"

namespace distillm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The arguments as the schema lists them.
struct SampleInputs {
  Tensor logits;
  OptionalTensor temperature_rows, top_k_rows, top_p_rows, min_p_rows, penalty_rows, seed_rows, position_rows;
  OptionalTensor previous, banned, bits;
};

// Keeps the tensors that a SampleCall points into alive.
struct SampleTensors {
  SampleInputs in;
  Tensor token, logprob, filtered_logprob, valid;
  SampleCall call;
  ScalarType type;
};

inline void check_sampled_logits(const Tensor& x) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(x.dim() == 2, "logits must have shape [rows, vocabulary], got ", x.dim(), " dimensions");
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
                  "logits must be float32, bfloat16 or float16, got ", torch::headeronly::toString(type));
  STD_TORCH_CHECK(x.size(1) >= 1 && x.size(1) <= kMaxSampledVocabulary, "logits must have a vocabulary of 1 to ",
                  kMaxSampledVocabulary, ", got ", x.size(1));
}

// A side input of the given type on the logits' device, made contiguous.
inline void check_side(OptionalTensor& x, const char* name, ScalarType type, const Tensor& logits) {
  if (!x) return;
  STD_TORCH_CHECK(x->scalar_type() == type, name, " must have dtype ", torch::headeronly::toString(type), ", got ",
                  torch::headeronly::toString(x->scalar_type()));
  STD_TORCH_CHECK(x->device() == logits.device(), name, " must be on the device of logits");
  x = torch::stable::contiguous(*x);
}

template <class T>
PerRow<T> checked_parameter(OptionalTensor& x, const char* name, ScalarType type, T value, const Tensor& logits) {
  check_side(x, name, type, logits);
  if (!x) return {nullptr, value};
  STD_TORCH_CHECK(x->dim() == 1 && x->size(0) == logits.size(0), name, " must have shape [", logits.size(0), "]");
  return {static_cast<const T*>(x->data_ptr()), value};
}

inline void check_lists(SampleInputs& in, SampleCall& call) {
  check_side(in.previous, "previous_tokens", ScalarType::Long, in.logits);
  check_side(in.banned, "banned", ScalarType::Bool, in.logits);
  if (in.previous) {
    STD_TORCH_CHECK(in.previous->dim() == 2 && in.previous->size(0) == call.rows,
                    "previous_tokens must have shape [rows, tokens]");
    call.previous = static_cast<const int64_t*>(in.previous->data_ptr());
    call.previous_count = in.previous->size(1);
  }
  if (in.banned) {
    const int64_t dims = in.banned->dim();
    STD_TORCH_CHECK(
        (dims == 1 || (dims == 2 && in.banned->size(0) == call.rows)) && in.banned->size(dims - 1) == call.vocab,
        "banned must have shape [vocabulary] or [rows, vocabulary]");
    call.banned = static_cast<const bool*>(in.banned->data_ptr());
    call.banned_stride = dims == 2 ? call.vocab : 0;
  }
}

// Checks every argument, brings layouts into the form above and allocates the outputs.
inline SampleTensors prepare_sample(SampleInputs in, double temperature, int64_t top_k, double top_p, double min_p,
                                    double penalty, int64_t seed, int64_t position) {
  check_sampled_logits(in.logits);
  if (in.logits.size(1) > 1 && in.logits.stride(1) != 1) in.logits = torch::stable::contiguous(in.logits);
  const Tensor& logits = in.logits;
  const ScalarType real = ScalarType::Float, integer = ScalarType::Long;
  SampleCall call{};
  call.logits = logits.data_ptr();
  call.rows = logits.size(0);
  call.vocab = logits.size(1);
  call.stride = logits.stride(0);
  call.temperature = checked_parameter(in.temperature_rows, "temperature", real, float(temperature), logits);
  call.top_k = checked_parameter(in.top_k_rows, "top_k", integer, top_k, logits);
  call.top_p = checked_parameter(in.top_p_rows, "top_p", real, float(top_p), logits);
  call.min_p = checked_parameter(in.min_p_rows, "min_p", real, float(min_p), logits);
  call.penalty = checked_parameter(in.penalty_rows, "repetition_penalty", real, float(penalty), logits);
  call.seed = checked_parameter(in.seed_rows, "seed", integer, seed, logits);
  call.position = checked_parameter(in.position_rows, "position", integer, position, logits);
  call.bits = checked_parameter<int64_t>(in.bits, "bits", integer, 0, logits).rows;
  check_lists(in, call);
  SampleTensors t{in,
                  torch::stable::new_empty(logits, {call.rows}, integer),
                  torch::stable::new_empty(logits, {call.rows}, real),
                  torch::stable::new_empty(logits, {call.rows}, real),
                  torch::stable::new_empty(logits, {call.rows}, ScalarType::Bool),
                  call,
                  logits.scalar_type()};
  t.call.token = static_cast<int64_t*>(t.token.data_ptr());
  t.call.logprob = static_cast<float*>(t.logprob.data_ptr());
  t.call.filtered_logprob = static_cast<float*>(t.filtered_logprob.data_ptr());
  t.call.valid = static_cast<bool*>(t.valid.data_ptr());
  return t;
}

// The operator on a backend, which supplies
//   static void run(const SampleTensors& tensors)     the kernel, on tensors.call
template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor> sample_tokens(
    const Tensor& logits, const OptionalTensor& temperature_rows, const OptionalTensor& top_k_rows,
    const OptionalTensor& top_p_rows, const OptionalTensor& min_p_rows, const OptionalTensor& penalty_rows,
    const OptionalTensor& seed_rows, const OptionalTensor& position_rows, const OptionalTensor& previous,
    const OptionalTensor& banned, const OptionalTensor& bits, double temperature, int64_t top_k, double top_p,
    double min_p, double penalty, int64_t seed, int64_t position) {
  const SampleTensors t = prepare_sample({logits, temperature_rows, top_k_rows, top_p_rows, min_p_rows, penalty_rows,
                                          seed_rows, position_rows, previous, banned, bits},
                                         temperature, top_k, top_p, min_p, penalty, seed, position);
  Backend::run(t);
  return {t.token, t.logprob, t.filtered_logprob, t.valid};
}

}  // namespace distillm
