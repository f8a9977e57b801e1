// The per-entry functors: (1) of math/divergence.h against finite differences, limits, and agreement of float with
// double.
#include <random>
#include <vector>

#include "../math/divergence.h"
#include "check.h"

using namespace distillm;

namespace {

template <class Real>
std::vector<Real> log2_softmax(const std::vector<double>& z) {
  double sum = 0;
  for (double x : z) sum += std::exp(x);
  std::vector<Real> out;
  for (double x : z) out.push_back(static_cast<Real>((x - std::log(sum)) * kLog2E));
  return out;
}

template <class Real>
Entry<Real> entry(Real log2_p, Real log2_q) {
  return {log2_p, log2_q, exp2_fast(log2_p), exp2_fast(log2_q)};
}

template <class Real, class Functor>
std::vector<Term<Real>> terms(const std::vector<double>& student, const std::vector<double>& teacher, Functor functor) {
  const auto q = log2_softmax<Real>(student), p = log2_softmax<Real>(teacher);
  std::vector<Term<Real>> out;
  for (size_t i = 0; i < q.size(); ++i) out.push_back(functor(entry(p[i], q[i])));
  return out;
}

template <class Functor>
double value(const std::vector<double>& student, const std::vector<double>& teacher, Functor functor) {
  double sum = 0;
  for (const Term<double>& t : terms<double>(student, teacher, functor)) sum += t.value;
  return sum;
}

std::vector<double> random_logits(int count, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<double> normal(0, 3);
  std::vector<double> z(count);
  for (double& x : z) x = normal(generator);
  return z;
}

// The value's derivative by central differences against G_v - q_v sum G. `detached` compares to a mixture held
// constant.
template <template <class> class Functor>
void check_gradient(RowParameters<double> row) {
  auto student = random_logits(11, 1);
  const auto teacher = random_logits(11, 2);
  const Functor<double> functor(row);
  const auto t = terms<double>(student, teacher, functor);
  double sum_g = 0;
  for (const auto& term : t) sum_g += term.g;
  const auto log2_q = log2_softmax<double>(student);
  for (size_t v = 0; v < student.size(); ++v) {
    const double step = 1e-6, z = student[v];
    student[v] = z + step;
    const double above = value(student, teacher, functor);
    student[v] = z - step;
    const double below = value(student, teacher, functor);
    student[v] = z;
    CHECK_NEAR(t[v].g - std::exp2(log2_q[v]) * sum_g, (above - below) / (2 * step), 1e-8);
  }
}

template <template <class> class Functor>
void check_float_agrees(double alpha, double beta = 0, double absolute = 1e-7) {
  const auto student = random_logits(500, 3), teacher = random_logits(500, 4);
  const auto narrow =
      terms<float>(student, teacher, Functor<float>({static_cast<float>(alpha), static_cast<float>(beta), false}));
  const auto wide = terms<double>(student, teacher, Functor<double>({alpha, beta, false}));
  for (size_t i = 0; i < wide.size(); ++i) {
    CHECK_NEAR(narrow[i].value, wide[i].value, 4e-6 * std::fabs(wide[i].value) + absolute);
    CHECK_NEAR(narrow[i].g, wide[i].g, 4e-6 * std::fabs(wide[i].g) + absolute);
  }
}

template <template <class> class Functor>
void check_equal_sides_give_zero(float alpha, float beta = 0) {
  const Functor<float> functor({alpha, beta, false});
  for (float log2_p = -125; log2_p <= 0; log2_p += 0.37f) CHECK_EQUAL(functor(entry(log2_p, log2_p)).value, 0.0f);
}

void test_absent_entries() {
  const float none = -std::numeric_limits<float>::infinity();
  const SkewKl<float> skew({0.1f, 0, false});
  const SkewReverseKl<float> reverse({0.1f, 0, false});
  CHECK_EQUAL(skew(entry(none, none)).value, 0.0f);
  CHECK_EQUAL(skew(entry(none, -1.0f)).g, 0.0f);
  CHECK_NEAR(skew(entry(-1.0f, none)).value, 0.5 * std::log(10.0), 1e-6);
  CHECK_EQUAL(skew(entry(-1.0f, none)).g, 0.0f);
  CHECK_EQUAL(reverse(entry(-1.0f, none)).g, 0.0f);
  CHECK_NEAR(reverse(entry(none, -1.0f)).value, 0.5 * std::log(10.0), 1e-6);
  CHECK(std::isinf(ForwardKl<float>({})(entry(-1.0f, none)).value));
  CHECK_EQUAL(ForwardKl<float>({})(entry(none, none)).value, 0.0f);
  CHECK(std::isinf(ReverseKl<float>({})(entry(none, -1.0f)).value));
}

// Its weight is held constant, so that finite differences do not apply: value forward + reverse KL, G by definition.
void test_token_adaptive() {
  for (double log2_p : {-3.0, -0.5}) {
    for (double log2_q : {-4.0, -0.25}) {
      const Entry<double> e = entry(log2_p, log2_q);
      const Term<double> t = TokenAdaptive<double>({})(e);
      const double w = e.p / (e.p + e.q), log_ratio = std::log(e.q / e.p);
      CHECK_NEAR(t.value, ForwardKl<double>({})(e).value + ReverseKl<double>({})(e).value, 1e-12);
      CHECK_NEAR(t.g, -w * e.p + (1 - w) * e.q * (log_ratio + 1), 1e-12);
    }
  }
}

// Where both probabilities underflow their ratio is undefined, their contribution is not.
void test_underflow() {
  for (float alpha : {0.0f, 0.1f, 0.9f, 1.0f}) {
    const Term<float> a = SkewKlFromZero<float>({alpha, 0, false})(entry(-300.0f, -170.0f));
    const Term<float> b = SkewReverseKlFromZero<float>({alpha, 0, false})(entry(-300.0f, -170.0f));
    CHECK_EQUAL(a.value, 0.0f);
    CHECK_EQUAL(a.g, 0.0f);
    CHECK_EQUAL(b.value, 0.0f);
    CHECK_EQUAL(b.g, 0.0f);
  }
}

void test_legal() {
  CHECK(SkewKl<float>::legal({0.0f, 0, false}) && SkewKl<float>::legal({1.0f, 0, false}));
  CHECK(!SkewKl<float>::legal({-0.1f, 0, false}) && !SkewReverseKl<float>::legal({1.1f, 0, false}));
  CHECK(!SkewKl<float>::legal({std::nanf(""), 0, false}));
}

}  // namespace

int main() {
  check_gradient<ForwardKl>({});
  check_gradient<ReverseKl>({});
  check_gradient<TotalVariation>({});
  for (double alpha : {0.0, 0.1, 0.5, 0.8, 1.0}) {
    check_gradient<SkewKlFromZero>({alpha, 0, false});
    check_gradient<SkewReverseKlFromZero>({alpha, 0, false});
    check_float_agrees<SkewKlFromZero>(alpha);
    check_float_agrees<SkewReverseKlFromZero>(alpha);
    check_equal_sides_give_zero<SkewKlFromZero>(static_cast<float>(alpha));
    check_equal_sides_give_zero<SkewReverseKlFromZero>(static_cast<float>(alpha));
  }
  for (double beta : {0.1, 0.5, 0.9}) {
    check_gradient<GeneralizedJs>({0, beta, false});
    check_gradient<SymmetricKl>({0, beta, false});
    check_float_agrees<GeneralizedJs>(0, beta);
    check_float_agrees<SymmetricKl>(0, beta);
    check_equal_sides_give_zero<GeneralizedJs>(0, static_cast<float>(beta));
    check_equal_sides_give_zero<SymmetricKl>(0, static_cast<float>(beta));
    for (double alpha : {0.2, 1.0}) {
      check_gradient<AlphaBeta>({alpha, beta, false});
      check_float_agrees<AlphaBeta>(alpha, beta, 1.5e-6);  // differences of powers up to 1
      check_equal_sides_give_zero<AlphaBeta>(static_cast<float>(alpha), static_cast<float>(beta));
    }
  }
  check_float_agrees<TotalVariation>(0);
  check_float_agrees<TokenAdaptive>(0);
  check_equal_sides_give_zero<TokenAdaptive>(0);
  test_token_adaptive();
  test_absent_entries();
  test_underflow();
  test_legal();
  return report("divergence");
}
