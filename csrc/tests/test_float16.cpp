// The 16-bit formats: every bit pattern there and back, and rounding at every boundary between two neighbours.
#include "../math/float16.h"
#include "check.h"

using namespace distillm;

namespace {

// The value of a half by its definition.
double half_value(uint16_t bits) {
  const int exponent = (bits >> 10) & 31, mantissa = bits & 1023;
  const double sign = bits & 0x8000 ? -1 : 1;
  if (exponent == 31) return mantissa ? std::nan("") : sign * HUGE_VAL;
  return exponent ? sign * std::ldexp(1024 + mantissa, exponent - 25) : sign * std::ldexp(mantissa, -24);
}

bool same(double a, double b) {
  return (std::isnan(a) && std::isnan(b)) || (a == b && std::signbit(a) == std::signbit(b));
}

template <class Storage>
Storage nearest(float x) {
  return FromReal<Storage>::convert(x);
}

void test_every_half() {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const Half half{static_cast<uint16_t>(bits)};
    CHECK(same(to_real(half), half_value(half.bits)));
    if (!std::isnan(half_value(half.bits))) CHECK_EQUAL(nearest<Half>(to_real(half)).bits, half.bits);
  }
  CHECK(std::isnan(to_real(nearest<Half>(std::nanf("")))));
}

void test_every_bfloat16() {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const BFloat16 x{static_cast<uint16_t>(bits)};
    const float value = bit_cast<float>(bits << 16);
    CHECK(same(to_real(x), value));
    if (std::isnan(value)) {
      CHECK(std::isnan(to_real(nearest<BFloat16>(value))));
    } else {
      CHECK_EQUAL(nearest<BFloat16>(value).bits, x.bits);
    }
  }
  CHECK(std::isnan(to_real(nearest<BFloat16>(bit_cast<float>(0x7f800001u)))));
}

// Halfway goes to the even neighbour, one float below or above it to the nearer one.
template <class Storage>
void check_rounding_between(uint16_t lower, float low, float high) {
  const float middle = static_cast<float>((static_cast<double>(low) + high) / 2);
  const uint16_t even = lower & 1 ? lower + 1 : lower;
  CHECK_EQUAL(nearest<Storage>(middle).bits, even);
  CHECK_EQUAL(nearest<Storage>(std::nextafter(middle, low)).bits, lower);
  CHECK_EQUAL(nearest<Storage>(std::nextafter(middle, high)).bits, static_cast<uint16_t>(lower + 1));
}

void test_rounding() {
  for (uint16_t bits = 0; bits < 0x7bff; ++bits) {
    check_rounding_between<Half>(bits, to_real(Half{bits}), to_real(Half{static_cast<uint16_t>(bits + 1)}));
  }
  for (uint16_t bits = 0x0080; bits < 0x7f7e; ++bits) {
    check_rounding_between<BFloat16>(bits, to_real(BFloat16{bits}), to_real(BFloat16{static_cast<uint16_t>(bits + 1)}));
  }
  CHECK_EQUAL(nearest<Half>(65519.0f).bits, 0x7bff);
  CHECK_EQUAL(nearest<Half>(65520.0f).bits, 0x7c00);
  CHECK_EQUAL(nearest<Half>(1e30f).bits, 0x7c00);
  CHECK_EQUAL(nearest<Half>(-1e30f).bits, 0xfc00);
  CHECK_EQUAL(nearest<BFloat16>(3.4e38f).bits, 0x7f80);
}

}  // namespace

int main() {
  test_every_half();
  test_every_bfloat16();
  test_rounding();
  return report("float16");
}
