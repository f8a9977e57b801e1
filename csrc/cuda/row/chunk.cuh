// Chunks: the unit in which the row kernels move data. A chunk is 16 bytes (8 in pairs of unequal dtypes) of
// consecutive entries of one row, held in registers as raw words.
//
// Rows of an odd vocabulary, and views, start anywhere. Three ways to load a chunk cover that: one vector access where
// its address is aligned, two and a shift where it is not, and entry by entry at the ends of a row, with -inf for the
// entries that the row does not have.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "../../math/float16.h"

namespace distillm {

template <class T, int N>
struct Chunk {
  static_assert(N * sizeof(T) == 16 || N * sizeof(T) == 8, "one vector access");
  static constexpr int kWords = N * sizeof(T) / 4;
  uint32_t word[kWords];
};

// --- words of a chunk <-> floats
// ---------------------------------------------------------------------------------------

// One word: one float or two of 16 bits.
template <class T>
struct Packing;

template <>
struct Packing<float> {
  static constexpr uint32_t kMinusInfinity = 0xff800000u;
  __device__ static void unpack(uint32_t word, float* z) { z[0] = __uint_as_float(word); }
  __device__ static uint32_t pack(const float* x) { return __float_as_uint(x[0]); }
  __device__ static uint32_t load(const float* p) { return __float_as_uint(*p); }
  __device__ static void store(float* p, float x) { *p = x; }
  __device__ static void store_bits(float* p, uint32_t bits) { *p = __uint_as_float(bits); }
};

template <>
struct Packing<BFloat16> {
  static constexpr uint32_t kMinusInfinity = 0xff80u;
  __device__ static void unpack(uint32_t word, float* z) {
    z[0] = __uint_as_float(word << 16);
    z[1] = __uint_as_float(word & 0xffff0000u);
  }
  __device__ static uint32_t pack(const float* x) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(x[0], x[1]);
    return bit_cast<uint32_t>(pair);
  }
  __device__ static uint32_t load(const BFloat16* p) { return p->bits; }
  __device__ static void store(BFloat16* p, float x) { p->bits = __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
  __device__ static void store_bits(BFloat16* p, uint32_t bits) { p->bits = static_cast<uint16_t>(bits); }
};

template <>
struct Packing<Half> {
  static constexpr uint32_t kMinusInfinity = 0xfc00u;
  __device__ static void unpack(uint32_t word, float* z) {
    const float2 pair = __half22float2(bit_cast<__half2>(word));
    z[0] = pair.x;
    z[1] = pair.y;
  }
  __device__ static uint32_t pack(const float* x) {
    const __half2 pair = __floats2half2_rn(x[0], x[1]);
    return bit_cast<uint32_t>(pair);
  }
  __device__ static uint32_t load(const Half* p) { return p->bits; }
  __device__ static void store(Half* p, float x) { p->bits = __half_as_ushort(__float2half_rn(x)); }
  __device__ static void store_bits(Half* p, uint32_t bits) { p->bits = static_cast<uint16_t>(bits); }
};

template <class T, int N>
__device__ __forceinline__ void unpack(const Chunk<T, N>& chunk, float (&z)[N]) {
#pragma unroll
  for (int w = 0; w < Chunk<T, N>::kWords; ++w) Packing<T>::unpack(chunk.word[w], z + w * (N / Chunk<T, N>::kWords));
}

template <class T, int N>
__device__ __forceinline__ Chunk<T, N> pack(const float (&x)[N]) {
  Chunk<T, N> chunk;
#pragma unroll
  for (int w = 0; w < Chunk<T, N>::kWords; ++w) chunk.word[w] = Packing<T>::pack(x + w * (N / Chunk<T, N>::kWords));
  return chunk;
}

// --- loads and stores
// --------------------------------------------------------------------------------------------------

// How many entries p lies beyond a chunk boundary.
template <class T, int N>
__device__ __forceinline__ int phase_of(const T* p) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(p) / sizeof(T) % N);
}

// p: global or shared memory, aligned to the chunk.
template <class T, int N>
__device__ __forceinline__ Chunk<T, N> load_aligned(const void* p) {
  if constexpr (Chunk<T, N>::kWords == 4) {
    const uint4 v = *static_cast<const uint4*>(p);
    return {{v.x, v.y, v.z, v.w}};
  } else {
    const uint2 v = *static_cast<const uint2*>(p);
    return {{v.x, v.y}};
  }
}

template <class T, int N>
__device__ __forceinline__ void store_aligned(void* p, const Chunk<T, N>& chunk) {
  if constexpr (Chunk<T, N>::kWords == 4) {
    *static_cast<uint4*>(p) = make_uint4(chunk.word[0], chunk.word[1], chunk.word[2], chunk.word[3]);
  } else {
    *static_cast<uint2*>(p) = make_uint2(chunk.word[0], chunk.word[1]);
  }
}

// A chunk at any address, out of the two aligned chunks that cover it; the N entries before and after it must exist.
// Neighbouring lanes share those chunks, so that memory still delivers each sector once.
template <class T, int N>
__device__ __forceinline__ Chunk<T, N> load_shifted(const T* p) {
  constexpr int kWords = Chunk<T, N>::kWords;
  const int phase = phase_of<T, N>(p);
  const Chunk<T, N> low = load_aligned<T, N>(p - phase);
  const Chunk<T, N> high = load_aligned<T, N>(p - phase + N);
  uint32_t word[2 * kWords];
#pragma unroll
  for (int w = 0; w < 2 * kWords; ++w) word[w] = w < kWords ? low.word[w] : high.word[w - kWords];
  const int bytes = phase * static_cast<int>(sizeof(T));
#pragma unroll
  for (int step = kWords / 2; step > 0; step /= 2) {  // a shift by bytes / 4 words without indexing registers
#pragma unroll
    for (int w = 0; w + step < 2 * kWords; ++w) word[w] = bytes & (4 * step) ? word[w + step] : word[w];
  }
  Chunk<T, N> chunk;
#pragma unroll
  for (int w = 0; w < kWords; ++w) chunk.word[w] = __funnelshift_r(word[w], word[w + 1], 8 * (bytes & 3));
  return chunk;
}

// The entries of a chunk moved up by one, with `bits` as the first.
template <class T, int N>
__device__ __forceinline__ void push_entry(Chunk<T, N>& chunk, uint32_t bits) {
#pragma unroll
  for (int w = Chunk<T, N>::kWords - 1; w > 0; --w) {
    chunk.word[w] = sizeof(T) == 4 ? chunk.word[w - 1] : __funnelshift_l(chunk.word[w - 1], chunk.word[w], 16);
  }
  chunk.word[0] = sizeof(T) == 4 ? bits : chunk.word[0] << 16 | bits;
}

// The bits of the first entry, and the others moved down by one.
template <class T, int N>
__device__ __forceinline__ uint32_t pop_entry(Chunk<T, N>& chunk) {
  const uint32_t bits = sizeof(T) == 4 ? chunk.word[0] : chunk.word[0] & 0xffffu;
#pragma unroll
  for (int w = 0; w + 1 < Chunk<T, N>::kWords; ++w) {
    chunk.word[w] = sizeof(T) == 4 ? chunk.word[w + 1] : __funnelshift_r(chunk.word[w], chunk.word[w + 1], 16);
  }
  if (sizeof(T) == 2) chunk.word[Chunk<T, N>::kWords - 1] >>= 16;
  return bits;
}

// Entries [first, first + N) of a row of `count` entries, `missing` where the row has none. Loops that are not
// unrolled, here and in store_chunk, since the ends of a row are rare and this is instantiated many times.
template <class T, int N>
__device__ __forceinline__ Chunk<T, N> load_partial(const T* row, int count, int first,
                                                    uint32_t missing = Packing<T>::kMinusInfinity) {
  Chunk<T, N> chunk = {};
#pragma unroll 1
  for (int v = first + N - 1; v >= first; --v) {
    push_entry(chunk, v >= 0 && v < count ? Packing<T>::load(row + v) : missing);
  }
  return chunk;
}

// Writes entries [first, first + N) of a row of `count` entries; first and row together must be aligned to the chunk.
template <class T, int N>
__device__ __forceinline__ void store_chunk(T* row, int count, int first, Chunk<T, N> chunk) {
  if (first >= 0 && first + N <= count) {
    store_aligned<T, N>(row + first, chunk);
    return;
  }
#pragma unroll 1
  for (int v = first; v < first + N; ++v) {
    const uint32_t bits = pop_entry(chunk);
    if (v >= 0 && v < count) Packing<T>::store_bits(row + v, bits);
  }
}
template <class T, int N>
__device__ __forceinline__ void store_chunk(T* row, int count, int first, const float (&x)[N]) {
  store_chunk(row, count, first, pack<T, N>(x));
}

}  // namespace distillm
