// Launch plans are made once per kind of call, by each device and kernel, and not kept where making one failed.
#include <cstdint>
#include <stdexcept>

#include "../cuda/row/plan_cache.h"
#include "check.h"

using namespace distillm;

namespace {

void test_made_once_per_kind() {
  PlanCache<int, int64_t, bool> cache;
  const char kernels[2] = {};
  int made = 0;
  const auto plan = [&](int device, const void* kernel, int64_t chunks, bool keeps) {
    return cache.of(device, kernel, chunks, keeps, [&] { return ++made; });
  };
  CHECK_EQUAL(plan(0, kernels, 7, true), 1);
  CHECK_EQUAL(plan(0, kernels, 7, true), 1);
  CHECK_EQUAL(plan(1, kernels, 7, true), 2);
  CHECK_EQUAL(plan(0, kernels + 1, 7, true), 3);
  CHECK_EQUAL(plan(0, kernels, 8, true), 4);
  CHECK_EQUAL(plan(0, kernels, 7, false), 5);
  CHECK_EQUAL(plan(0, kernels, 7, true), 1);
}

void test_forgets_when_full() {
  PlanCache<int64_t, int64_t> cache;
  int made = 0;
  const auto plan = [&](int64_t chunks) { return cache.of(0, nullptr, chunks, [&] { return ++made, chunks; }); };
  for (int64_t chunks = 0; chunks < 5000; ++chunks) CHECK_EQUAL(plan(chunks), chunks);
  CHECK_EQUAL(made, 5000);
  CHECK_EQUAL(plan(4999), 4999);
  CHECK_EQUAL(made, 5000);
  CHECK_EQUAL(plan(0), 0);  // forgotten, and made again
  CHECK_EQUAL(made, 5001);
}

void test_failure_is_not_kept() {
  PlanCache<int> cache;
  int thrown = 0;
  for (int attempt = 0; attempt < 2; ++attempt) {
    try {
      cache.of(0, nullptr, []() -> int { throw std::runtime_error("no room"); });
    } catch (const std::runtime_error&) {
      ++thrown;
    }
  }
  CHECK_EQUAL(thrown, 2);
  CHECK_EQUAL(cache.of(0, nullptr, [] { return 3; }), 3);
}

}  // namespace

int main() {
  test_made_once_per_kind();
  test_forgets_when_full();
  test_failure_is_not_kept();
  return report("plan_cache");
}
