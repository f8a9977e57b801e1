// Contract of the operators `pack_logits` and `unpack_logits`, shared by both backends: signatures and checks.
// Compressed logits of R positions to and from packed records (csrc/math/records/record.h).
//
//   ids [R, k] int32; logprobs [R, k], log_norm [R, T], tail_logprob [R, T], label_logprob [R] float32; valid [R] bool;
//   counts [R, k] int32; label_logprob and counts may be absent.
//   packed [R, bytes] uint8, bytes as the other arguments decide. Unpacking gives empty tensors for what is absent.
#pragma once

#include "../math/records/record_checks.h"
#include "../math/records/record_row.h"
#include "logits.h"

namespace distillm {

struct RecordOptions {
  std::string codec;
  int64_t vocab_size;
  std::vector<double> temperatures;
};

// Keeps what the kernels read and write alive.
struct RecordTensors {
  RecordLayout layout;
  Tensor packed, ids, logprobs, log_norm, tail, label, valid, counts;

  template <class Fields>
  Fields fields() const {
    const bool labels = layout.shape.has_labels, counted = layout.has_counts();
    return {static_cast<decltype(Fields::ids)>(ids.data_ptr()),
            static_cast<decltype(Fields::logprobs)>(logprobs.data_ptr()),
            static_cast<decltype(Fields::norm)>(log_norm.data_ptr()),
            static_cast<decltype(Fields::tail)>(tail.data_ptr()),
            labels ? static_cast<decltype(Fields::label)>(label.data_ptr()) : nullptr,
            static_cast<decltype(Fields::valid)>(valid.data_ptr()),
            counted ? static_cast<decltype(Fields::counts)>(counts.data_ptr()) : nullptr};
  }
};

inline RecordLayout checked_layout(const RecordOptions& options, int64_t k, bool labels, bool counts) {
  const CheckedShape checked = record_shape(options.codec, k, options.vocab_size, options.temperatures, labels, counts);
  STD_TORCH_CHECK(checked.error.empty(), checked.error);
  return record_layout(checked.shape);
}

// A contiguous [rows] (columns < 0) or [rows, columns] tensor of the given type, on the device of `like`.
inline Tensor checked_field(const Tensor& x, const char* name, int64_t rows, int64_t columns, ScalarType type,
                            const Tensor& like) {
  const bool shaped = columns < 0 ? x.dim() == 1 : x.dim() == 2 && x.size(1) == columns;
  STD_TORCH_CHECK(shaped && x.size(0) == rows, name, " must have shape [", rows, columns < 0 ? "" : ", ",
                  columns < 0 ? "" : std::to_string(columns), "]");
  STD_TORCH_CHECK(x.scalar_type() == type, name, " must have dtype ", torch::headeronly::toString(type), ", got ",
                  torch::headeronly::toString(x.scalar_type()));
  STD_TORCH_CHECK(x.device() == like.device(), name, " must be on the device of ids");
  return torch::stable::contiguous(x);
}

inline RecordTensors prepare_pack(const Tensor& ids, const Tensor& logprobs, const Tensor& log_norm, const Tensor& tail,
                                  const OptionalTensor& label, const Tensor& valid, const OptionalTensor& counts,
                                  const RecordOptions& options) {
  STD_TORCH_CHECK(ids.dim() == 2, "ids must have shape [rows, k], got ", ids.dim(), " dimensions");
  const int64_t rows = ids.size(0), k = ids.size(1), temperatures = static_cast<int64_t>(options.temperatures.size());
  RecordTensors t;
  t.layout = checked_layout(options, k, label.has_value(), counts.has_value());
  t.ids = checked_field(ids, "ids", rows, k, ScalarType::Int, ids);
  t.logprobs = checked_field(logprobs, "logprobs", rows, k, ScalarType::Float, ids);
  t.log_norm = checked_field(log_norm, "log_norm", rows, temperatures, ScalarType::Float, ids);
  t.tail = checked_field(tail, "tail_logprob", rows, temperatures, ScalarType::Float, ids);
  if (label) t.label = checked_field(*label, "label_logprob", rows, -1, ScalarType::Float, ids);
  t.valid = checked_field(valid, "valid", rows, -1, ScalarType::Bool, ids);
  if (counts) t.counts = checked_field(*counts, "counts", rows, k, ScalarType::Int, ids);
  t.packed = torch::stable::new_empty(ids, {rows, t.layout.bytes}, ScalarType::Byte);
  return t;
}

inline RecordTensors prepare_unpack(const Tensor& packed, int64_t k, bool labels, bool counts,
                                    const RecordOptions& options) {
  RecordTensors t;
  t.layout = checked_layout(options, k, labels, counts);
  STD_TORCH_CHECK(packed.dim() == 2 && packed.scalar_type() == ScalarType::Byte && packed.size(1) == t.layout.bytes,
                  "packed must be uint8 of shape [rows, ", t.layout.bytes, "] for these settings");
  const int64_t rows = packed.size(0), temperatures = t.layout.shape.temperatures;
  const auto empty = [&](std::initializer_list<int64_t> shape, ScalarType type) {
    return torch::stable::new_empty(packed, shape, type);
  };
  t.packed = torch::stable::contiguous(packed);
  t.ids = empty({rows, k}, ScalarType::Int);
  t.logprobs = empty({rows, k}, ScalarType::Float);
  t.log_norm = empty({rows, temperatures}, ScalarType::Float);
  t.tail = empty({rows, temperatures}, ScalarType::Float);
  t.label = labels ? empty({rows}, ScalarType::Float) : empty({0}, ScalarType::Float);
  t.valid = empty({rows}, ScalarType::Bool);
  t.counts = counts ? empty({rows, k}, ScalarType::Int) : empty({0}, ScalarType::Int);
  return t;
}

using UnpackedLogits = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// The operators on a backend, which supplies
//   static void pack(const RecordTensors& tensors)       from the fields to `packed`
//   static void unpack(const RecordTensors& tensors)     and back
template <class Backend>
Tensor pack_logits(const Tensor& ids, const Tensor& logprobs, const Tensor& log_norm, const Tensor& tail,
                   const OptionalTensor& label, const Tensor& valid, const OptionalTensor& counts, int64_t vocab_size,
                   std::vector<double> temperatures, std::string codec) {
  const RecordTensors t = prepare_pack(ids, logprobs, log_norm, tail, label, valid, counts,
                                       {std::move(codec), vocab_size, std::move(temperatures)});
  Backend::pack(t);
  return t.packed;
}

template <class Backend>
UnpackedLogits unpack_logits(const Tensor& packed, std::string codec, int64_t k, int64_t vocab_size,
                             std::vector<double> temperatures, bool has_labels, bool has_counts) {
  const RecordTensors t =
      prepare_unpack(packed, k, has_labels, has_counts, {std::move(codec), vocab_size, std::move(temperatures)});
  Backend::unpack(t);
  return {t.ids, t.logprobs, t.log_norm, t.tail, t.label, t.valid, t.counts};
}

}  // namespace distillm
