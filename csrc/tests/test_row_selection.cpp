// The selection of the largest entries against a sort: by count and by mass, with ties, ends and extreme values.
#include <algorithm>
#include <numeric>
#include <random>
#include <vector>

#include "../cpu/row/entry_weights.h"
#include "../cpu/row/row_selection.h"
#include "check.h"

using namespace distillm;

namespace {

template <class Real, class Measure>
Threshold<Real> found(const std::vector<Real>& values, Measure measure, uint64_t target) {
  std::vector<typename SelectionScratch<Real>::Key> keys(values.size());
  std::vector<int32_t> indices(values.size());
  return find_threshold(values.data(), static_cast<int64_t>(values.size()), measure, target,
                        SelectionScratch<Real>{keys.data(), indices.data()});
}

// The shortest prefix that measures `target`, entry by entry.
template <class Real, class Measure>
void check_against_sort(const std::vector<Real>& values, Measure measure, uint64_t target) {
  std::vector<int64_t> order(values.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return values[a] > values[b]; });
  const Threshold<Real> threshold = found(values, measure, target);
  uint64_t sum = 0;
  for (const int64_t index : order) {
    CHECK_EQUAL(threshold.selects(values[index], index), sum < target);
    sum += measure(index);
  }
  CHECK(sum >= target);
}

template <class Real>
std::vector<Real> some_values(std::mt19937& generator, int kind, int64_t count) {
  const Real infinity = std::numeric_limits<Real>::infinity(), tiny = std::numeric_limits<Real>::denorm_min();
  const std::vector<Real> extreme = {-infinity, -1e30f, -1, -tiny, Real(-0.0), 0, tiny, 1, 1e4f, 1e30f, infinity};
  std::normal_distribution<Real> normal(0, kind == 0 ? 3 : Real(0.01));
  std::vector<Real> values(count);
  for (Real& value : values) {
    if (kind < 2) value = normal(generator);
    if (kind == 2) value = static_cast<Real>(static_cast<int>(generator() % 5) - 2);
    if (kind == 3) value = extreme[generator() % extreme.size()];
    if (kind == 4) value = 1.5;
  }
  return values;
}

template <class Real>
void test_against_sort() {
  std::mt19937 generator(7);
  for (int kind = 0; kind < 5; ++kind) {
    for (const int64_t count : {1, 2, 31, 256, 1500}) {
      const std::vector<Real> values = some_values<Real>(generator, kind, count);
      for (const int64_t k : {int64_t{1}, (count + 1) / 2, count}) check_against_sort(values, CountMeasure{}, k);
      // Masses that grow with the value, some of them 0, none of them lighter than an entry below.
      std::vector<Real> weights(count);
      for (int64_t i = 0; i < count; ++i) {
        const Real raised = std::min(std::max(values[i], Real(-60)), Real(0));
        weights[i] = exp2_portable(raised);
      }
      const MassMeasure<Real> mass{weights.data()};
      uint64_t total = 0;
      for (int64_t i = 0; i < count; ++i) total += mass(i);
      for (const double share : {0.0, 0.1, 0.5, 0.9, 1.0}) {
        const uint64_t target = static_cast<uint64_t>(share * static_cast<double>(total));
        if (total > 0) check_against_sort(values, mass, std::min(std::max(target, uint64_t{1}), total));
      }
    }
  }
}

// The row of the header's example; masses in units of 2^-44.
void test_worked_row() {
  const std::vector<float> values = {1, 3, 2, 3, 0}, weights = {0x2p-44f, 0x8p-44f, 0x4p-44f, 0x8p-44f, 0x1p-44f};
  const MassMeasure<float> mass{weights.data()};
  const Threshold<float> of_twelve = found(values, mass, 12), of_eight = found(values, mass, 8);
  CHECK_EQUAL(of_twelve.value, 3.0f);
  CHECK_EQUAL(of_twelve.last, 3);
  CHECK_EQUAL(of_eight.last, 1);
  CHECK_EQUAL(found(values, mass, 17).value, 2.0f);
  CHECK_EQUAL(found(values, mass, 23).value, 0.0f);
  CHECK_EQUAL(found(values, CountMeasure{}, 3).last, 2);
}

void test_signed_zeros_are_equal() {
  const std::vector<float> values = {-0.0f, 0.0f, -0.0f, -1.0f};
  const Threshold<float> two = found(values, CountMeasure{}, 2);
  CHECK_EQUAL(two.last, 1);
  CHECK(two.selects(-0.0f, 0) && two.selects(0.0f, 1) && !two.selects(-0.0f, 2) && !two.selects(-1.0f, 0));
}

void test_double_weights_lie_on_the_grid() {
  CHECK_EQUAL(exp2_portable(0.0), 1.0);
  CHECK_EQUAL(exp2_portable(-std::numeric_limits<double>::infinity()), 0.0);
  CHECK_EQUAL(mass_of(exp2_portable(-44.0)), 1u);
  CHECK_EQUAL(mass_of(exp2_portable(-47.0)), 0u);
  for (int i = 0; i < 60 * 64; ++i) {
    const double x = -i / 64.0, got = exp2_portable(x);
    CHECK_NEAR(got, std::exp2(x), 0x1p-44);
    CHECK_EQUAL(got * 0x1p44, std::floor(got * 0x1p44));
  }
}

// Entries below the logit of a bound weigh less than it each, also where the bound is a few units and rounding adds
// half a unit to each of them: else the candidates above it would not measure what is searched among them.
template <class Real>
void test_entries_below_a_bound_are_lighter() {
  const Real nat = static_cast<Real>(1.4426950408889634);
  for (const Real lowered : {Real(0), Real(2)}) {
    const Weighing<Real> by{Real(3), nat, lowered};
    for (double units = 0.3; units < 300; units *= 1.011) {
      for (const double share : {0.9, 0.985, 0.9925, 0.9999, 1.0, 1.01}) {
        const double weight = units / kMassUnits;
        const Real z = static_cast<Real>(3 + (std::log2(share * weight) + lowered) / nat);
        if (z >= logit_below(weight, by)) continue;
        Real rounded;
        weigh(&z, 1, by, &rounded);
        CHECK(static_cast<double>(mass_of(rounded)) < units);
      }
    }
  }
}

}  // namespace

int main() {
  test_against_sort<float>();
  test_against_sort<double>();
  test_worked_row();
  test_signed_zeros_are_equal();
  test_double_weights_lie_on_the_grid();
  test_entries_below_a_bound_are_lighter<float>();
  test_entries_below_a_bound_are_lighter<double>();
  return report("row_selection");
}
