// One row of logits as the passes of `sample_tokens` see it, and the walk over it.
//
// The row is cut into chunks of 16 bytes (chunk.cuh) at aligned addresses; 128 chunks make a tile, which one warp
// visits with four loads in flight per lane: lane l holds the chunks l, l + 32, l + 64 and l + 96 of it. Tiles are
// dealt to the blocks of the row's cluster in turn, and a block's tiles to its warps, in every pass alike, so that a
// staged chunk is read by the lane that wrote it. Entries that the row does not have read as -inf.
//
// The first pass keeps the first `staged` chunks of a block's tiles in its shared memory; later ones read the others
// from memory again.
// Repetition penalty and mask are two bitmaps in shared memory, applied as an entry is unpacked; the raw row stays.
#pragma once

#include <math_constants.h>

#include "../../math/sampling/sampling_rule.h"
#include "../../ops/sample_call.h"
#include "../row/chunk.cuh"
#include "../row/cluster.cuh"
#include "../row/reduce.cuh"

namespace distillm {

constexpr int kLaneChunks = 4;
constexpr int kTileChunks = kLaneChunks * kWarp;

struct SampleArguments {
  SampleCall call;
  int32_t staged_chunks;  // that a block's dynamic shared memory has room for, after the bitmaps
};

// 32-bit words of the two bitmaps, a multiple of 16 bytes.
__host__ __device__ constexpr int bitmap_words(int vocab) { return (vocab + 127) / 128 * 8; }

// From where to where finite logits lie.
struct Range {
  float low, high;

  __device__ static Range empty() { return {CUDART_INF_F, -CUDART_INF_F}; }

  template <int N>
  __device__ void add(const float (&z)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      high = fmaxf(high, z[i]);
      low = z[i] > -CUDART_INF_F ? fminf(low, z[i]) : low;
    }
  }
};

template <class T>
struct SampleRow {
  static constexpr int N = 16 / static_cast<int>(sizeof(T));
  using Loaded = Chunk<T, N>;

  const T* row;
  int vocab, phase, tiles, staged;
  Cluster cluster;
  uint4* slots;
  uint32_t* penalised_bits;  // null where nothing is penalised or banned; then the bits of banned ids follow
  float penalty;

  __device__ SampleRow(const SampleArguments& a, int64_t index, float penalty, const Cluster& cluster, uint4* shared)
      : row(static_cast<const T*>(a.call.logits) + index * a.call.stride),
        vocab(static_cast<int>(a.call.vocab)),
        phase(phase_of<T, N>(row)),
        tiles((vocab + phase + N * kTileChunks - 1) / (N * kTileChunks)),
        staged(a.staged_chunks),
        cluster(cluster),
        slots(shared),
        penalised_bits(nullptr),
        penalty(penalty) {
    if (!a.call.previous && !a.call.banned) return;
    penalised_bits = reinterpret_cast<uint32_t*>(shared);
    slots = shared + bitmap_words(vocab) / 4;
  }

  // Fills the bitmaps; every thread of the block takes part.
  __device__ void read_lists(const SampleCall& call, int64_t index) const {
    if (!penalised_bits) return;
    for (int w = threadIdx.x; w < bitmap_words(vocab); w += blockDim.x) penalised_bits[w] = 0;
    __syncthreads();
    const int64_t* previous = call.previous ? call.previous + index * call.previous_count : nullptr;
    for (int64_t i = threadIdx.x; i < call.previous_count; i += blockDim.x) {
      const int64_t id = previous[i];
      if (id >= 0 && id < vocab) atomicOr(penalised_bits + (id >> 5), 1u << (id & 31));
    }
    const bool* banned = call.banned ? call.banned + index * call.banned_stride : nullptr;
    for (int v = threadIdx.x; banned && v < vocab; v += blockDim.x) {
      if (banned[v]) atomicOr(banned_bits() + (v >> 5), 1u << (v & 31));
    }
    __syncthreads();
  }

  __device__ uint32_t* banned_bits() const { return penalised_bits + bitmap_words(vocab) / 2; }
  __device__ int first_entry(int chunk) const { return chunk * N - phase; }
  __device__ int tile_of(int id) const { return (id + phase) / (N * kTileChunks); }
  __device__ int own_tiles() const { return (tiles - cluster.rank + cluster.size - 1) / cluster.size; }
  // Of this block's tiles the n-th, in the row; the j-th of its chunks that this lane holds, in the row and staged.
  __device__ int tile(int own) const { return own * cluster.size + cluster.rank; }
  __device__ int chunk(int own, int j) const { return slot(tile(own), j); }
  __device__ static int slot(int own, int j) { return own * kTileChunks + j * kWarp + threadIdx.x % kWarp; }

  __device__ Loaded load_from_memory(int chunk) const {
    const int first = first_entry(chunk);
    if (first >= 0 && first + N <= vocab) return load_aligned<T, N>(row + first);
    return load_partial<T, N>(row, vocab, first);
  }
  __device__ void load_and_stage(int own, Loaded (&loaded)[kLaneChunks]) const {
#pragma unroll
    for (int j = 0; j < kLaneChunks; ++j) {
      loaded[j] = load_from_memory(chunk(own, j));
      if (slot(own, j) < staged) store_aligned<T, N>(slots + slot(own, j), loaded[j]);
    }
  }
  __device__ void load_staged(int own, Loaded (&loaded)[kLaneChunks]) const {
#pragma unroll
    for (int j = 0; j < kLaneChunks; ++j) loaded[j] = load_aligned<T, N>(slots + slot(own, j));
  }

  __device__ static bool bit(const uint32_t* bits, int v) { return bits[v >> 5] >> (v & 31) & 1u; }

  __device__ void adjust(int first, float (&z)[N]) const {
    if (!penalised_bits) return;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int v = first + i;
      if (v < 0 || v >= vocab) continue;
      if (bit(penalised_bits, v)) z[i] = penalised(z[i], penalty);
      if (bit(banned_bits(), v)) z[i] = -CUDART_INF_F;
    }
  }

  // Pass 1: visit_chunk(id of the first entry, raw logits), four loads in flight per lane. `seen`: after
  // range_of_first.
  template <class VisitChunk>
  __device__ void visit_raw(bool seen, VisitChunk&& visit_chunk) const {
    const int warps = blockDim.x / kWarp, count = own_tiles();
#pragma unroll 1
    for (int own = threadIdx.x / kWarp; own < count; own += warps) {
      Loaded loaded[kLaneChunks];
      if (seen && comes_first(own)) {
        load_staged(own, loaded);
      } else {
        load_and_stage(own, loaded);
      }
#pragma unroll
      for (int j = 0; j < kLaneChunks; ++j) {
        float z[N];
        unpack(loaded[j], z);
        visit_chunk(first_entry(chunk(own, j)), z);
      }
    }
  }

  // Whether all tiles are staged.
  __device__ bool staged_whole() const { return staged >= (tiles + cluster.size - 1) / cluster.size * kTileChunks; }

  // The first tile of every warp, if it is staged: it may be looked at before pass 1 at no further read.
  __device__ bool comes_first(int own) const {
    return (own + 1) * kTileChunks <= staged && own < own_tiles() && own < static_cast<int>(blockDim.x) / kWarp;
  }

  // This lane's finite logits, after penalty and mask, of the tile of its warp that comes first: from where to where.
  __device__ Range range_of_first() const {
    const int own = threadIdx.x / kWarp;
    Range range = Range::empty();
    if (!comes_first(own)) return range;
    Loaded loaded[kLaneChunks];
    load_and_stage(own, loaded);
#pragma unroll 1
    for (int j = 0; j < kLaneChunks; ++j) {
      visit_loaded(slot(own, j), chunk(own, j), [&](int, float (&z)[N]) { range.add(z); });
    }
    return range;
  }

  // The same of one chunk per thread, spread over the row: a further read, of some 12 KB.
  __device__ Range range_of_sample() const {
    Range range = Range::empty();
    const int chunk = static_cast<int>(static_cast<int64_t>(threadIdx.x) * tiles * kTileChunks / blockDim.x);
    visit_loaded(staged, chunk, [&](int, float (&z)[N]) { range.add(z); });  // from memory
    return range;
  }

  // Later passes: visit_chunk(id of the first entry, logits after penalty and mask), end_tile(tile) by whole warps.
  template <class VisitChunk, class EndTile>
  __device__ void visit(VisitChunk&& visit_chunk, EndTile&& end_tile) const {
    const int warps = blockDim.x / kWarp, count = own_tiles();
#pragma unroll 1
    for (int own = threadIdx.x / kWarp; own < count; own += warps) {
#pragma unroll 1
      for (int j = 0; j < kLaneChunks; ++j) visit_loaded(slot(own, j), chunk(own, j), visit_chunk);
      end_tile(tile(own));
    }
  }

  // The same for this lane's j-th chunk of any tile, whichever block of the cluster stages it.
  template <class VisitChunk>
  __device__ void visit_one(int tile, int j, VisitChunk&& visit_chunk) const {
    const int own = slot(tile / cluster.size, j), in_row = slot(tile, j);
    visit_unpacked(own < staged ? load_aligned<T, N>(cluster.in_block(slots + own, tile % cluster.size))
                                : load_from_memory(in_row),
                   in_row, visit_chunk);
  }

 private:
  template <class VisitChunk>
  __device__ void visit_loaded(int slot, int chunk, VisitChunk&& visit_chunk) const {
    visit_unpacked(slot < staged ? load_aligned<T, N>(slots + slot) : load_from_memory(chunk), chunk, visit_chunk);
  }
  template <class VisitChunk>
  __device__ void visit_unpacked(const Loaded& loaded, int chunk, VisitChunk&& visit_chunk) const {
    float z[N];
    unpack(loaded, z);
    const int first = first_entry(chunk);
    adjust(first, z);
    visit_chunk(first, z);
  }
};

}  // namespace distillm
