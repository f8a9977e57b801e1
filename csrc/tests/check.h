// Checks for the native tests: each failure prints its place and values, main() returns the number of failures.
#pragma once

#include <cmath>
#include <cstdio>
#include <initializer_list>

inline int g_failures = 0;

inline void check_failed(const char* file, int line, const char* what, double got, double expected) {
  if (++g_failures <= 20) std::printf("%s:%d: %s: got %.17g, expected %.17g\n", file, line, what, got, expected);
}

#define CHECK(condition) \
  if (!(condition)) check_failed(__FILE__, __LINE__, #condition, 0, 1)

#define CHECK_EQUAL(got, expected) \
  if (!((got) == (expected))) check_failed(__FILE__, __LINE__, #got, double(got), double(expected))

#define CHECK_NEAR(got, expected, tolerance)                       \
  if (!(std::fabs(double(got) - double(expected)) <= (tolerance))) \
  check_failed(__FILE__, __LINE__, #got, double(got), double(expected))

inline int report(const char* name) {
  std::printf("%s: %d failures\n", name, g_failures);
  return g_failures != 0;
}
