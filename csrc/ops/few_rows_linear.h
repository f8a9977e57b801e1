// Contract of the operator `few_rows_linear`: x W^T + b for a handful of rows, as one decoding step needs it.
//
//   x [M, K], weight [N, K] of the same dtype, float32 or bfloat16; bias [N] of that dtype, or none
//   -> [M, N] of that dtype, accumulated in float32. A row of the result depends on that row of x alone, bit for bit.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>

namespace distillm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// What a kernel reads and writes; every matrix is contiguous.
struct FewRowsLinearCall {
  const float* x;  // [rows, depth]
  const void* weight;
  const void* bias;  // null where there is none
  void* out;
  int64_t rows, columns, depth;
  bool bfloat16;  // weight, bias and out; else float32
};

inline void check_few_rows_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1),
                  "few_rows_linear expects x [M, K] and weight [N, K]");
  const ScalarType type = weight.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16, "weight must be float32 or bfloat16, got ",
                  torch::headeronly::toString(type));
  STD_TORCH_CHECK(x.scalar_type() == type, "x must have the dtype of weight, got ",
                  torch::headeronly::toString(x.scalar_type()));
  STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == weight.size(0) && bias->scalar_type() == type),
                  "bias must be [N] and have the dtype of weight");
}

}  // namespace distillm
