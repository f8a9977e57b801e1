// Weights and masses that tokens are drawn by, against double precision; thresholds and draws at both ends.
#include "../math/sampling/sampling_rule.h"
#include "../math/sampling/token_mass.h"
#include "check.h"

using namespace distillm;

namespace {

void test_exp2_portable() {
  CHECK_EQUAL(exp2_portable(0.0f), 1.0f);
  CHECK_EQUAL(exp2_portable(-std::numeric_limits<float>::infinity()), 0.0f);
  CHECK(std::isnan(exp2_portable(std::numeric_limits<float>::quiet_NaN())));
  float before = 0;
  for (int i = 60 * 4096; i >= 0; --i) {
    const float x = static_cast<float>(-i) / 4096, got = exp2_portable(x);
    const double exact = std::exp2(static_cast<double>(x));
    CHECK_NEAR(got, exact, exact > 0x1p-21 ? 3e-7 * exact : 0x1p-43);
    CHECK(got >= before);
    CHECK_EQUAL(got * 0x1p44f, std::floor(got * 0x1p44f));
    before = got;
  }
  CHECK_EQUAL(mass_of(exp2_portable(-44.0f)), 1u);
  CHECK_EQUAL(mass_of(exp2_portable(-47.0f)), 0u);
}

void test_sums_fit() {
  const uint64_t longest = (uint64_t{1} << 20) - 1, most = mass_of(1.0f) * longest;
  CHECK_EQUAL(most / longest, uint64_t{1} << 44);
  CHECK_EQUAL(nucleus_mass(1.0f, most), most);
  CHECK_EQUAL(mass_of(512.0), uint64_t{1} << 53);
}

void test_tempering() {
  for (const float temperature : {1e-38f, 1e-6f, 1.0f, 3e38f}) {
    const Tempering tempering{5.0f, tempering_scale(temperature)};
    CHECK_EQUAL(tempering.weight(5.0f), 1.0f);
    CHECK_EQUAL(tempering.weight(-std::numeric_limits<float>::infinity()), 0.0f);
  }
  CHECK_NEAR((Tempering{2.0f, tempering_scale(2.0f)}.weight(0.0f)), std::exp(-1.0), 1e-7);
}

void test_draw_point() {
  CHECK_EQUAL(draw_point(0, 1000), 0u);
  CHECK_EQUAL(draw_point(~uint64_t{0}, 1000), 999u);
  CHECK_EQUAL(draw_point(uint64_t{1} << 63, 1000), 500u);
  CHECK_EQUAL(draw_point(~uint64_t{0}, 1), 0u);
  CHECK_EQUAL(draw_point(~uint64_t{0}, uint64_t{1} << 63), (uint64_t{1} << 63) - 1);
}

void test_nucleus_mass() {
  for (const uint64_t total :
       {uint64_t{1}, uint64_t{7}, uint64_t{1} << 32, (uint64_t{1} << 44) + 12345, uint64_t{1} << 63}) {
    CHECK_EQUAL(nucleus_mass(1.0f, total), total);
    CHECK_EQUAL(nucleus_mass(0.5f, total), (total + 1) / 2);
    CHECK(nucleus_mass(1e-30f, total) == 1);
  }
  CHECK_EQUAL(nucleus_mass(0.25f, 200), 50u);
  CHECK_EQUAL(nucleus_mass(0.25f, 201), 51u);  // reaches p, never less
}

void test_penalty() {
  CHECK_EQUAL(penalised(3.0f, 1.5f), 2.0f);
  CHECK_EQUAL(penalised(-3.0f, 1.5f), -4.5f);
  CHECK_EQUAL(penalised(0.0f, 1.5f), 0.0f);
  const float highest = std::numeric_limits<float>::max(), infinity = std::numeric_limits<float>::infinity();
  CHECK_EQUAL(penalised(3e38f, 0.1f), highest);
  CHECK_EQUAL(penalised(-3e38f, 10.0f), -infinity);
  CHECK(std::isnan(penalised(std::numeric_limits<float>::quiet_NaN(), 0.5f)));
}

void test_legal_rules() {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const SamplingRule legal{1.0f, 0, 1.0f, 0.0f, 1.0f, 0};
  CHECK(legal.legal() && !legal.greedy() && !legal.filters(10));
  for (const float bad : {-1.0f, nan, std::numeric_limits<float>::infinity()}) {
    SamplingRule temperature = legal, top_p = legal, min_p = legal, penalty = legal;
    temperature.temperature = top_p.top_p = min_p.min_p = penalty.penalty = bad;
    CHECK(!temperature.legal() && !top_p.legal() && !min_p.legal() && !penalty.legal());
  }
  SamplingRule counted = legal;
  counted.top_k = 10;
  CHECK(!counted.limits_count(10) && counted.limits_count(11));
  counted.top_k = -1;
  CHECK(!counted.legal());
}

}  // namespace

int main() {
  test_exp2_portable();
  test_sums_fit();
  test_tempering();
  test_draw_point();
  test_nucleus_mass();
  test_penalty();
  test_legal_rules();
  return report("token_mass");
}
