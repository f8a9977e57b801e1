// The functors of kept entries: importance forms against finite differences and, in expectation, the divergence itself;
// ties; limits.
#include <random>
#include <vector>

#include "../math/sparse_divergence.h"
#include "check.h"

using namespace distillm;

namespace {

template <class Real>
Entry<Real> entry(double p, double q) {
  const Real log2_p = static_cast<Real>(std::log2(p)), log2_q = static_cast<Real>(std::log2(q));
  return {log2_p, log2_q, exp2_fast(log2_p), exp2_fast(log2_q)};
}

std::vector<double> random_distribution(int count, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<double> normal(0, 3);
  std::vector<double> p(count);
  double sum = 0;
  for (double& x : p) sum += x = std::exp(normal(generator));
  for (double& x : p) x /= sum;
  return p;
}

// G = q dvalue/dq of one entry, by central differences.
template <template <class> class Sampled>
void check_gradient(RowParameters<double> row) {
  const Sampled<double> functor(row);
  for (double p : {1e-6, 0.01, 0.4}) {
    for (double q : {1e-9, 1e-3, 0.3, 0.9}) {
      const double step = q * 1e-5, share = 0.25;
      const double above = functor(entry<double>(p, q + step), share).value;
      const double below = functor(entry<double>(p, q - step), share).value;
      const double expected = q * (above - below) / (2 * step);
      CHECK_NEAR(functor(entry<double>(p, q), share).g, expected, 1e-7 * (1 + std::fabs(expected)));
    }
  }
}

// With share = p the sum is the expectation, which is the divergence.
template <template <class> class Sampled, template <class> class Divergence>
void check_expectation(RowParameters<double> row) {
  const auto p = random_distribution(50, 1), q = random_distribution(50, 2);
  double sampled = Sampled<double>::constant(row), exact = 0, sampled_g = 0, exact_g = 0;
  std::vector<double> g_sampled, g_exact;
  for (size_t i = 0; i < p.size(); ++i) {
    const Term<double> a = Sampled<double>(row)(entry<double>(p[i], q[i]), p[i]);
    const Term<double> b = Divergence<double>(row)(entry<double>(p[i], q[i]));
    sampled += a.value, exact += b.value, sampled_g += a.g, exact_g += b.g;
    g_sampled.push_back(a.g), g_exact.push_back(b.g);
  }
  CHECK_NEAR(sampled, exact, 1e-12);
  // The gradient, since G may differ by a multiple of q.
  for (size_t i = 0; i < p.size(); ++i) CHECK_NEAR(g_sampled[i] - q[i] * sampled_g, g_exact[i] - q[i] * exact_g, 1e-12);
}

template <template <class> class Sampled>
void check_float_agrees(float alpha) {
  const auto p = random_distribution(200, 3), q = random_distribution(200, 4);
  for (size_t i = 0; i < p.size(); ++i) {
    const Term<double> wide = Sampled<double>({alpha, 0, false})(entry<double>(p[i], q[i]), 0.125);
    const Term<float> narrow = Sampled<float>({alpha, 0, false})(entry<float>(p[i], q[i]), 0.125f);
    CHECK_NEAR(narrow.value, wide.value, 2e-5 * std::fabs(wide.value) + 1e-6);
    CHECK_NEAR(narrow.g, wide.g, 2e-5 * std::fabs(wide.g) + 1e-6);
  }
}

// Ratios that overflow or underflow contribute what their limit is.
void test_extremes() {
  const SampledSkewReverseKl<float> reverse({0.1f, 0, false});
  for (float log2_q : {-140.0f, -1000.0f, -std::numeric_limits<float>::infinity()}) {
    CHECK_EQUAL(reverse({-1.0f, log2_q, 0.5f, 0.0f}, 1.0f).value, 0.0f);
    CHECK_EQUAL(reverse({-1.0f, log2_q, 0.5f, 0.0f}, 1.0f).g, 0.0f);
  }
  // q << p: x overflows while its logarithm does not. p << q: (q/p) log(1 + x) tends to (1 - alpha) / alpha.
  CHECK_NEAR(reverse(entry<float>(0.5, 1e-37), 1.0f).value, 0, 1e-34);
  CHECK_NEAR(reverse(entry<float>(1e-20, 0.5), 1.0f).value, -9.0, 1e-5);
  CHECK_NEAR(SampledSkewKl<float>({0.1f, 0, false})({-1.0f, -200.0f, 0.5f, 0.0f}, 1.0f).value, std::log(10.0), 1e-6);
  CHECK(std::isinf(
      SampledForwardKl<float>({})({-1.0f, -std::numeric_limits<float>::infinity(), 0.5f, 0.0f}, 1.0f).value));
}

void test_ties() {
  const double p = 0.3;
  CHECK_EQUAL(KeptTotalVariation<float>({})(entry<float>(p, p * (1 + 1e-6))).g, 0.0f);
  CHECK_EQUAL(SampledTotalVariation<float>({})(entry<float>(p, p * (1 - 1e-6)), 1.0f).g, 0.0f);
  CHECK_NEAR(KeptTotalVariation<float>({})(entry<float>(p, p * (1 + 1e-4))).g, 0.15, 1e-4);
  CHECK_NEAR(KeptTotalVariation<double>({})(entry<double>(p, p * (1 - 1e-6))).g, -0.15, 1e-6);
  // The bucket of float tails is computed in double, and is no less tied.
  CHECK_EQUAL((Exact<KeptTotalVariation, float>::Bucket({})(entry<double>(p, p * (1 + 1e-6))).g), 0.0);
}

void test_legal() {
  CHECK(SampledSkewKl<float>::legal({0.0f, 0, false}) && !SampledSkewKl<float>::legal({1.5f, 0, false}));
  CHECK(!SampledSkewReverseKl<float>::legal({0.0f, 0, false}) && SampledSkewReverseKl<float>::legal({1.0f, 0, false}));
  CHECK(!SampledSkewReverseKl<float>::legal({std::nanf(""), 0, false}));
}

}  // namespace

int main() {
  check_gradient<SampledForwardKl>({});
  check_gradient<SampledTotalVariation>({});
  check_expectation<SampledForwardKl, ForwardKl>({});
  check_expectation<SampledTotalVariation, TotalVariation>({});
  check_float_agrees<SampledForwardKl>(0);
  check_float_agrees<SampledTotalVariation>(0);
  for (double alpha : {0.05, 0.5, 0.9, 1.0}) {
    check_gradient<SampledSkewKl>({alpha, 0, false});
    check_gradient<SampledSkewReverseKl>({alpha, 0, false});
    check_expectation<SampledSkewKl, SkewKl>({alpha, 0, false});
    check_expectation<SampledSkewReverseKl, SkewReverseKl>({alpha, 0, false});
    check_expectation<SampledSkewReverseKl, SkewReverseKl>({alpha, 0, true});
    check_float_agrees<SampledSkewKl>(static_cast<float>(alpha));
    check_float_agrees<SampledSkewReverseKl>(static_cast<float>(alpha));
  }
  test_extremes();
  test_ties();
  test_legal();
  return report("sparse_divergence");
}
