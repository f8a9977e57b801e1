// Divergence of log-probabilities and its gradient, every entry a variable of its own (math/logprob_divergence.h).
//
//   student [R, V], teacher [R, V], float, bfloat16 or float16, any row stride -> loss [R] float, gradient [R, V]
//
// One block per row; each thread visits chunks of 16 bytes per side (of 4 entries in pairs of unequal dtypes), strided
// by the block. One pass without softmax statistics: what an entry contributes to the loss is summed, its gradient
// written as it is formed, and nothing of a row is kept. Bytes per entry in bf16: 4 read and 2 written.
#pragma once

#include "../../math/logprob_divergence.h"
#include "../../math/row_layout.h"
#include "../row/row_pair.cuh"

namespace distillm {

constexpr int kLogprobThreads = 256;
constexpr int kLogprobBlocks = 4;  // of a multiprocessor at least; left to itself, ptxas aims at more and spills

struct LogprobDivergenceArguments {
  const void* student;
  const void* teacher;
  void* gradient;  // null when not asked for
  RowLayout student_rows, teacher_rows;
  const float* weight;  // null when absent
  float* loss;
  ElementType student_type, teacher_type;
  int32_t vocab;
  float beta, floor;
};

// One row, with where its gradient goes.
template <class T>
struct LogprobRow {
  static constexpr int N = kChunkEntries<T>;
  LogitRow<T, N> student, teacher;
  OutputRow<T, N> gradient;  // of use only where `write`
  bool write;
  int vocab, phase;  // chunk c holds the entries [c * N - phase, (c + 1) * N - phase)

  __device__ LogprobRow(const LogprobDivergenceArguments& a, int64_t row)
      : student(a.student, a.student_rows.offset(row), a.vocab, a.student_type),
        teacher(a.teacher, a.teacher_rows.offset(row), a.vocab, a.teacher_type),
        gradient(a.gradient, row * a.vocab, a.student_type),
        write(a.gradient != nullptr),
        vocab(a.vocab),
        phase(write ? gradient.phase() : student.phase()) {}

  // Calls body(first entry) for this thread's chunks.
  template <class Body>
  __device__ void visit(Body body) const {
    const int step = static_cast<int>(blockDim.x) * N;
    for (int first = static_cast<int>(threadIdx.x) * N - phase; first < vocab; first += step) body(first);
  }

  __device__ void clear() const {
    const float zeros[N] = {};
    if (write) visit([&](int first) { gradient.store(vocab, first, zeros); });
  }

  // The sum of the values of this thread's entries.
  template <class Terms>
  __device__ float values(const Terms& terms, float weight) const {
    const bool student_aligned = student.phase() == phase, teacher_aligned = teacher.phase() == phase;
    float value = 0;
    visit([&](int first) {
      float x[N], y[N];
      unpack(student.load(first, student_aligned), x);
      unpack(teacher.load(first, teacher_aligned), y);
      float out[N];
#pragma unroll
      for (int i = 0; i < N; ++i) {
        value += terms.value(x[i], y[i]);
        out[i] = weight * terms.g(x[i], y[i]);
      }
      if (write) gradient.store(vocab, first, out);
    });
    return value;
  }
};

// Terms: LogprobTerms of float. T: the dtype of both sides, or AnyElement where they have two. Blocks of whole warps,
// grid.x = rows.
template <class Terms, class T>
__global__ void __launch_bounds__(kLogprobThreads, kLogprobBlocks)
    logprob_divergence_kernel(const LogprobDivergenceArguments a) {
  __shared__ PartialSums partial;
  const int64_t index = blockIdx.x;
  const LogprobRow<T> row(a, index);
  const float weight = a.weight ? a.weight[index] : 1.0f;
  if (weight == 0) {
    row.clear();
    if (threadIdx.x == 0) a.loss[index] = 0;
    return;
  }
  publish(row.values(Terms(a.beta, a.floor), weight), partial);
  __syncthreads();
  const float value = collect(partial);
  if (threadIdx.x == 0) a.loss[index] = weight * value;
}

}  // namespace distillm
