// The walk over one row of student logits that the passes of a row kernel without a teacher's row make.
#pragma once

#include "../row/row_pair.cuh"

namespace distillm {

// One row of student logits in chunks, and what shared memory keeps of it. A slot belongs to the thread of its chunk.
template <class Student>
struct StudentRow {
  static constexpr int N = 16 / sizeof(Student);
  static constexpr int kInFlight = 4;  // loads per thread
  LogitRow<Student, N> logits;
  int phase;  // entries that the gradient lies beyond a chunk boundary
  bool aligned;
  Chunk<Student, N>* slots;
  int staged;

  __device__ StudentRow(LogitRow<Student, N> logits, int phase, void* slots, int staged)
      : logits(logits),
        phase(phase),
        aligned(logits.phase() == phase),
        slots(static_cast<Chunk<Student, N>*>(slots)),
        staged(staged) {}

  __device__ int chunks() const { return (phase + logits.vocab + N - 1) / N; }
  __device__ int first_entry(int chunk) const { return chunk * N - phase; }  // negative in a partial first chunk
  __device__ bool full(int chunk) const {
    return aligned && first_entry(chunk) >= 0 && first_entry(chunk) + N <= logits.vocab;
  }

  template <class Body>
  __device__ void first_visit(Body body) const {
    const int count = chunks(), step = blockDim.x;
    const auto pass = [&](int chunk, const Chunk<Student, N>& loaded) {
      if (chunk < staged) store_aligned<Student, N>(slots + chunk, loaded);
      float z[N];
      unpack(loaded, z);
      body(chunk, z);
    };
    int chunk = threadIdx.x;
    while (chunk < count) {
      const int last = chunk + (kInFlight - 1) * step;
      if (full(chunk) && last < count && full(last)) {
        Chunk<Student, N> loaded[kInFlight];
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) loaded[i] = logits.load_inside(first_entry(chunk + i * step));
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) pass(chunk + i * step, loaded[i]);
        chunk += kInFlight * step;
      } else {
        pass(chunk, logits.load(first_entry(chunk), aligned));
        chunk += step;
      }
    }
  }

  // After the first visit.
  template <class Body>
  __device__ void second_visit(Body body) const {
    const int count = chunks();
#pragma unroll 2
    for (int chunk = threadIdx.x; chunk < count; chunk += blockDim.x) {
      float z[N];
      unpack(chunk < staged ? load_aligned<Student, N>(slots + chunk) : logits.load(first_entry(chunk), aligned), z);
      body(chunk, z);
    }
  }
};

}  // namespace distillm
