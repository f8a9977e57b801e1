// One row of logits of either dtype, as chunks (chunk.cuh) that start anywhere.
#pragma once

#include "chunk.cuh"

namespace distillm {

enum class ElementType : int32_t { kFloat, kBFloat16, kHalf };

// Stands for rows whose dtype is known at run time only: where the teacher's is not the student's.
struct AnyElement {};

// x, as a value that the compiler cannot take apart: it would compute sums and products of a whole loop again at every
// use, to spare registers that the kernels have.
__device__ __forceinline__ int settled(int x) {
  asm("" : "+r"(x));
  return x;
}
__device__ __forceinline__ int64_t settled(int64_t x) {
  asm("" : "+l"(x));
  return x;
}
template <class T>
__device__ __forceinline__ T* settled(T* global) {
  asm("" : "+l"(global));
  __builtin_assume(__isGlobal(global));
  return global;
}

// A condition that nearly always holds: its code lies in line.
__device__ __forceinline__ bool mostly(bool condition) { return __builtin_expect(condition, true); }

// One side of a row.
template <class T, int N>
struct LogitRow {
  using Loaded = Chunk<T, N>;
  const T* row;
  int vocab;

  __device__ LogitRow(const void* data, int64_t offset, int vocab, ElementType)
      : row(settled(static_cast<const T*>(data) + offset)), vocab(vocab) {}
  __device__ int phase() const { return phase_of<T, N>(row); }
  __device__ void advance(int64_t entries) { row += entries; }
  __device__ Loaded load_inside(int first) const { return load_aligned<T, N>(row + first); }
  __device__ Loaded load(int first, bool aligned, uint32_t missing = Packing<T>::kMinusInfinity) const {
    if (aligned && first >= 0 && first + N <= vocab) return load_inside(first);
    if (first >= N && first + 2 * N <= vocab) return load_shifted<T, N>(row + first);
    return load_partial<T, N>(row, vocab, first, missing);
  }
  __device__ float entry(int v) const {
    float z[4 / sizeof(T)];
    Packing<T>::unpack(v < vocab ? Packing<T>::load(row + v) : Packing<T>::kMinusInfinity, z);
    return z[0];
  }
};

// A side of any dtype, converted as it is loaded: later passes see float.
template <int N>
struct LogitRow<AnyElement, N> {
  using Loaded = Chunk<float, N>;
  const void* data;
  int64_t offset;
  int vocab;
  ElementType type;

  __device__ LogitRow(const void* data, int64_t offset, int vocab, ElementType type)
      : data(data), offset(offset), vocab(vocab), type(type) {}

  // As a row of float or of 16-bit words, which are told apart only when they are converted: two kinds of loads in the
  // code instead of three.
  template <class Use>
  __device__ auto sized(Use use) const {
    return type == ElementType::kFloat ? use(LogitRow<float, N>(data, offset, vocab, type))
                                       : use(LogitRow<BFloat16, N>(data, offset, vocab, type));
  }
  __device__ Loaded widened(const Chunk<float, N>& chunk) const { return chunk; }
  __device__ Loaded widened(const Chunk<BFloat16, N>& chunk) const {
    float z[N];
    if (type == ElementType::kHalf) {
      unpack(bit_cast<Chunk<Half, N>>(chunk), z);
    } else {
      unpack(chunk, z);
    }
    return pack<float, N>(z);
  }
  __device__ int phase() const {
    return sized([](auto row) { return row.phase(); });
  }
  __device__ void advance(int64_t entries) { offset += entries; }
  __device__ Loaded load_inside(int first) const {
    return sized([=](auto row) { return widened(row.load_inside(first)); });
  }
  __device__ Loaded load(int first, bool aligned) const {
    const uint32_t missing = type == ElementType::kFloat  ? Packing<float>::kMinusInfinity
                             : type == ElementType::kHalf ? Packing<Half>::kMinusInfinity
                                                          : Packing<BFloat16>::kMinusInfinity;
    return sized([=](auto row) { return widened(row.load(first, aligned, missing)); });
  }
  __device__ float entry(int v) const {
    if (v >= vocab) return __uint_as_float(Packing<float>::kMinusInfinity);
    if (type == ElementType::kFloat) return static_cast<const float*>(data)[offset + v];
    const uint16_t bits = static_cast<const BFloat16*>(data)[offset + v].bits;
    return type == ElementType::kHalf ? to_real(Half{bits}) : to_real(BFloat16{bits});
  }
};

// A row that is written, such as the gradient's.
template <class T, int N>
struct OutputRow {
  T* row;

  __device__ OutputRow(void* data, int64_t offset, ElementType) : row(settled(static_cast<T*>(data) + offset)) {}
  __device__ int phase() const { return phase_of<T, N>(row); }
  __device__ void store_inside(int first, const float (&x)[N]) const { store_aligned(row + first, pack<T, N>(x)); }
  __device__ void store(int vocab, int first, const float (&x)[N]) const {
    store_chunk(row, vocab, first, pack<T, N>(x));
  }
  __device__ void store_entry(int v, float x) const { Packing<T>::store(row + v, x); }
};

template <int N>
struct OutputRow<AnyElement, N> {
  void* data;
  int64_t offset;
  ElementType type;

  __device__ OutputRow(void* data, int64_t offset, ElementType type) : data(data), offset(offset), type(type) {}

  // use(row of float or of 16-bit words, x as a chunk of it).
  template <class Use>
  __device__ void narrowed(const float (&x)[N], Use use) const {
    if (type == ElementType::kFloat) return use(OutputRow<float, N>(data, offset, type), pack<float, N>(x));
    const auto words =
        type == ElementType::kHalf ? bit_cast<Chunk<BFloat16, N>>(pack<Half, N>(x)) : pack<BFloat16, N>(x);
    use(OutputRow<BFloat16, N>(data, offset, type), words);
  }
  __device__ int phase() const {
    return type == ElementType::kFloat ? OutputRow<float, N>(data, offset, type).phase()
                                       : OutputRow<BFloat16, N>(data, offset, type).phase();
  }
  __device__ void store_inside(int first, const float (&x)[N]) const {
    narrowed(x, [=](auto out, const auto& chunk) { store_aligned(out.row + first, chunk); });
  }
  __device__ void store(int vocab, int first, const float (&x)[N]) const {
    narrowed(x, [=](auto out, const auto& chunk) { store_chunk(out.row, vocab, first, chunk); });
  }
  __device__ void store_entry(int v, float x) const {
    const float chunk[N] = {x};
    store(v + 1, v, chunk);
  }
};

}  // namespace distillm
