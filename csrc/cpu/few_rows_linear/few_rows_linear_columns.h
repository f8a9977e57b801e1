// x W^T for a few rows on one thread. Included once per instruction set, by row_kernel_list.h.
//
// A general matrix product packs its operands first, and reads the weight twice for that; with a handful of rows the
// weight is all there is to read. Here each weight row is streamed once, against tiles of kRows x kColumns dot products
// held in registers. A dot product is summed in the same order in every tile shape: a row's result does not depend on
// how many rows there are.
#pragma once

#include <cstring>

#include "../../math/float16.h"
#include "../instruction_sets/row_kernels.h"

namespace distillm {
inline namespace DISTILLM_ISA {

constexpr int kLanes = DISTILLM_LANES;  // floats per vector register

typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));
typedef uint16_t HalfLanes __attribute__((vector_size(kLanes * sizeof(uint16_t))));
typedef uint32_t WordLanes __attribute__((vector_size(kLanes * sizeof(uint32_t))));

DISTILLM_HD Lanes load(const float* source) {
  Lanes lanes;
  std::memcpy(&lanes, source, sizeof(lanes));
  return lanes;
}

DISTILLM_HD Lanes load(const BFloat16* source) {
  HalfLanes bits;
  std::memcpy(&bits, source, sizeof(bits));
  const WordLanes words = __builtin_convertvector(bits, WordLanes) << 16;
  Lanes lanes;
  std::memcpy(&lanes, &words, sizeof(lanes));
  return lanes;
}

// The last `count` < kLanes entries, zeros behind.
template <class Storage>
DISTILLM_HD Lanes load_tail(const Storage* source, int64_t count) {
  Storage values[kLanes] = {};
  std::memcpy(values, source, count * sizeof(Storage));
  return load(values);
}

template <int kCount>
struct Floats {
  typedef float Type __attribute__((vector_size(kCount * sizeof(float))));
};

// By halves: a scalar loop over the lanes would cost as much as a short dot product.
template <int kCount>
DISTILLM_HD float sum(typename Floats<kCount>::Type lanes) {
  if constexpr (kCount == 4) {
    return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
  } else {
    typename Floats<kCount / 2>::Type low, high;
    std::memcpy(&low, &lanes, sizeof(low));
    std::memcpy(&high, reinterpret_cast<const char*>(&lanes) + sizeof(low), sizeof(high));
    return sum<kCount / 2>(low + high);
  }
}

// out[m][n] for kRows rows of x and kColumns rows of the weight.
template <int kRows, int kColumns, class Storage>
inline void dot_tile(const FewRowsLinearCall& call, int64_t row, int64_t column) {
  const int64_t depth = call.depth, whole = depth / kLanes * kLanes;
  const float* x = call.x + row * depth;
  const Storage* weight = static_cast<const Storage*>(call.weight) + column * depth;
  Lanes acc[kRows][kColumns] = {};
  const auto accumulate = [&](const Lanes(&w)[kColumns], auto&& x_at) __attribute__((always_inline)) {
    for (int m = 0; m < kRows; ++m) {
      const Lanes x_m = x_at(m);
      for (int n = 0; n < kColumns; ++n) acc[m][n] += x_m * w[n];
    }
  };
  for (int64_t k = 0; k < whole; k += kLanes) {
    Lanes w[kColumns];
    for (int n = 0; n < kColumns; ++n) {
      w[n] = load(weight + n * depth + k);
      __builtin_prefetch(weight + (n + kColumns) * depth + k);
    }
    accumulate(w, [&](int m) __attribute__((always_inline)) { return load(x + m * depth + k); });
  }
  if (whole < depth) {
    Lanes w[kColumns];
    for (int n = 0; n < kColumns; ++n) w[n] = load_tail(weight + n * depth + whole, depth - whole);
    accumulate(w,
               [&](int m) __attribute__((always_inline)) { return load_tail(x + m * depth + whole, depth - whole); });
  }
  const Storage* bias = static_cast<const Storage*>(call.bias);
  Storage* out = static_cast<Storage*>(call.out);
  for (int m = 0; m < kRows; ++m) {
    for (int n = 0; n < kColumns; ++n) {
      const float offset = bias ? to_real(bias[column + n]) : 0.0f;
      out[(row + m) * call.columns + column + n] = FromReal<Storage>::convert(sum<kLanes>(acc[m][n]) + offset);
    }
  }
}

// All rows against kColumns weight rows, which stay in the first-level cache from one tile to the next.
template <int kColumns, class Storage>
inline void dot_columns(const FewRowsLinearCall& call, int64_t column) {
  int64_t row = 0;
  for (; row + 4 <= call.rows; row += 4) dot_tile<4, kColumns, Storage>(call, row, column);
  switch (call.rows - row) {
    case 3: return dot_tile<3, kColumns, Storage>(call, row, column);
    case 2: return dot_tile<2, kColumns, Storage>(call, row, column);
    case 1: return dot_tile<1, kColumns, Storage>(call, row, column);
  }
}

template <class Storage>
inline void dot_range(const FewRowsLinearCall& call, int64_t begin, int64_t end) {
  int64_t column = begin;
  for (; column + 3 <= end; column += 3) dot_columns<3, Storage>(call, column);
  for (; column < end; ++column) dot_columns<1, Storage>(call, column);
}

inline void few_rows_linear_columns(const FewRowsLinearCall& call, int64_t begin, int64_t end) {
  return call.bfloat16 ? dot_range<BFloat16>(call, begin, end) : dot_range<float>(call, begin, end);
}

}  // namespace DISTILLM_ISA
}  // namespace distillm
