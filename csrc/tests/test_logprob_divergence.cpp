// Terms of log-probabilities: the gradient against finite differences, unnormalised entries, entries without a number.
#include <limits>
#include <utility>

#include "../math/logprob_divergence.h"
#include "check.h"

using namespace distillm;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
const double kLogs[] = {-30, -7.5, -2, -0.3, 0, 0.4, 3};  // of neither a distribution nor probabilities alone

// G is the derivative of the value by log q, here by central differences.
template <template <class> class Functor, bool kProbabilities = false>
void check_gradient(double beta, double floor = 0) {
  const LogprobTerms<double, Functor<double>, kProbabilities> terms(beta, floor);
  for (double x : kLogs) {
    for (double log_p : kLogs) {
      const double y = kProbabilities ? std::exp(log_p) : log_p, step = 1e-5;
      const double slope = (terms.value(x + step, y) - terms.value(x - step, y)) / (2 * step);
      CHECK_NEAR(terms.g(x, y), slope, 1e-8 * (1 + std::fabs(slope)));
    }
  }
}

template <template <class> class Functor, bool kProbabilities = false>
void check_float_agrees(float beta) {
  const LogprobTerms<float, Functor<float>, kProbabilities> narrow(beta, 1e-10f);
  const LogprobTerms<double, Functor<double>, kProbabilities> wide(beta, 1e-10);
  for (double x : kLogs) {
    for (double log_p : kLogs) {
      const double y = kProbabilities ? std::exp(log_p) : log_p;
      const double scale = std::exp(x) + std::exp(log_p);  // value and G are differences of products with these
      CHECK_NEAR(narrow.value(float(x), float(y)), wide.value(x, y), 1e-5 * scale * 10);
      CHECK_NEAR(narrow.g(float(x), float(y)), wide.g(x, y), 1e-5 * scale * 10);
    }
  }
}

// What theirs is by definition: p (log max(p, floor) - x), -p.
void test_probabilities_below_the_floor() {
  const LogprobTerms<double, ForwardKl<double>, true> terms(0, 1e-2);
  CHECK_NEAR(terms.value(-3, 1e-4), 1e-4 * (std::log(1e-2) + 3), 1e-12);
  CHECK_EQUAL(terms.g(-3, 1e-4), -1e-4);
  CHECK_EQUAL(terms.value(-3, 0), 0.0);
  const LogprobTerms<float, ForwardKl<float>, true> unbounded(0, 0);
  CHECK_EQUAL(unbounded.value(-3, 0), 0.0f);
  CHECK_EQUAL(unbounded.g(-3, 0), 0.0f);
}

// An entry that neither side has adds nothing, one without probability on a side what its limit is.
template <class Terms>
void check_absent(const Terms& terms) {
  CHECK_EQUAL(terms.value(-kInfinity, -kInfinity), 0.0f);
  CHECK_EQUAL(terms.g(-kInfinity, -kInfinity), 0.0f);
}

template <class Terms>
void check_spoilt(const Terms& terms) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const auto& pair : {std::pair<float, float>{nan, -1.0f}, {-1.0f, nan}, {nan, -kInfinity}, {-kInfinity, nan}}) {
    CHECK(std::isnan(terms.value(pair.first, pair.second)));
    CHECK(std::isnan(terms.g(pair.first, pair.second)));
  }
}

void test_infinite_entries() {
  const LogprobTerms<float, ForwardKl<float>, false> forward(0, 0);
  const LogprobTerms<float, ReverseKl<float>, false> reverse(0, 0);
  const LogprobTerms<float, GeneralizedJs<float>, false> js(0.25f, 0);
  CHECK_EQUAL(forward.value(-kInfinity, 0.0f), kInfinity);
  CHECK_EQUAL(forward.g(-kInfinity, 0.0f), -1.0f);
  CHECK_EQUAL(reverse.value(0.0f, -kInfinity), kInfinity);
  CHECK_NEAR(js.value(-kInfinity, 0.0f), 0.25 * std::log(4.0), 1e-6);
  CHECK_EQUAL(js.g(-kInfinity, 0.0f), 0.0f);
  CHECK_EQUAL(exp2_any(128.5f), kInfinity);
  CHECK_EQUAL(exp2_any(3.0f), 8.0f);
}

}  // namespace

int main() {
  check_gradient<ForwardKl>(0);
  check_gradient<ForwardKl, true>(0, 1e-3);
  check_gradient<ReverseKl>(0);
  for (double beta : {0.1, 0.5, 0.9}) check_gradient<GeneralizedJs>(beta);
  check_float_agrees<ForwardKl>(0);
  check_float_agrees<ForwardKl, true>(0);
  check_float_agrees<ReverseKl>(0);
  check_float_agrees<GeneralizedJs>(0.3f);
  test_probabilities_below_the_floor();
  test_infinite_entries();
#define CHECK_MEMBER(name, Functor, kProbabilities)                                \
  check_absent(LogprobTerms<float, Functor<float>, kProbabilities>(0.5f, 1e-10f)); \
  check_spoilt(LogprobTerms<float, Functor<float>, kProbabilities>(0.5f, 1e-10f));
  DISTILLM_FOR_EACH_LOGPROB_DIVERGENCE(CHECK_MEMBER)
  return report("logprob_divergence");
}
