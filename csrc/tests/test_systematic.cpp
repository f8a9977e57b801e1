// Systematic draws: every draw is given to exactly one entry, whatever u and the rounding; counts near N p. Ordered
// keys: the order of the numbers, both ways.
#include <limits>
#include <random>
#include <vector>

#include "../math/ordered_key.h"
#include "../math/sampling/systematic.h"
#include "check.h"

using namespace distillm;

namespace {

void check_draws(const std::vector<double>& masses, int64_t draws, double uniform) {
  double total = 0, cumulative = 0;
  for (double m : masses) total += m;
  const SystematicDraws systematic(total, draws, uniform);
  int32_t taken = 0;
  for (double m : masses) {
    cumulative += m;
    const int32_t reached = systematic.within(cumulative), count = reached - taken;
    CHECK(count >= 0);
    CHECK(m > 0 || count == 0);
    CHECK(std::abs(count - draws * m / total) < 1 + 1e-9);
    taken = reached;
  }
  CHECK_EQUAL(taken, draws);
}

template <class Real>
void check_keys() {
  const Real infinity = std::numeric_limits<Real>::infinity(), smallest = std::numeric_limits<Real>::denorm_min();
  const Real rising[] = {-infinity, -std::numeric_limits<Real>::max(), -1, -smallest, 0, smallest, 1, infinity};
  for (size_t i = 0; i < 8; ++i) {
    CHECK_EQUAL(number_of_key(ordered_key(rising[i])), rising[i]);
    if (i > 0) CHECK(ordered_key(rising[i - 1]) < ordered_key(rising[i]));
  }
  CHECK_EQUAL(ordered_key(Real(-0.0)), ordered_key(Real(0)));
}

}  // namespace

int main() {
  std::mt19937_64 generator(3);
  std::exponential_distribution<double> mass(1);
  for (double uniform : {0x1p-65, 1e-9, 0.25, 0.5, 0.999, 1 - 0x1p-53}) {
    for (int64_t draws : {1, 2, 64, 1024}) {
      std::vector<double> masses(300);
      for (double& m : masses) m = generator() % 3 ? mass(generator) : 0;
      masses.front() = masses.back() = 0;
      check_draws(masses, draws, uniform);
      check_draws({0, 1e-30, 0}, draws, uniform);
      check_draws({1, 1e-18, 1e-18}, draws, uniform);
    }
  }
  check_keys<float>();
  check_keys<double>();
  return report("systematic");
}
