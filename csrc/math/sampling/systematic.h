// Systematic sampling: N draws from a discrete distribution with one uniform number.
//
// Draw j falls at the share (j + 1 - u) / N of the total mass, 0 < u < 1, and takes the entry that covers that point
// when the entries are laid end to end. E[count of i] = N p_i whatever the order, and the variance of a count is at
// most 1/4. Storing counts beside exact probabilities: "Sparse logit sampling", Anshumann et al., ACL 2025.
#pragma once

#include <cmath>
#include <cstdint>

#include "../target.h"

namespace distillm {
inline namespace DISTILLM_ISA {

struct SystematicDraws {
  double total;  // mass of all entries, positive
  double draws;  // N
  double per_mass;
  double uniform;

  DISTILLM_HD SystematicDraws(double total, int64_t draws, double uniform)
      : total(total),
        draws(static_cast<double>(draws)),
        per_mass(static_cast<double>(draws) / total),
        uniform(uniform) {}

  // How many draws fall within the first entries, whose mass is `cumulative`: floor(N C + u). Never decreases with
  // `cumulative`, in floating point too, and is exactly N at `total`: every draw is given to exactly one entry.
  DISTILLM_HD int32_t within(double cumulative) const {
    if (!(cumulative < total)) return static_cast<int32_t>(draws);
    const double reached = floor(cumulative * per_mass + uniform);
    return static_cast<int32_t>(reached < draws ? reached : draws);
  }
};

}  // namespace DISTILLM_ISA
}  // namespace distillm
