// The logits of one row, student's and teacher's, and the walk over them that every pass of a row kernel makes.
//
// The row is cut into chunks (chunk.cuh) at the addresses where the gradient's chunks are aligned; chunk c holds the
// entries [c * N - phase, (c + 1) * N - phase). The threads of the cluster take the chunks in turn. Full chunks are
// loaded several at a time; those that are partial, at both ends, or not aligned on one side, one by one. Whatever a
// side lacks reads as -inf.
//
// Thread t of each block owns the slots t, t + threads, ... of the block's shared memory, one for each of its chunks in
// turn, and nobody else touches them: no barrier is needed, and no bank conflict arises. The first visit leaves the
// logits in the first `staged` slots, whose later visits read no memory. The second may overwrite them in the first
// `kept` slots with what it computed (two floats per entry, which may take more room than the logits), so that the
// third only combines those.
#pragma once

#include <type_traits>

#include "chunk.cuh"
#include "cluster.cuh"

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

// One of a thread's chunks and the slot for it in shared memory.
struct Place {
  int chunk, slot;
};

template <class Student, class Teacher>
struct RowPair {
  static constexpr int N = kChunkEntries<Student, Teacher>;
  static constexpr int kInFlight = 4;  // pairs of loads per thread
  using StudentRow = LogitRow<Student, N>;
  using TeacherRow = LogitRow<Teacher, N>;
  using StudentChunk = typename StudentRow::Loaded;
  using TeacherChunk = typename TeacherRow::Loaded;
  struct Loaded {
    StudentChunk student;
    TeacherChunk teacher;
  };
  static constexpr int kSlotBytes = sizeof(Loaded);                                    // shared memory per staged slot
  static constexpr int kKeptBytes = 2 * N * sizeof(float) - sizeof(Loaded) / 16 * 16;  // more of it per kept slot

  StudentRow student;
  TeacherRow teacher;
  Cluster cluster;
  int phase;
  bool student_aligned, teacher_aligned;
  int full_begin, full_end;  // the chunks that are full and aligned on both sides
  int staged, kept;
  TeacherChunk* teacher_slots;  // 16 bytes per slot in any case, like the arrays of kept slots behind it
  float4* kept_slots;
  StudentChunk* student_slots;  // 8 or 16 bytes

  __device__ RowPair(StudentRow student, TeacherRow teacher, Cluster cluster, int phase, float4* slots, int staged,
                     int kept)
      : student(student),
        teacher(teacher),
        cluster(cluster),
        phase(phase),
        student_aligned(student.aligned(phase)),
        teacher_aligned(teacher.aligned(phase)),
        full_begin(phase > 0),
        full_end(student_aligned && teacher_aligned ? (phase + min(student.vocab, teacher.vocab)) / N : 0),
        staged(staged),
        kept(kept),
        teacher_slots(reinterpret_cast<TeacherChunk*>(slots)),
        kept_slots(slots + staged),
        student_slots(reinterpret_cast<StudentChunk*>(kept_slots + kKeptBytes / 16 * kept)) {}

  __device__ int chunks(int vocab) const { return (phase + vocab + N - 1) / N; }
  __device__ Place first_place() const { return {cluster.thread(), static_cast<int>(threadIdx.x)}; }
  __device__ Place after(Place place, int turns) const {
    return {place.chunk + turns * cluster.threads(), place.slot + turns * static_cast<int>(blockDim.x)};
  }

  __device__ int first_entry(int chunk) const { return chunk * N - phase; }  // negative in a partial first chunk

  __device__ Loaded load(int chunk) const {
    const int first = first_entry(chunk);
    return {student.load(first, student_aligned), teacher.load(first, teacher_aligned)};
  }
  __device__ Loaded load_full(int chunk) const {
    const int first = first_entry(chunk);
    return {student.load_inside(first), teacher.load_inside(first)};
  }
  __device__ void stage(int slot, const Loaded& loaded) const {
    if (slot >= staged) return;
    store_aligned(student_slots + slot, loaded.student);
    store_aligned(teacher_slots + slot, loaded.teacher);
  }

  // Loads, stages and passes to body(student logits, teacher logits) this thread's chunks of all that either side has.
  template <class Body>
  __device__ void first_visit(Body body) const {
    const int count = chunks(max(student.vocab, teacher.vocab));
    const auto pass = [&](int slot, const Loaded& loaded) {
      stage(slot, loaded);
      float student_logits[N], teacher_logits[N];
      unpack(loaded.student, student_logits);
      unpack(loaded.teacher, teacher_logits);
      body(student_logits, teacher_logits);
    };
    Place place = first_place();
    while (place.chunk < count) {
      int turns = 1;
      if (place.chunk >= full_begin && place.chunk < full_end) {
        Loaded loaded[kInFlight];
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
          if (after(place, i).chunk < full_end) loaded[i] = load_full(after(place, i).chunk), turns = i + 1;
        }
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
          if (i < turns) pass(after(place, i).slot, loaded[i]);
        }
      } else {
        pass(place.slot, load(place.chunk));
      }
      place = after(place, turns);
    }
  }

  // Calls body(place) for this thread's chunks of `vocab` entries, which may be less than a side has but not less than
  // both have.
  template <class Body>
  __device__ void visit(int vocab, Body body) const {
    const int count = chunks(vocab);
#pragma unroll 1
    for (Place place = first_place(); place.chunk < count; place = after(place, 1)) body(place);
  }

  // After the first visit, for slots not overwritten by keep().
  __device__ void logits(Place place, float (&student_logits)[N], float (&teacher_logits)[N]) const {
    Loaded loaded;
    if (place.slot < staged) {
      loaded = {load_aligned<Student, N>(student_slots + place.slot),
                load_aligned<typename TeacherChunk::Element, N>(teacher_slots + place.slot)};
    } else {
      loaded = load(place.chunk);
    }
    unpack(loaded.student, student_logits);
    unpack(loaded.teacher, teacher_logits);
  }

  // The 16-byte pieces of a kept slot: over the teacher's logits, over the student's where those are as large, then in
  // arrays of their own.
  __device__ float4* piece(int slot, int i) const {
    constexpr bool kOverStudent = sizeof(StudentChunk) == 16;
    if (i == 0) return reinterpret_cast<float4*>(teacher_slots) + slot;
    if (kOverStudent && i == 1) return reinterpret_cast<float4*>(student_slots) + slot;
    return kept_slots + (i - 1 - kOverStudent) * kept + slot;
  }
  __device__ void keep(int slot, const float (&x)[N], const float (&y)[N]) const {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      *piece(slot, i / 4) = {x[i], x[i + 1], x[i + 2], x[i + 3]};
      *piece(slot, (N + i) / 4) = {y[i], y[i + 1], y[i + 2], y[i + 3]};
    }
  }
  __device__ void kept_values(int slot, float (&x)[N], float (&y)[N]) const {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      const float4 u = *piece(slot, i / 4), v = *piece(slot, (N + i) / 4);
      x[i] = u.x, x[i + 1] = u.y, x[i + 2] = u.z, x[i + 3] = u.w;
      y[i] = v.x, y[i + 1] = v.y, y[i + 2] = v.z, y[i + 3] = v.w;
    }
  }
};

}  // namespace distillm
