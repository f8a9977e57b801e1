// Contract of the operator `topk_logits`, shared by both backends: signature, argument checks, output shapes, raw view.
//
//   logits [R, V] float32, bfloat16, float16 (float64 on the CPU), any row stride; labels [R] int64 or none;
//   position [R] int64 or none; temperatures: 1..16 positive numbers
//   -> ids [R, k] int32, logprobs [R, k], log_norm [R, T], tail_logprob [R, T], label_logprob [R], valid [R] bool,
//      counts [R, k] int32; logarithms are float32 (float64 for float64 logits)
//
// Without position the k most probable entries are kept. With it, k entries are drawn by systematic sampling from
// (seed, position of the row), and counts says how often each was. label_logprob without labels and counts without
// position are empty. What the fields mean, padding and bad rows: distillm_ext/compressed_logits.py.
#pragma once

#include "../math/limits.h"
#include "logits.h"

namespace distillm {

constexpr int kPaddingId = -1;

// Everything a kernel reads and writes. Null pointers stand for what is absent.
struct TopkLogitsCall {
  const void* logits;
  ScalarType type;
  int64_t rows, vocab, stride;  // elements from row to row
  const int64_t* labels;
  const int64_t* position;
  int64_t k, seed;
  const double* temperatures;
  int32_t temperature_count;
  int32_t* ids;
  void* logprobs;  // the loss type, like the next three
  void* log_norm;
  void* tail_logprob;
  void* label_logprob;
  bool* valid;
  int32_t* counts;
};

// Keeps what a TopkLogitsCall points into alive.
struct TopkLogitsTensors {
  Tensor logits;
  OptionalTensor labels, position;
  std::vector<double> temperatures;
  Tensor ids, logprobs, log_norm, tail_logprob, label_logprob, valid, counts;

  TopkLogitsCall call(int64_t k, int64_t seed) const {
    return {logits.data_ptr(),
            logits.scalar_type(),
            logits.size(0),
            logits.size(1),
            logits.stride(0),
            static_cast<const int64_t*>(data_or_null(labels)),
            static_cast<const int64_t*>(data_or_null(position)),
            k,
            seed,
            temperatures.data(),
            static_cast<int32_t>(temperatures.size()),
            static_cast<int32_t*>(ids.data_ptr()),
            logprobs.data_ptr(),
            log_norm.data_ptr(),
            tail_logprob.data_ptr(),
            labels ? label_logprob.data_ptr() : nullptr,
            static_cast<bool*>(valid.data_ptr()),
            position ? static_cast<int32_t*>(counts.data_ptr()) : nullptr};
  }
};

inline void check_topk_options(const Tensor& logits, int64_t k, const std::vector<double>& temperatures) {
  check_logits(logits, "logits");
  STD_TORCH_CHECK(logits.size(1) >= 1 && logits.size(1) <= INT32_MAX / 2, "logits must have 1 to ", INT32_MAX / 2,
                  " columns, got ", logits.size(1));
  // More than a record holds is for those who keep whole rows as tensors.
  STD_TORCH_CHECK(k >= 1 && k <= std::max<int64_t>(kMaxEntries, logits.size(1)), "k must lie in 1..", kMaxEntries,
                  ", or up to the vocabulary, got ", k);
  STD_TORCH_CHECK(!temperatures.empty() && temperatures.size() <= kMaxTemperatures, "temperatures must be 1 to ",
                  kMaxTemperatures, " numbers, got ", temperatures.size());
  for (double t : temperatures) STD_TORCH_CHECK(t > 0 && t < 1e30, "temperatures must be positive and finite, got ", t);
}

// Checks every argument, brings layouts into the form above and allocates the outputs.
inline TopkLogitsTensors prepare_topk_logits(const Tensor& logits, const OptionalTensor& labels,
                                             const OptionalTensor& position, int64_t k,
                                             std::vector<double> temperatures) {
  check_topk_options(logits, k, temperatures);
  const int64_t rows = logits.size(0), count = static_cast<int64_t>(temperatures.size());
  const ScalarType real = loss_type(logits.scalar_type());
  TopkLogitsTensors t;
  t.logits = with_unit_column_stride(logits);
  t.labels = checked_rows(labels, "labels", rows, ScalarType::Long, logits);
  t.position = checked_rows(position, "position", rows, ScalarType::Long, logits);
  t.ids = torch::stable::new_empty(logits, {rows, k}, ScalarType::Int);
  t.logprobs = torch::stable::new_empty(logits, {rows, k}, real);
  t.log_norm = torch::stable::new_empty(logits, {rows, count}, real);
  t.tail_logprob = torch::stable::new_empty(logits, {rows, count}, real);
  t.label_logprob = torch::stable::new_empty(logits, {labels ? rows : 0}, real);
  t.valid = torch::stable::new_empty(logits, {rows}, ScalarType::Bool);
  t.counts = torch::stable::new_empty(logits, {position ? rows : 0, k}, ScalarType::Int);
  t.temperatures = std::move(temperatures);
  return t;
}

// The operator on a backend, which supplies
//   static void run(const TopkLogitsTensors& tensors, const TopkLogitsCall& call)     the kernel
template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> topk_logits(
    const Tensor& logits, const OptionalTensor& labels, const OptionalTensor& position, int64_t k,
    std::vector<double> temperatures, int64_t seed) {
  const TopkLogitsTensors t = prepare_topk_logits(logits, labels, position, k, std::move(temperatures));
  Backend::run(t, t.call(k, seed));
  return {t.ids, t.logprobs, t.log_norm, t.tail_logprob, t.label_logprob, t.valid, t.counts};
}

}  // namespace distillm
