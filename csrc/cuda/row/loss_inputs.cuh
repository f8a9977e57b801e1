// What the kernels of `divergence` and `sparse_divergence` take beside the logits: hyper-parameters and the side inputs
// of the rows.
#pragma once

#include <math_constants.h>

#include <cstdint>

#include "../../math/row_loss.h"

namespace distillm {

struct LossArguments : LossScalars<float> {
  const int64_t* labels;  // null when absent, like the next three
  const float* weight;
  const float* alpha_rows;
  const float* cap;
  float* values;  // [R], the losses
  int64_t ignore_index;

  // Of a DivergenceCall: a template, since kernels know nothing of torch.
  template <class Call>
  static LossArguments of(const Call& call) {
    return {LossScalars<float>::of(call.options),
            call.labels,
            static_cast<const float*>(call.weight),
            static_cast<const float*>(call.alpha),
            static_cast<const float*>(call.cap),
            static_cast<float*>(call.loss),
            call.options.ignore_index};
  }
};

// Those of one row.
struct RowInputs {
  float weight, cap;
  int64_t label;
  RowParameters<float> parameters;

  __device__ static RowInputs of(const LossArguments& a, int64_t row) {
    return {a.weight ? a.weight[row] : 1.0f, a.cap ? a.cap[row] : CUDART_INF_F, a.labels ? a.labels[row] : 0,
            RowParameters<float>::of(a, a.alpha_rows, row)};
  }
  __device__ bool skipped(const LossArguments& a) const { return weight == 0 || (a.labels && label == a.ignore_index); }
  __device__ bool legal(const LossArguments& a, int vocab) const {
    const bool label_legal = a.ce_weight == 0 || (label >= 0 && label < vocab);
    return weight == weight && cap >= 0 && label_legal;
  }
};

}  // namespace distillm
