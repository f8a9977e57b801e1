// How the token of one row is drawn: the parameters and what is legal.
#pragma once

#include "philox.h"
#include "token_mass.h"

namespace distillm {
inline namespace DISTILLM_ISA {

struct SamplingRule {
  float temperature;  // 0: greedy
  int64_t top_k;      // 0: all
  float top_p;
  float min_p;
  float penalty;  // of repetition
  uint64_t bits;  // the draw

  // Comparisons that a NaN fails.
  DISTILLM_HD bool legal() const {
    const bool temperature_legal = temperature >= 0 && temperature <= 3.4028234663852886e38f;
    const bool filters_legal = top_k >= 0 && top_p > 0 && top_p <= 1 && min_p >= 0 && min_p <= 1;
    return temperature_legal && filters_legal && penalty > 0 && penalty <= 3.4028234663852886e38f;
  }
  DISTILLM_HD bool greedy() const { return temperature == 0; }
  DISTILLM_HD bool limits_count(int64_t vocab) const { return top_k > 0 && top_k < vocab; }
  DISTILLM_HD bool filters(int64_t vocab) const { return limits_count(vocab) || top_p < 1 || min_p > 0; }
};

// Parameters of one row out of the raw view of ops/sample_call.h. Templates, since this folder includes nothing of
// ours.
template <class Parameter>
DISTILLM_HD auto value_of(const Parameter& parameter, int64_t row) {
  return parameter.rows ? parameter.rows[row] : parameter.value;
}

template <class Call>
DISTILLM_HD SamplingRule rule_of(const Call& call, int64_t row) {
  const uint64_t bits = call.bits
                            ? static_cast<uint64_t>(call.bits[row])
                            : random_bits(value_of(call.seed, row), value_of(call.position, row), Draw::kSampleToken);
  return {value_of(call.temperature, row), value_of(call.top_k, row),   value_of(call.top_p, row),
          value_of(call.min_p, row),       value_of(call.penalty, row), bits};
}

}  // namespace DISTILLM_ISA
}  // namespace distillm
