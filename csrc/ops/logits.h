// What the contracts of the operators on rows of logits share: shapes, layouts, dtypes and the checks of them.
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
#include <utility>
#include <vector>

#include "../math/row_layout.h"

namespace distillm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

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

inline const void* data_or_null(const OptionalTensor& x) { return x ? x->data_ptr() : nullptr; }

// A [rows] side input of the given type, contiguous.
inline OptionalTensor checked_rows(const OptionalTensor& x, const char* name, int64_t rows, ScalarType type,
                                   const Tensor& student) {
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

// vocab_size: 0 for all entries of a row.
inline int64_t entries_to_use(const Tensor& x, int64_t vocab_size) {
  return vocab_size == 0 ? vocab_of(x) : std::min(vocab_size, vocab_of(x));
}

// How a backend allocates an uninitialised gradient for the logits `like`.
using NewGradient = Tensor (*)(const Tensor& like);

inline Tensor torch_empty_like(const Tensor& like) { return torch::stable::new_empty(like, like.sizes()); }

// [0] when no gradient is needed.
inline Tensor new_gradient(const Tensor& logits, bool needed, NewGradient allocate) {
  return needed ? allocate(logits) : torch::stable::new_empty(logits, {0});
}

}  // namespace distillm
