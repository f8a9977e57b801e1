// The logits of one row, student's and teacher's, and the walk over them that every pass of a row kernel makes.
//
// The row is cut into chunks (chunk.cuh) at the addresses where the gradient's chunks are aligned; chunk c holds the
// entries [c * N - phase, (c + 1) * N - phase). Thread t of a block visits the positions t, t + threads, ...: first the
// full chunks, several loads in flight per thread, then the partial ones at both ends. Whatever a side lacks reads as
// -inf.
//
// The first visit keeps the first `capacity` positions in shared memory, each slot written and read by one thread, so
// that no barrier is needed and no bank conflict arises; later visits take those from there and the rest from memory
// again.
#pragma once

#include <type_traits>

#include "chunk.cuh"

namespace distillm {

enum class ElementType : int32_t { kFloat, kBFloat16, kHalf };

// Stands for a teacher whose dtype is not the student's and known at run time only.
struct AnyElement {};

// Entries per chunk: 16 bytes; in pairs of unequal dtypes what 16 bytes of float hold.
template <class Student, class Teacher>
constexpr int kChunkEntries = std::is_same_v<Student, Teacher> ? 16 / static_cast<int>(sizeof(Student)) : 4;

// How many chunks a row can be cut into, wherever it starts.
__host__ __device__ constexpr int most_chunks(int vocab, int chunk_entries) {
  return (vocab + 2 * chunk_entries - 2) / chunk_entries;
}

// One side of a row.
template <class T, int N>
struct LogitRow {
  using Loaded = Chunk<T, N>;
  const T* row;
  int vocab;

  __device__ LogitRow(const void* data, int64_t offset, int vocab, ElementType)
      : row(static_cast<const T*>(data) + offset), vocab(vocab) {}
  __device__ bool aligned(int phase) const { return phase_of<T, N>(row) == phase; }
  __device__ Loaded load_inside(int first) const { return load_aligned<T, N>(row + first); }
  __device__ Loaded load(int first, bool aligned) const {
    if (aligned && first >= 0 && first + N <= vocab) return load_inside(first);
    if (first >= N && first + 2 * N <= vocab) return load_shifted<T, N>(row + first);
    return load_partial<T, N>(row, vocab, first);
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

  template <class Use>
  __device__ auto typed(Use use) const {
    switch (type) {
      case ElementType::kBFloat16: return use(LogitRow<BFloat16, N>(data, offset, vocab, type));
      case ElementType::kHalf: return use(LogitRow<Half, N>(data, offset, vocab, type));
      default: return use(LogitRow<float, N>(data, offset, vocab, type));
    }
  }
  template <class T>
  __device__ static Loaded widened(const Chunk<T, N>& chunk) {
    float z[N];
    unpack(chunk, z);
    return pack<float, N>(z);
  }
  __device__ bool aligned(int phase) const {
    return typed([=](auto row) { return row.aligned(phase); });
  }
  __device__ Loaded load_inside(int first) const {
    return typed([=](auto row) { return widened(row.load_inside(first)); });
  }
  __device__ Loaded load(int first, bool aligned) const {
    return typed([=](auto row) { return widened(row.load(first, aligned)); });
  }
  __device__ float entry(int v) const {
    return typed([=](auto row) { return row.entry(v); });
  }
};

template <class Student, class Teacher>
struct RowPair {
  static constexpr int N = kChunkEntries<Student, Teacher>;
  static constexpr int kInFlight = 2;  // pairs of loads per thread
  using StudentRow = LogitRow<Student, N>;
  using TeacherRow = LogitRow<Teacher, N>;
  using StudentChunk = typename StudentRow::Loaded;
  using TeacherChunk = typename TeacherRow::Loaded;
  struct Loaded {
    StudentChunk student;
    TeacherChunk teacher;
  };
  static constexpr int kSlotBytes = sizeof(Loaded);  // shared memory per position

  StudentRow student;
  TeacherRow teacher;
  int phase;
  bool student_aligned, teacher_aligned;
  int head, full;               // partial chunks before the full ones; full chunks, 0 if a side is out of phase
  TeacherChunk* teacher_slots;  // first: 16 bytes each, always, which keeps the student's aligned
  StudentChunk* student_slots;
  int capacity;

  __device__ RowPair(StudentRow student, TeacherRow teacher, int phase, void* slots, int capacity)
      : student(student),
        teacher(teacher),
        phase(phase),
        student_aligned(student.aligned(phase)),
        teacher_aligned(teacher.aligned(phase)),
        head(phase > 0),
        full(0),
        teacher_slots(static_cast<TeacherChunk*>(slots)),
        student_slots(reinterpret_cast<StudentChunk*>(teacher_slots + capacity)),
        capacity(capacity) {
    const int end = (phase + min(student.vocab, teacher.vocab)) / N;
    if (student_aligned && teacher_aligned) full = max(end - head, 0);
  }

  __device__ int chunks(int vocab) const { return (phase + vocab + N - 1) / N; }

  // First entry of the chunk at a position; negative in a partial first chunk.
  __device__ int first_entry(int position) const {
    const bool is_full = position < full, is_head = !is_full && position < full + head;
    return (position + (is_full ? head : is_head ? -full : 0)) * N - phase;
  }

  template <bool kFirstVisit, bool kInside>
  __device__ Loaded fetch(int position) const {
    if (!kFirstVisit && position < capacity) {
      return {load_aligned_slot(student_slots + position), load_aligned_slot(teacher_slots + position)};
    }
    const int first = first_entry(position);
    if (kInside) return {student.load_inside(first), teacher.load_inside(first)};
    return {student.load(first, student_aligned), teacher.load(first, teacher_aligned)};
  }

  template <class T>
  __device__ static Chunk<T, N> load_aligned_slot(const Chunk<T, N>* slot) {
    return load_aligned<T, N>(slot);
  }

  template <bool kFirstVisit, class Body>
  __device__ void pass(int position, const Loaded& loaded, Body& body) const {
    if (kFirstVisit && position < capacity) {
      store_aligned(student_slots + position, loaded.student);
      store_aligned(teacher_slots + position, loaded.teacher);
    }
    float student_logits[N], teacher_logits[N];
    unpack(loaded.student, student_logits);
    unpack(loaded.teacher, teacher_logits);
    body(first_entry(position), student_logits, teacher_logits);
  }

  // Calls body(first entry, student logits, teacher logits) for this thread's share of the chunks of `vocab` entries,
  // which may be less than a side has but not less than both have.
  template <bool kFirstVisit, class Body>
  __device__ void visit(int vocab, Body body) const {
    const int step = blockDim.x, count = chunks(vocab);
    int position = threadIdx.x;
    for (; position + (kInFlight - 1) * step < full; position += kInFlight * step) {
      Loaded loaded[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) loaded[i] = fetch<kFirstVisit, true>(position + i * step);
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) pass<kFirstVisit>(position + i * step, loaded[i], body);
    }
#pragma unroll 1
    for (; position < count; position += step) {
      pass<kFirstVisit>(position, fetch<kFirstVisit, false>(position), body);
    }
  }
};

}  // namespace distillm
