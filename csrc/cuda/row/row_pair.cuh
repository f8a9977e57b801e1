// The logits of one row, student's and teacher's, and the walk over them that every pass of a row kernel makes.
//
// The row is cut into chunks (chunk.cuh) at the addresses where the gradient's chunks are aligned; chunk c holds the
// entries [c * N - phase, (c + 1) * N - phase). They have positions: first the chunks that are full and aligned on both
// sides, then the partial ones at both ends. The threads of the cluster take the positions in turn. Whatever a side
// lacks reads as -inf.
//
// Each thread has a slot of the block's shared memory for every one of its turns, and nobody else touches it: no
// barrier is needed. The lanes of a warp lie side by side, so no bank conflict arises. The first visit leaves the
// logits of the first `staged` turns there, and later visits read no memory for those. Of the first `kept` of these
// turns the second visit may replace the teacher's logits by a float per entry, for the third to find.
#pragma once

#include <type_traits>

#include "cluster.cuh"
#include "logit_row.cuh"
#include "reduce.cuh"

namespace distillm {

// Entries per chunk: 16 bytes; in pairs of unequal dtypes what 16 bytes of float hold.
template <class T>
constexpr int kChunkEntries = 16 / static_cast<int>(sizeof(T));
template <>
inline constexpr int kChunkEntries<AnyElement> = 4;

// How many chunks a row can be cut into, wherever it starts.
__host__ __device__ constexpr int most_chunks(int vocab, int chunk_entries) {
  return (vocab + 2 * chunk_entries - 2) / chunk_entries;
}

// One of a thread's chunks: its position in the row and the thread's slot for it.
struct Place {
  int position;
  float4* slot;   // the student's logits; the teacher's are kWarp further
  float4* extra;  // of a kept turn, what has no room in the slot
};

// T: the dtype of both sides, or AnyElement.
template <class T>
struct RowPair {
  static constexpr int N = kChunkEntries<T>;
  static constexpr int kInFlight = 4;  // pairs of loads per thread
  using Stored = std::conditional_t<std::is_same_v<T, AnyElement>, float, T>;
  using Row = LogitRow<T, N>;
  using Logits = Chunk<Stored, N>;
  struct Loaded {
    Logits student, teacher;
  };
  static constexpr int kSlotBytes = sizeof(Loaded);                                // shared memory per thread and turn
  static constexpr int kKeptBytes = N * int{sizeof(float)} - int{sizeof(Logits)};  // more of it in a kept turn

  Row student, teacher;
  Cluster cluster;
  int phase;
  bool student_aligned, teacher_aligned;
  int head, full;                   // partial chunks before the full ones; full chunks, 0 if a side is out of phase
  int full_offset;                  // first entry of the first full chunk
  int staged, kept;                 // positions
  int step, slot_step, extra_step;  // from a thread's turn to its next: positions, bytes, bytes
  float4* slots;
  float4* extras;

  __device__ RowPair(Row student, Row teacher, Cluster cluster, int phase, float4* shared, int staged_turns,
                     int kept_turns)
      : student(student),
        teacher(teacher),
        cluster(cluster),
        phase(phase),
        student_aligned(student.phase() == phase),
        teacher_aligned(teacher.phase() == phase),
        head(phase > 0),
        full(0),
        full_offset(settled(phase > 0 ? N - phase : 0)),
        staged(settled(staged_turns * cluster.threads())),
        kept(settled(kept_turns * cluster.threads())),
        step(settled(cluster.threads())),
        slot_step(settled(2 * int{sizeof(float4)} * static_cast<int>(blockDim.x))),
        extra_step(settled(int{sizeof(float4)} * static_cast<int>(blockDim.x))),
        slots(shared + threadIdx.x / kWarp * (2 * kWarp) + threadIdx.x % kWarp),
        extras(shared + staged_turns * 2 * blockDim.x + threadIdx.x) {
    const int end = (phase + min(student.vocab, teacher.vocab)) / N;
    if (student_aligned && teacher_aligned) full = max(end - head, 0);
  }

  // The first logit of a side, loaded by one lane of each warp.
  __device__ static float first_logit(const Row& row) {
    const float z = threadIdx.x % kWarp == 0 ? row.entry(0) : 0.0f;
    return __shfl_sync(kAllLanes, z, 0);
  }

  __device__ int chunks(int vocab) const { return (phase + vocab + N - 1) / N; }

  // First entry of the chunk at a position; negative in a partial first chunk.
  __device__ int first_entry(int position) const {
    const int first = position * N + full_offset;
    if (mostly(position < full)) return first;
    return settled(position < full + head ? -phase : position * N - phase);  // not computed for all chunks
  }

  __device__ static float4* moved(float4* p, int bytes) {
    return reinterpret_cast<float4*>(reinterpret_cast<unsigned char*>(p) + bytes);
  }
  __device__ Place first_place() const { return {cluster.thread(), slots, extras}; }
  __device__ Place after(Place place, int turns) const {
    return {place.position + turns * step, moved(place.slot, turns * slot_step),
            moved(place.extra, turns * extra_step)};
  }

  __device__ Loaded load(int position) const {
    const int first = first_entry(position);
    return {student.load(first, student_aligned), teacher.load(first, teacher_aligned)};
  }

  template <class Body>
  __device__ void pass(const Loaded& loaded, Body& body) const {
    float student_logits[N], teacher_logits[N];
    unpack(loaded.student, student_logits);
    unpack(loaded.teacher, teacher_logits);
    body(student_logits, teacher_logits);
  }
  __device__ static void stage(float4* slot, const Loaded& loaded) {
    store_aligned(slot, loaded.student);
    store_aligned(slot + kWarp, loaded.teacher);
  }

  // Loads, stages and passes to body(student logits, teacher logits) this thread's chunks of all that either side has.
  // Of the full ones that are staged, kInFlight pairs are on their way at a time.
  template <class Body>
  __device__ void first_visit(Body body) const {
    Place place = first_place();
    Row student_at = student, teacher_at = teacher;
    student_at.advance(place.position * N + full_offset);
    teacher_at.advance(place.position * N + full_offset);
    const int64_t stride = settled(int64_t{step} * N);
    int end[kInFlight];  // of the positions from which so many turns on there is a chunk
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) end[i] = settled(min(full, staged) - i * step);
#pragma unroll 1
    while (place.position < end[0]) {
      Loaded loaded[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        if (place.position < end[i]) loaded[i] = {student_at.load_inside(0), teacher_at.load_inside(0)};
        student_at.advance(stride);
        teacher_at.advance(stride);
      }
      float4* slot = place.slot;
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        if (place.position < end[i]) {
          stage(slot, loaded[i]);
          pass(loaded[i], body);
        }
        slot = moved(slot, slot_step);
      }
      place = after(place, kInFlight);
    }
    while (place.position >= end[0] + step) place = after(place, -1);  // turns of the last round not taken
    first_looks(place, body);
  }

  // From `place` on.
  template <class Body>
  __device__ void first_looks(Place place, Body& body) const {
    const int count = chunks(max(student.vocab, teacher.vocab));
#pragma unroll 1
    for (; place.position < count; place = after(place, 1)) {
      const Loaded loaded = load(place.position);
      if (place.position < staged) stage(place.slot, loaded);
      pass(loaded, body);
    }
  }

  // The first visit once more, for what keep() has replaced; before the gradient overwrites anything.
  template <class Body>
  __device__ void stage_again(Body body) const {
    first_looks(first_place(), body);
  }

  // Writes to the chunk at a position of another row of `vocab` entries.
  __device__ void store(const OutputRow<T, N>& row, int vocab, int position, int first, const float (&x)[N]) const {
    if (mostly(position < full)) {
      row.store_inside(first, x);
    } else {
      row.store(vocab, first, x);
    }
  }

  // Calls body(place) for this thread's chunks of `vocab` entries, which may be less than a side has but not less than
  // both have.
  template <class Body>
  __device__ void visit(int vocab, Body body) const {
    const int count = chunks(vocab);
#pragma unroll 1
    for (Place place = first_place(); place.position < count; place = after(place, 1)) body(place);
  }

  // After the first visit, where keep() has not replaced the teacher's.
  __device__ void logits(Place place, float (&student_logits)[N], float (&teacher_logits)[N]) const {
    Loaded loaded;
    if (mostly(place.position < staged)) {
      loaded = {load_aligned<Stored, N>(place.slot), load_aligned<Stored, N>(place.slot + kWarp)};
    } else {
      loaded = load(place.position);
    }
    unpack(loaded.student, student_logits);
    unpack(loaded.teacher, teacher_logits);
  }
  __device__ void teacher_logits(Place place, float (&z)[N]) const {
    if (mostly(place.position < staged)) {
      unpack(load_aligned<Stored, N>(place.slot + kWarp), z);
    } else {
      unpack(teacher.load(first_entry(place.position), teacher_aligned), z);
    }
  }
  // Of a staged turn.
  __device__ void student_logits(Place place, float (&z)[N]) const { unpack(load_aligned<Stored, N>(place.slot), z); }

  __device__ void keep(Place place, const float (&x)[N]) const {
    place.slot[kWarp] = {x[0], x[1], x[2], x[3]};
    if constexpr (N == 8) *place.extra = {x[4], x[5], x[6], x[7]};
  }
  __device__ void kept_values(Place place, float (&x)[N]) const {
    const float4 low = place.slot[kWarp];
    x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
    if constexpr (N == 8) {
      const float4 high = *place.extra;
      x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
    }
  }
};

}  // namespace distillm
