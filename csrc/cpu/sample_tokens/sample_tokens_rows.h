// Tokens of a range of rows on one thread. Included once per instruction set, by row_kernel_list.h.
//
// Passes over a row, which stays in the second-level cache after the first:
//   1. the maximum, and that of every group of 64 entries where they are needed;
//   2. exponentials at T = 1 for the log-probability, summed; and where they differ the weights that are drawn by,
//      summed per tile.
// Without filters the draw falls into a tile, whose weights are formed once more. With filters a lower bound of the
// threshold (from the group maxima for top-k, from the total for top-p) names the few groups that hold candidates;
// selection and draw see the candidates alone. No weight of the whole row is ever written.
#pragma once

#include <cmath>

#include "../../math/sampling/sampling_rule.h"
#include "../instruction_sets/row_kernels.h"
#include "../memory/thread_scratch.h"
#include "row_sums.h"
#include "sample_candidates.h"

namespace distillm {
inline namespace DISTILLM_ISA {

// The working memory of one row, in this thread's scratch.
struct SampleScratch {
  float *raw, *adjusted, *group_maximum;
  uint64_t* tile_mass;
  SampleCandidates candidates;
  SelectionScratch<float> selection;

  static SampleScratch of(int64_t vocab) {
    const int64_t row = (vocab + 15) / 16 * 16, groups = (vocab / kGroup + 16) / 16 * 16;
    const int64_t tiles = (vocab / kMassTile + 16) / 16 * 16;
    char* at = static_cast<char*>(thread_scratch(4 * (7 * row + groups) + 8 * tiles));
    const auto take = [&at](int64_t bytes) {
      char* here = at;
      at += bytes;
      return here;
    };
    SampleScratch s;
    s.tile_mass = reinterpret_cast<uint64_t*>(take(8 * tiles));
    s.group_maximum = reinterpret_cast<float*>(take(4 * groups));
    for (float** part : {&s.raw, &s.adjusted, &s.candidates.logit, &s.candidates.weight}) {
      *part = reinterpret_cast<float*>(take(4 * row));
    }
    s.candidates.id = reinterpret_cast<int32_t*>(take(4 * row));
    s.candidates.count = 0;
    s.selection.keys = reinterpret_cast<uint32_t*>(take(4 * row));
    s.selection.indices = reinterpret_cast<int32_t*>(take(4 * row));
    return s;
  }
};

// What a row gives.
struct DrawnToken {
  int64_t token;
  float logprob, filtered_logprob;
  bool valid;
};

inline DrawnToken no_token() {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  return {0, nan, nan, false};
}

// One row on its way to a token.
struct SampledRow {
  const float* raw;
  const float* z;  // after penalty and mask; `raw` where there are none
  int64_t vocab;
  SamplingRule rule;
  SampleScratch scratch;
  Tempering unit, tempering;
  uint64_t mass;     // of the row at the temperature, where the draw or a filter needs it
  double log2_unit;  // log2 of the sum of exponentials at T = 1

  // Maxima and masses. False for a row without a legal token.
  bool measure() {
    const bool grouped = rule.greedy() || rule.filters(vocab);
    const float maximum = grouped ? group_maxima(z, vocab, scratch.group_maximum) : tile_maximum(z, vocab);
    const float raw_maximum = z == raw ? maximum : tile_maximum(raw, vocab);
    if (!(maximum > -std::numeric_limits<float>::infinity())) return false;
    unit = {raw_maximum, static_cast<float>(kLog2E)};
    tempering = {maximum, rule.greedy() ? unit.scale : tempering_scale(rule.temperature)};
    const bool whole = !rule.greedy() && !rule.limits_count(vocab);
    if (whole) {
      mass = row_mass(z, vocab, weighing(), scratch.tile_mass);
      if (mass == 0) return false;
    }
    const bool same = whole && z == raw && tempering.scale == unit.scale;
    log2_unit = same ? std::log2(static_cast<double>(mass) / kMassUnits) : log2_sum(raw, vocab, unit);
    return log2_unit == log2_unit;
  }

  Weighing<float> weighing() const { return {tempering.maximum, tempering.scale, 0}; }

  DrawnToken result(int64_t token, double filtered) const {
    const double log2_p = (static_cast<double>(raw[token]) - unit.maximum) * kLog2E - log2_unit;
    return {token, static_cast<float>(log2_p * kLn2), static_cast<float>(filtered), true};
  }

  static double log_share(uint64_t part, uint64_t whole) {
    return std::log(static_cast<double>(part) / static_cast<double>(whole));
  }

  DrawnToken greedy() const {
    int64_t group = 0;
    while (scratch.group_maximum[group] != tempering.maximum) ++group;
    int64_t token = group * kGroup;
    while (z[token] != tempering.maximum) ++token;
    return result(token, 0);
  }

  // The draw over the whole row.
  DrawnToken unfiltered() const {
    const uint64_t point = draw_point(rule.bits, mass);
    uint64_t below = 0;
    int64_t tile = 0;
    while (below + scratch.tile_mass[tile] <= point) below += scratch.tile_mass[tile++];
    int64_t token = tile * kMassTile;
    uint64_t here = mass_of(tempering.weight(z[token]));
    while (below + here <= point) {
      below += here;
      here = mass_of(tempering.weight(z[++token]));
    }
    return result(token, log_share(here, mass));
  }

  // No kept entry lies below: the top_k-th largest of maxima over parts of the row is at most the top_k-th largest
  // entry. Groups where there are enough of them, else their strands, in memory that weights will take.
  float top_k_bound() const {
    constexpr float kLowest = std::numeric_limits<float>::lowest();
    float* parts = scratch.group_maximum;
    int64_t count = (vocab + kGroup - 1) / kGroup;
    if (rule.top_k > count) {
      parts = scratch.candidates.weight;
      count = strand_maxima(z, vocab, parts);
    }
    if (rule.top_k > count) return kLowest;
    const auto threshold =
        find_threshold(parts, count, CountMeasure{}, static_cast<uint64_t>(rule.top_k), scratch.selection);
    return at_least(threshold.value, kLowest);
  }

  // Entries below the bound are not kept, whatever the order of filters: all entries lighter than (1 - p) / V of the
  // mass together weigh less than 1 - p of it.
  float candidate_bound() const {
    if (rule.limits_count(vocab)) return top_k_bound();
    if (rule.top_p < 1) {
      return logit_below((1 - static_cast<double>(rule.top_p)) * (mass / kMassUnits) / vocab, weighing());
    }
    return logit_below(rule.min_p, weighing());
  }

  void gather(float bound) {
    SampleCandidates& to = scratch.candidates;
    to.count = 0;
    for (int64_t start = 0; start < vocab; start += kGroup) {
      if (scratch.group_maximum[start / kGroup] < bound) continue;
      const int64_t end = vocab - start < kGroup ? vocab : start + kGroup;
      for (int64_t i = start; i < end; ++i) {
        to.logit[to.count] = z[i];
        to.id[to.count] = static_cast<int32_t>(i);
        to.count += z[i] >= bound;
      }
    }
  }

  template <class Measure>
  void keep_until(Measure measure, uint64_t target) {
    SampleCandidates& kept = scratch.candidates;
    const auto threshold = find_threshold(kept.logit, kept.count, measure, target, scratch.selection);
    keep(kept, [&](int64_t i) { return threshold.selects(kept.logit[i], i); });
  }

  DrawnToken filtered() {
    SampleCandidates& kept = scratch.candidates;
    gather(candidate_bound());
    if (rule.limits_count(vocab) && kept.count > rule.top_k) {
      keep_until(CountMeasure{}, static_cast<uint64_t>(rule.top_k));
    }
    weigh(kept.logit, kept.count, weighing(), kept.weight);
    if (rule.top_p < 1) {
      const uint64_t whole = rule.limits_count(vocab) ? total_mass(kept) : mass;
      keep_until(MassMeasure<float>{kept.weight}, nucleus_mass(rule.top_p, whole));
    }
    if (rule.min_p > 0) keep(kept, [&](int64_t i) { return kept.weight[i] >= rule.min_p; });
    const uint64_t total = total_mass(kept), point = draw_point(rule.bits, total);
    uint64_t below = 0;
    int64_t i = 0;
    while (below + mass_of(kept.weight[i]) <= point) below += mass_of(kept.weight[i++]);
    return result(kept.id[i], log_share(mass_of(kept.weight[i]), total));
  }

  DrawnToken draw() {
    if (!rule.legal() || !measure()) return no_token();
    if (rule.greedy()) return greedy();
    return rule.filters(vocab) ? filtered() : unfiltered();
  }
};

// Penalty and mask on a copy of the row. A token seen twice is penalised once, from its raw logit.
inline void adjust(const SampleCall& call, int64_t row, float penalty, const float* raw, float* out) {
  std::memcpy(out, raw, call.vocab * sizeof(float));
  const int64_t* previous = call.previous ? call.previous + row * call.previous_count : nullptr;
  for (int64_t i = 0; i < call.previous_count; ++i) {
    const int64_t id = previous[i];
    if (id >= 0 && id < call.vocab) out[id] = penalised(raw[id], penalty);
  }
  if (!call.banned) return;
  const bool* banned = call.banned + row * call.banned_stride;
  for (int64_t i = 0; i < call.vocab; ++i) out[i] = banned[i] ? -std::numeric_limits<float>::infinity() : out[i];
}

inline DrawnToken sample_row(const SampleTensors& tensors, int64_t row, const SampleScratch& scratch) {
  const SampleCall& call = tensors.call;
  const char* data = static_cast<const char*>(call.logits) + row * call.stride * bytes_of(tensors.type);
  const float* raw = LogitRow<float>{data, tensors.type, call.vocab}.tile(0, call.vocab, scratch.raw);
  const SamplingRule rule = rule_of(call, row);
  const bool adjusts = call.previous || call.banned;
  if (adjusts) adjust(call, row, rule.penalty, raw, scratch.adjusted);
  return SampledRow{raw, adjusts ? scratch.adjusted : raw, call.vocab, rule, scratch, {}, {}, 0, 0}.draw();
}

inline void sample_rows(const SampleTensors& tensors, int64_t begin, int64_t end) {
  const SampleCall& call = tensors.call;
  const SampleScratch scratch = SampleScratch::of(call.vocab);
  for (int64_t row = begin; row < end; ++row) {
    const DrawnToken drawn = sample_row(tensors, row, scratch);
    call.token[row] = drawn.token;
    call.logprob[row] = drawn.logprob;
    call.filtered_logprob[row] = drawn.filtered_logprob;
    call.valid[row] = drawn.valid;
  }
}

}  // namespace DISTILLM_ISA
}  // namespace distillm
