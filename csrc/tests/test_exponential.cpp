// exp2_fast and log2_fast against the C library, over every exponent, with the bounds that the header states.
#include "../math/exponential.h"
#include "check.h"

using namespace distillm;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

void test_exp2_error() {
  double worst = 0;
  for (double x = -126; x <= 126; x += 1.0 / 8191) {
    const float rounded = static_cast<float>(x);
    const double exact = std::exp2(static_cast<double>(rounded));
    worst = std::fmax(worst, std::fabs(exp2_fast(rounded) / exact - 1));
  }
  CHECK_NEAR(worst, 0, 2e-7);
}

void test_exp2_ends() {
  for (float x : {0.0f, 1.0f, -1.0f, -126.0f, 100.0f}) CHECK_EQUAL(exp2_fast(x), std::exp2(x));
  for (float x : {-126.6f, -127.0f, -1e4f, -1e38f, -kInfinity}) CHECK_EQUAL(exp2_fast(x), 0.0f);
  for (uint32_t bits : {0x7f800001u, 0x7fc00000u, 0xffffffffu, 0x7f80ffffu}) {
    CHECK(std::isnan(exp2_fast(bit_cast<float>(bits))));
  }
}

void test_log2_error() {
  double worst = 0;
  for (uint32_t bits = 0x00800000u; bits < 0x7f800000u; bits += 509) {
    const float x = bit_cast<float>(bits);
    const double exact = std::log2(static_cast<double>(x));
    if (exact != 0) worst = std::fmax(worst, std::fabs(log2_fast(x) / exact - 1));
  }
  CHECK_NEAR(worst, 0, 3e-7);
}

void test_log2_near_one_and_at_the_ends() {
  CHECK_EQUAL(log2_fast(1.0f), 0.0f);
  for (uint32_t step = 1; step < 2000; ++step) {
    for (uint32_t bits : {0x3f800000u + step, 0x3f800000u - step}) {
      const float x = bit_cast<float>(bits);
      const double exact = std::log2(static_cast<double>(x));
      CHECK_NEAR(log2_fast(x), exact, 3e-7 * std::fabs(exact));
    }
  }
  CHECK_EQUAL(log2_fast(0.0f), -126.0f);
  CHECK_EQUAL(0.0f * log2_fast(0.0f), 0.0f);
}

void test_at_least_keeps_nan() {
  CHECK(std::isnan(at_least(kNaN, 0.0f)));
  CHECK_EQUAL(at_least(-1.0f, 0.0f), 0.0f);
  CHECK_EQUAL(at_least(2.0f, 0.0f), 2.0f);
}

}  // namespace

int main() {
  test_exp2_error();
  test_exp2_ends();
  test_log2_error();
  test_log2_near_one_and_at_the_ends();
  test_at_least_keeps_nan();
  return report("exponential");
}
