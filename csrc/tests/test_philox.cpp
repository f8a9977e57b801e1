// Philox4x32-10 against the known-answer vectors of its authors (Random123, kat_vectors); the uniform at both ends.
#include "../math/sampling/philox.h"
#include "check.h"

using namespace distillm;

namespace {

void test_known_answers() {
  struct Answer {
    PhiloxBlock counter;
    uint32_t key0, key1;
    PhiloxBlock expected;
  };
  const Answer answers[] = {
      {{{0, 0, 0, 0}}, 0, 0, {{0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u}}},
      {{{~0u, ~0u, ~0u, ~0u}}, ~0u, ~0u, {{0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu}}},
      {{{0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u}},
       0xa4093822u,
       0x299f31d0u,
       {{0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u}}},
  };
  for (const Answer& a : answers) {
    const PhiloxBlock got = philox4x32_10(a.counter, a.key0, a.key1);
    for (int i = 0; i < 4; ++i) CHECK_EQUAL(got.word[i], a.expected.word[i]);
  }
  CHECK_EQUAL(random_bits(0, 0, Draw::kSampleToken), 0xe169c58d6627e8d5u);
}

// Every bit of seed, position and purpose reaches the draw.
void test_inputs_are_used() {
  const uint64_t base = random_bits(5, 9, Draw::kSampleToken);
  for (int bit = 0; bit < 64; ++bit) {
    const int64_t flip = static_cast<int64_t>(uint64_t{1} << bit);
    CHECK(random_bits(5 ^ flip, 9, Draw::kSampleToken) != base);
    CHECK(random_bits(5, 9 ^ flip, Draw::kSampleToken) != base);
  }
  CHECK(random_bits(5, 9, Draw::kSampleTeacher) != base);
}

void test_uniform_is_open() {
  CHECK_EQUAL(open_uniform(0), 0x1p-65);
  CHECK_EQUAL(open_uniform(~uint64_t{0}), 1 - 0x1p-53);
  CHECK_EQUAL(open_uniform(uint64_t{1} << 63), 0.5);
  CHECK_EQUAL(open_uniform(uint64_t{1} << 11), 0x1p-53);
  CHECK(open_uniform(0x7ff) < open_uniform(0x800));
}

void test_uniform_moments() {
  constexpr int kDraws = 1 << 20;
  double sum = 0, squares = 0;
  for (int i = 0; i < kDraws; ++i) {
    const double u = open_uniform(1, i, Draw::kSampleToken);
    sum += u;
    squares += u * u;
  }
  CHECK_NEAR(sum / kDraws, 0.5, 5 / std::sqrt(12.0 * kDraws));
  CHECK_NEAR(squares / kDraws, 1 / 3.0, 5 * std::sqrt(4 / 45.0 / kDraws));
}

}  // namespace

int main() {
  test_known_answers();
  test_inputs_are_used();
  test_uniform_is_open();
  test_uniform_moments();
  return report("philox");
}
