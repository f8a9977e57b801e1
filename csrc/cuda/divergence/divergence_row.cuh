// What the kernel of `divergence` computes for one row and for one chunk of entries, apart from walking over them.
#pragma once

#include <math_constants.h>

#include "../../math/divergence.h"
#include "../../math/row_layout.h"
#include "../row/cluster_reduce.cuh"
#include "../row/loss_inputs.cuh"
#include "../row/row_pair.cuh"

namespace distillm {

struct DivergenceArguments {
  const void* student;
  const void* teacher;
  void* gradient;  // may be the student itself; null when not asked for
  RowLayout student_rows, teacher_rows, gradient_rows;
  int32_t student_vocab, teacher_vocab;  // entries to use
  int32_t gradient_vocab;                // entries of a gradient row, those from student_vocab on are 0
  ElementType student_type, teacher_type;
  int32_t staged_turns, kept_turns;  // what dynamic shared memory has room for (row_pair.cuh), kept <= staged
  float* metrics;                    // [rows, 3], null when not asked for
  LossArguments loss;
};

// Maps a logit to its base-2 log-probability, (z - reference) * scale - rest. The reference is the logarithm of the sum
// of exponentials, rounded, so that large logits, and the rest, which makes up for the rounding, keep all digits.
struct Softmax {
  float reference, scale, rest;

  // s: of the logits less `origin`. inverse: of the scale, reciprocal_fast(scale).
  __device__ static Softmax of(ShiftedSum s, float scale, float inverse, float origin) {
    const uint32_t bits = __float_as_uint(s.sum);
    const float exponent = static_cast<float>(static_cast<int>(bits >> 23) - 127);
    const float log2_mantissa = log2_fast(__uint_as_float((bits & 0x007fffffu) | 0x3f800000u));
    // shift + exponent as a float and what it lacks
    const float shift_of_sum = -s.minus_shift, high = shift_of_sum + exponent, part = high - shift_of_sum;
    const float low = (shift_of_sum - (high - part)) + (exponent - part);
    const float shift = fminf((high + log2_mantissa) * inverse, FLT_MAX / 4);  // scale is 0 for T = inf
    const float reference = origin + shift;
    return {reference, scale, fmaf(origin - reference, scale, high) + (low + log2_mantissa)};
  }
  __device__ float log2_probability(float z) const { return fmaf(z - reference, scale, -rest); }
};

// The softmax of both sides, and of the student at T = 1 for the cross-entropy where T is another.
struct RowSoftmaxes {
  Softmax q, p, unit;
  bool legal;  // false for a side that is all -inf or holds a NaN or +inf
};

// gradient_v = g_scale G_v + q_scale q_v + unit_scale * (softmax of the student at T = 1); at the label less
// label_scale.
//
// The cross-entropy's own G is -1 at the label and 0 elsewhere: at T = 1 it shifts q_scale and one entry, at another
// temperature it needs the softmax of its own.
struct GradientTerms {
  Softmax q, unit;
  float g_scale, q_scale, unit_scale, label_scale;
  int label;
  bool constant;  // of the divergence nothing

  __device__ static GradientTerms of(const DivergenceArguments& a, const RowInputs& in, const RowSoftmaxes& softmaxes,
                                     float sum_g, const RowLoss<float>& loss) {
    const float g_scale = loss.g_scale, label_scale = loss.ce_scale;
    const bool own_unit = a.loss.inverse_temperature != 1;
    const float q_scale = (loss.constant ? 0.0f : -g_scale * sum_g) + (own_unit ? 0.0f : label_scale);
    const int label = a.loss.ce_weight != 0 ? static_cast<int>(in.label) : INT32_MIN;
    return {softmaxes.q, softmaxes.unit, g_scale,      q_scale, own_unit ? label_scale : 0.0f,
            label_scale, label,          loss.constant};
  }

  // Conditions of the row are tested per chunk, not per entry. kept: of Terms (divergence_terms.cuh).
  template <class Terms, int N>
  __device__ void chunk(const Terms& terms, int first, const float (&student_logits)[N], const float (&kept)[N],
                        float (&out)[N]) const {
    terms.gradient(student_logits, kept, g_scale, q_scale, out);
    if (constant || unit_scale != 0) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (constant) out[i] = q_scale * exp2_fast(q.log2_probability(student_logits[i]));
        out[i] += unit_scale * exp2_fast(unit.log2_probability(student_logits[i]));
      }
    }
    if (static_cast<unsigned>(label - first) < N) {
#pragma unroll
      for (int i = 0; i < N; ++i) out[i] -= first + i == label ? label_scale : 0.0f;
    }
  }
};

}  // namespace distillm
