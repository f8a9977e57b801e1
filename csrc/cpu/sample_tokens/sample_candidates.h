// The entries of one row that may still be drawn, and filters of them.
#pragma once

#include "../row/row_selection.h"

namespace distillm {
inline namespace DISTILLM_ISA {

// By ascending id.
struct SampleCandidates {
  float* logit;
  int32_t* id;
  float* weight;
  int64_t count;
};

// Keeps the candidates that `selects(index)` names, in the order of ids.
template <class Selects>
void keep(SampleCandidates& from, Selects selects) {
  int64_t kept = 0;
  for (int64_t i = 0; i < from.count; ++i) {
    const bool selected = selects(i);
    from.logit[kept] = from.logit[i];
    from.id[kept] = from.id[i];
    from.weight[kept] = from.weight[i];
    kept += selected;
  }
  from.count = kept;
}

inline uint64_t total_mass(const SampleCandidates& from) {
  uint64_t total = 0;
  for (int64_t i = 0; i < from.count; ++i) total += mass_of(from.weight[i]);
  return total;
}

}  // namespace DISTILLM_ISA
}  // namespace distillm
