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
void check_float_agrees(double alpha) {
  const auto student = random_logits(500, 3), teacher = random_logits(500, 4);
  const auto narrow = terms<float>(student, teacher, Functor<float>({static_cast<float>(alpha), false}));
  const auto wide = terms<double>(student, teacher, Functor<double>({alpha, false}));
  for (size_t i = 0; i < wide.size(); ++i) {
    CHECK_NEAR(narrow[i].value, wide[i].value, 4e-6 * std::fabs(wide[i].value) + 1e-7);
    CHECK_NEAR(narrow[i].g, wide[i].g, 4e-6 * std::fabs(wide[i].g) + 1e-7);
  }
}

template <template <class> class Functor>
void check_equal_sides_give_zero(float alpha) {
  const Functor<float> functor({alpha, false});
  for (float log2_p = -125; log2_p <= 0; log2_p += 0.37f) CHECK_EQUAL(functor(entry(log2_p, log2_p)).value, 0.0f);
}

void test_absent_entries() {
  const float none = -std::numeric_limits<float>::infinity();
  const SkewKl<float> skew({0.1f, false});
  const SkewReverseKl<float> reverse({0.1f, false});
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

// Where both probabilities underflow their ratio is undefined, their contribution is not.
void test_underflow() {
  for (float alpha : {0.0f, 0.1f, 0.9f, 1.0f}) {
    const Term<float> a = SkewKl<float>({alpha, false})(entry(-300.0f, -170.0f));
    const Term<float> b = SkewReverseKl<float>({alpha, false})(entry(-300.0f, -170.0f));
    CHECK_EQUAL(a.value, 0.0f);
    CHECK_EQUAL(a.g, 0.0f);
    CHECK_EQUAL(b.value, 0.0f);
    CHECK_EQUAL(b.g, 0.0f);
  }
}

void test_legal() {
  CHECK(SkewKl<float>::legal({0.0f, false}) && SkewKl<float>::legal({1.0f, false}));
  CHECK(!SkewKl<float>::legal({-0.1f, false}) && !SkewReverseKl<float>::legal({1.1f, false}));
  CHECK(!SkewKl<float>::legal({std::nanf(""), false}));
}

}  // namespace

int main() {
  check_gradient<ForwardKl>({});
  check_gradient<ReverseKl>({});
  for (double alpha : {0.0, 0.1, 0.5, 0.8, 1.0}) {
    check_gradient<SkewKl>({alpha, false});
    check_gradient<SkewReverseKl>({alpha, false});
    check_float_agrees<SkewKl>(alpha);
    check_float_agrees<SkewReverseKl>(alpha);
    check_equal_sides_give_zero<SkewKl>(static_cast<float>(alpha));
    check_equal_sides_give_zero<SkewReverseKl>(static_cast<float>(alpha));
  }
  test_absent_entries();
  test_underflow();
  test_legal();
  return report("divergence");
}
