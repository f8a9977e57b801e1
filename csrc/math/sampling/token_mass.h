// The weight of one vocabulary entry as an integer: when a token is drawn, and in the teacher's head of adaptive_kl.
//
// With x = (z - max z) log2(e) / T the weight is 2^x in units of 2^-44. Integer sums do not depend on their order, so
// that a row gives the same token in every tiling, with every number of threads and on every device; to that end
// exp2_portable has the same bits everywhere. An entry 31 nats below the maximum still weighs 1 unit; what lies deeper
// is rounded to 0 or 1 and never carries more than 2^-45 of the maximum each.
//
// Sums of less than 2^20 weights fit 64 bits. What weighs entries on the CPU is compiled without contraction of
// products and sums: cpu/row/entry_weights.h, cpu/sample_tokens/sample_tokens_rows.h.
#pragma once

#include "../exponential.h"
#include "../ordered_key.h"

namespace distillm {
inline namespace DISTILLM_ISA {

constexpr double kMassUnits = 0x1p44;

// Rounded twice everywhere: a fused multiply-add would round once where the hardware has one.
DISTILLM_HD float multiply_then_add(float a, float b, float c) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(__fmul_rn(a, b), c);
#else
#ifdef __clang__
#pragma clang fp contract(off)
#endif
  const float product = a * b;
  return product + c;
#endif
}

// 2^x for x <= 0, rounded to a multiple of 2^-44: relative error < 3e-7 above 2^-21, absolute error < 2^-43 below.
// Exactly 1 at 0, 0 for -inf, NaN for NaN. The same bits on every device.
//
// x = n + f with |f| <= 1/2, a minimax polynomial in f (9.2e-8) times 2^n.
DISTILLM_HD float exp2_portable(float x) {
  const float clamped = at_least(x, -127.0f);
  // Adding 1.5 * 2^23 rounds to an integer; 127 more, and the low bits of the sum are the exponent field of 2^n.
  const float shifter = 12582912.0f + 127.0f;
  const float shifted = clamped + shifter;
  const float f = clamped - (shifted - shifter);
  float poly = 0.001326472731307149f;
  poly = multiply_then_add(poly, f, 0.009671512991189957f);
  poly = multiply_then_add(poly, f, 0.05550733581185341f);
  poly = multiply_then_add(poly, f, 0.24022242426872253f);
  poly = multiply_then_add(poly, f, 0.6931470036506653f);
  poly = multiply_then_add(poly, f, 1.0f);
  const float power = poly * bit_cast<float>(bit_cast<uint32_t>(shifted) << 23);
  // The sum with 1.5 * 2^-21 has steps of 2^-44; where the power is larger than that its own steps are coarser anyway.
  const float grid = 7.152557373046875e-7f;
#ifdef __CUDA_ARCH__
  return __fadd_rn(__fadd_rn(power, grid), -grid);
#else
  return (power + grid) - grid;
#endif
}

// The same in double on the CPU, from the exp2 of its library: absolute error < 2^-44.
inline double exp2_portable(double x) {
  const double grid = 0x1.8p8;  // its sums with weights have steps of 2^-44
  return (exp2(x) + grid) - grid;
}

// Entries of one row -> their weights.
struct Tempering {
  float maximum;
  float scale;  // log2(e) / T

  // The maximum is subtracted before scaling, which keeps all digits of large logits.
  DISTILLM_HD float weight(float z) const { return exp2_portable((z - maximum) * scale); }
};

// Finite and not subnormal for every T > 0, so that 0 * scale is 0 and -inf * scale is -inf.
DISTILLM_HD float tempering_scale(float temperature) {
  const float scale = static_cast<float>(kLog2E) / temperature;
  const float highest = 3.4028234663852886e38f;
  return scale > highest ? highest : at_least(scale, 1.17549435e-38f);
}

// A weight, or an exact sum of weights, as an integer.
DISTILLM_HD uint64_t mass_of(float weight) { return static_cast<uint64_t>(weight * static_cast<float>(kMassUnits)); }
DISTILLM_HD uint64_t mass_of(double weight) { return static_cast<uint64_t>(weight * kMassUnits); }

DISTILLM_HD uint64_t multiply_high(uint64_t a, uint64_t b) {
#ifdef __CUDA_ARCH__
  return __umul64hi(a, b);
#else
  return static_cast<uint64_t>((static_cast<unsigned __int128>(a) * b) >> 64);
#endif
}

// Where a draw falls, in [0, total): the drawn entry is the first whose cumulative mass exceeds it.
DISTILLM_HD uint64_t draw_point(uint64_t bits, uint64_t total) { return multiply_high(bits, total); }

// The smallest mass that is at least p of the total, at least 1; p in (0, 1] counts in units of 2^-32.
DISTILLM_HD uint64_t nucleus_mass(float p, uint64_t total) {
  const uint64_t units = static_cast<uint64_t>(static_cast<double>(p) * 4294967296.0 + 0.5);
  const uint64_t high = units * (total >> 32), low = units * (total & 0xffffffffu);
  const uint64_t mass = high + (low >> 32) + ((low & 0xffffffffu) ? 1 : 0);
  return mass > 0 ? mass : 1;
}

// Repetition penalty of CTRL (Keskar et al., 2019): positive logits shrink, negative ones grow in size. A penalty below
// 1 raises a logit to the largest float at most, so that its row keeps a distribution.
DISTILLM_HD float penalised(float z, float penalty) {
  const float highest = 3.4028234663852886e38f;
  const float moved = z < 0 ? z * penalty : z / penalty;
  return moved > highest ? highest : moved;
}

}  // namespace DISTILLM_ISA
}  // namespace distillm
