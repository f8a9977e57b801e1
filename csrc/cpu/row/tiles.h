// Rows read and written in tiles of the arithmetic type, whatever the storage type.
//
// A tile (4 KB of float) stays in the first-level cache. Kernels see only float or double; the storage type is a switch
// per tile, not a template parameter of every kernel.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

#include "../../math/float16.h"

namespace distillm {
inline namespace DISTILLM_ISA {

constexpr int64_t kTile = 1024;

using torch::headeronly::ScalarType;

template <class Storage, class Real>
void convert_tile(const void* source, int64_t count, Real* out) {
  const Storage* in = static_cast<const Storage*>(source);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<Real>(to_real(in[i]));
}

template <class Storage, class Real>
void store_tile(const Real* values, int64_t count, void* destination) {
  Storage* out = static_cast<Storage*>(destination);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = FromReal<Storage>::convert(values[i]);
}

inline int64_t bytes_of(ScalarType type) { return type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2; }

constexpr ScalarType kRealType(float) { return ScalarType::Float; }
constexpr ScalarType kRealType(double) { return ScalarType::Double; }

// One row of logits. Entries at `vocab` and above read as -inf: probability 0 on a side that lacks them.
template <class Real>
struct LogitRow {
  const char* data;
  ScalarType type;
  int64_t vocab;

  // Entries [start, start + count): a pointer into the row where it can be used as it is, else `buffer`.
  const Real* tile(int64_t start, int64_t count, Real* buffer) const {
    const int64_t present = count < vocab - start ? count : vocab - start;
    const char* source = data + start * bytes_of(type);
    if (present == count && type == kRealType(Real())) return reinterpret_cast<const Real*>(source);
    if (present > 0) convert(source, present, buffer);
    for (int64_t i = present > 0 ? present : 0; i < count; ++i) buffer[i] = -std::numeric_limits<Real>::infinity();
    return buffer;
  }

 private:
  void convert(const char* source, int64_t count, Real* buffer) const {
    switch (type) {
      case ScalarType::BFloat16: return convert_tile<BFloat16>(source, count, buffer);
      case ScalarType::Half: return convert_tile<Half>(source, count, buffer);
      case ScalarType::Double: return convert_tile<double>(source, count, buffer);
      default: return convert_tile<float>(source, count, buffer);
    }
  }
};

// One row of output, written tile by tile.
template <class Real>
struct OutputRow {
  char* data;
  ScalarType type;

  // Where to compute entries [start, ...): the row itself when it has the arithmetic type, else `buffer`.
  Real* tile(int64_t start, Real* buffer) const {
    return type == kRealType(Real()) ? reinterpret_cast<Real*>(data) + start : buffer;
  }

  // Converts what was computed in `values` by tile(); nothing to do when it was computed in place.
  void commit(int64_t start, int64_t count, const Real* values) const {
    char* destination = data + start * bytes_of(type);
    if constexpr (sizeof(Real) == sizeof(float)) {
      if (type == ScalarType::BFloat16) store_tile<BFloat16>(values, count, destination);
      if (type == ScalarType::Half) store_tile<Half>(values, count, destination);
    }
  }
};

// Entries [begin, end) of a row of output.
template <class Real>
void fill_row(const OutputRow<Real>& output, int64_t begin, int64_t end, Real value) {
  alignas(64) Real buffer[kTile];
  for (int64_t start = begin; start < end; start += kTile) {
    const int64_t count = end - start < kTile ? end - start : kTile;
    Real* out = output.tile(start, buffer);
    for (int64_t i = 0; i < count; ++i) out[i] = value;
    output.commit(start, count, out);
  }
}

}  // namespace DISTILLM_ISA
}  // namespace distillm
