// Base-2 exponential and logarithm: branch-free polynomials on the CPU, special-function units on the GPU.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "target.h"

namespace distillm {
inline namespace DISTILLM_ISA {

constexpr double kLog2E = 1.4426950408889634074;
constexpr double kLn2 = 0.69314718055994530942;

// A variable, since device code may read constants but not call the host's numeric_limits.
template <class Real>
constexpr Real kSmallestNormal = std::numeric_limits<Real>::min();

template <class To, class From>
DISTILLM_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// Not std::max: the order of the operands keeps a NaN in x, and the form vectorises to one maxps. The GPU has an
// instruction that does not keep it; its kernels ask for no term of a row that holds a NaN.
template <class Real>
DISTILLM_HD Real at_least(Real x, Real lower) {
#ifdef __CUDA_ARCH__
  return fmax(x, lower);
#else
  return x < lower ? lower : x;
#endif
}

// a * b, rounded: not merged with a sum that it goes into. A sum of two such products is the same in either order,
// which a fused multiply-add of one of them is not. The CPU's compilers leave a maximum between the two alone.
DISTILLM_HD float rounded_product(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return at_least(a * b, std::numeric_limits<float>::lowest());
#endif
}
DISTILLM_HD double rounded_product(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dmul_rn(a, b);
#else
  return at_least(a * b, std::numeric_limits<double>::lowest());
#endif
}

// 2^x for x <= 127, meant for log-probabilities and differences to a maximum.
//
// CPU: x = n + f with |f| <= 1/2, a minimax polynomial in f (2e-9) times 2^n; relative error < 2e-7 for x >= -126,
// 0 below -126.5 (-inf included), NaN stays NaN.
// GPU: ex2.approx.ftz, relative error < 3e-7; results below 2^-126 are 0.
DISTILLM_HD float exp2_fast(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  const float clamped = at_least(x, -127.0f);
  // Adding 1.5 * 2^23 rounds to an integer; 127 more, and the low bits of the sum are the exponent field of 2^n.
  const float shifter = 12582912.0f + 127.0f;
  const float shifted = clamped + shifter;
  const float f = clamped - (shifted - shifter);
  float poly = 1.5345812e-4f;
  poly = poly * f + 1.33999314e-3f;
  poly = poly * f + 9.61848896e-3f;
  poly = poly * f + 5.55032878e-2f;
  poly = poly * f + 2.40226469e-1f;
  poly = poly * f + 6.93147206e-1f;
  poly = poly * f + 1.0f;
  return poly * bit_cast<float>(bit_cast<uint32_t>(shifted) << 23);
#endif
}

// log2(x) for normal positive x. Values below 2^-126 count as 2^-126, so that 0 * log2_fast(0) is 0 and not NaN.
//
// CPU: x = 2^n * m, m in [0.7071, 1.4142), log2(m) = (m - 1) * minimax polynomial (3e-8); relative error < 3e-7, also
// where the result is near 0, which it is exactly at x = 1. x must not be NaN.
// GPU: lg2.approx.ftz, absolute error 2^-22 for x in [1/2, 2], relative error 2^-22 elsewhere.
DISTILLM_HD float log2_fast(float x) {
  const float normal = at_least(x, kSmallestNormal<float>);
#ifdef __CUDA_ARCH__
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(normal));
  return y;
#else
  const uint32_t bits = bit_cast<uint32_t>(normal);
  const uint32_t sqrt_half = 0x3f3504f3u;
  const uint32_t offset = bits - sqrt_half;
  const int32_t n = bit_cast<int32_t>(offset) >> 23;
  const float m = bit_cast<float>((offset & 0x007fffffu) + sqrt_half);
  const float t = m - 1.0f;
  float poly = 0.125837059f;
  poly = poly * t - 0.207269818f;
  poly = poly * t + 0.215715624f;
  poly = poly * t - 0.238944813f;
  poly = poly * t + 0.287916246f;
  poly = poly * t - 0.360703683f;
  poly = poly * t + 0.480910643f;
  poly = poly * t - 0.721347347f;
  poly = poly * t + 1.442695f;
  return poly * t + static_cast<float>(n);
#endif
}

DISTILLM_HD double exp2_fast(double x) { return exp2(x); }
DISTILLM_HD double log2_fast(double x) { return log2(at_least(x, kSmallestNormal<double>)); }

// 1 / x. GPU: rcp.approx.ftz, relative error < 2^-23; callers keep x in [2^-126, 2^126].
DISTILLM_HD float reciprocal_fast(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.0f / x;
#endif
}

// a / b. GPU: one reciprocal and one product, relative error < 2^-22; the bounds of reciprocal_fast hold for b.
DISTILLM_HD float divide_fast(float a, float b) {
#ifdef __CUDA_ARCH__
  return a * reciprocal_fast(b);
#else
  return a / b;
#endif
}
DISTILLM_HD double divide_fast(double a, double b) { return a / b; }

}  // namespace DISTILLM_ISA
}  // namespace distillm
