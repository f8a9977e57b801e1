// Pieces of adaptive_kl and interpolated: ordered keys, the share of a direction, blended logits.
#include <cmath>
#include <vector>

#include "../math/row_divergence.h"
#include "check.h"

using namespace distillm;

namespace {

template <class Real>
void test_keys_keep_the_order() {
  const Real infinity = std::numeric_limits<Real>::infinity(), tiny = std::numeric_limits<Real>::denorm_min();
  const std::vector<Real> ascending = {-infinity, std::numeric_limits<Real>::lowest(), -1e4, -1,      -tiny, 0, tiny,
                                       1,         std::nextafter(Real(1), Real(2)),    1e4,  infinity};
  for (size_t i = 1; i < ascending.size(); ++i) CHECK(ordered_key(ascending[i - 1]) < ordered_key(ascending[i]));
  CHECK(ordered_key(Real(-0.0)) == ordered_key(Real(0)));
}

template <class Real>
void test_blended_logits() {
  const Real none = -std::numeric_limits<Real>::infinity(), nan = std::numeric_limits<Real>::quiet_NaN();
  CHECK_NEAR(blended_logit(Real(-1), Real(-5), Real(0.25)), -2, 1e-6);
  CHECK_EQUAL(blended_logit(Real(-3.3), Real(-3.3), Real(0.7)), Real(-3.3));
  CHECK_EQUAL(blended_logit(Real(-1), none, Real(0)), Real(-1));
  CHECK_EQUAL(blended_logit(none, Real(-1), Real(1)), Real(-1));
  for (Real t : {Real(0.01), Real(0.5), Real(0.99)}) {
    CHECK_EQUAL(blended_logit(none, Real(-1), t), none);
    CHECK_EQUAL(blended_logit(Real(-1), none, t), none);
    CHECK_EQUAL(blended_logit(none, none, t), none);
  }
  for (Real t : {Real(0), Real(0.5), Real(1)}) {
    CHECK(std::isnan(blended_logit(Real(-1), nan, t)));
    CHECK(std::isnan(blended_logit(none, nan, t)));
  }
}

void test_share() {
  CHECK_NEAR(adaptive_share(1.0, 3.0), 0.75, 1e-15);
  CHECK_EQUAL(adaptive_share(0.0, 0.0), 0.5);
  CHECK_EQUAL(adaptive_share(0.0, 1e-30), 1.0);
  CHECK_EQUAL(adaptive_share(1e-30, 0.0), 0.0);
}

}  // namespace

int main() {
  test_keys_keep_the_order<float>();
  test_keys_keep_the_order<double>();
  test_blended_logits<float>();
  test_blended_logits<double>();
  test_share();
  return report("row_divergence");
}
