// Divergence of every row of student logits from a compressed teacher, and its gradient.
//
//   student [R, V], float, bfloat16 or float16; ids, logprobs [R, K] -> loss [R] float, gradient [R, V]
//
// One block per row; each thread visits chunks of 16 bytes, strided by the block. The kept entries come first, into
// shared memory; the first pass over the row has the softmax statistics of the entries off S, by a bit per entry, so
// that the mass off S is a sum of its own terms; the second writes a scaled softmax; then K entries are put right.
// Nothing row-sized is written but the gradient.
// Bytes per entry in bf16: 2 read and 2 written where the row fits in shared memory (V <= 108,000 at 227 KB, K = 64);
// of longer rows the part that does not fit is read twice. Two exponentials per entry.
#pragma once

#include "kept_entries.cuh"
#include "kept_term.cuh"
#include "student_row.cuh"

namespace distillm {

constexpr int kSparseBlockThreads = 512;

struct SparseScratch {
  PartialExpSums off, on, teacher, unit;
  PartialSums shares, value, g;
};

// Statistics of the student off S, on S and over both, at T = 1 over both, and of the teacher on S.
struct SparseStatistics {
  ExpSum off = ExpSum::empty(), on = off, all = off, unit = off, teacher = off;
  float shares;  // sum of counts; NaN where the teacher holds a NaN or +inf
};

template <class Student>
__device__ SparseStatistics sparse_statistics(const StudentRow<Student>& row, const KeptShared& kept,
                                              const SparseDivergenceArguments& a, float drawn, SparseScratch& scratch) {
  constexpr int N = StudentRow<Student>::N;
  const float unit_scale = static_cast<float>(kLog2E), scale = unit_scale * a.loss.inverse_temperature;
  const bool own_unit = a.loss.ce_weight != 0 && a.loss.inverse_temperature != 1;
  SparseStatistics s;
  row.first_visit([&](int chunk, float (&z)[N]) {
    if (own_unit) s.unit.add(z, unit_scale);
    const uint32_t members = kept.members[chunk * N / 32] >> chunk * N % 32;
#pragma unroll
    for (int i = 0; i < N; ++i) z[i] = members >> i & 1 ? -INFINITY : z[i];
    s.off.add(z, scale);
  });
  for (int k = threadIdx.x; k < a.kept; k += blockDim.x) {
    if (!kept.counts(k)) continue;
    s.on.add<1>({kept.z[k]}, scale);
    if (a.tail == Tail::kRenormalize) s.teacher.add<1>({kept.log2_p[k]}, 1.0f);
  }
  publish(s.off, scale, scratch.off);
  publish(s.on, scale, scratch.on);
  publish(s.teacher, 1.0f, scratch.teacher);
  publish(s.unit, unit_scale, scratch.unit);
  publish(drawn, scratch.shares);
  __syncthreads();
  s.off = collect(scratch.off, scale);
  s.on = collect(scratch.on, scale);
  s.all = s.off.with(s.on, scale);
  s.teacher = collect(scratch.teacher, 1.0f);
  s.unit = own_unit ? collect(scratch.unit, unit_scale) : s.all;
  s.shares = collect(scratch.shares);
  return s;
}

// Maps a logit to its base-2 log-probability. The maximum is subtracted before scaling, which keeps all digits of large
// logits.
struct LogSoftmax {
  float maximum, scale, log2_sum;

  __device__ static LogSoftmax of(const ExpSum& s, float scale) { return {s.maximum, scale, log2f(s.sum)}; }
  __device__ float operator()(float z) const { return (z - maximum) * scale - log2_sum; }
};

// The side inputs of a row.
struct SparseInputs : RowInputs {
  float log_norm, tail_logprob;

  __device__ SparseInputs(const SparseDivergenceArguments& a, int64_t row)
      : RowInputs(RowInputs::of(a.loss, row)), log_norm(a.log_norm[row]), tail_logprob(a.tail_logprob[row]) {}

  __device__ bool legal(const SparseDivergenceArguments& a) const {
    const bool tail_legal = a.tail != Tail::kBucket || tail_logprob < INFINITY;
    const RowParameters<float> row = parameters;
    const bool form_legal = with_form(static_cast<KeptForm>(a.form), row, [=](auto terms) { return terms.legal(row); });
    return RowInputs::legal(a.loss, a.student_vocab) && fabsf(log_norm) < INFINITY && tail_legal && form_legal;
  }
};

// Sums of value and G over the entries that count; leaves their G in the place of log2_p.
__device__ inline Term<float> kept_sums(const KeptShared& kept, const SparseDivergenceArguments& a, const LogSoftmax& q,
                                        float log2_norm, float inverse_shares, RowParameters<float> row,
                                        SparseScratch& scratch) {
  Term<float> sum = with_form(static_cast<KeptForm>(a.form), row, [&](auto terms) {
    Term<float> sum{0, 0};
    for (int k = threadIdx.x; k < a.kept; k += blockDim.x) {
      if (!kept.counts(k)) continue;
      const float log2_q = q(kept.z[k]), log2_p = kept.log2_p[k] - log2_norm;
      const Term<float> term =
          terms({log2_p, log2_q, exp2_fast(log2_p), exp2_fast(log2_q)}, kept.share[k] * inverse_shares);
      sum.value += term.value;
      sum.g += term.g;
      kept.log2_p[k] = term.g;
    }
    return sum;
  });
  publish(sum.value, scratch.value);
  publish(sum.g, scratch.g);
  __syncthreads();
  return {collect(scratch.value), collect(scratch.g)};
}

// gradient_v = s_v tail + unit_scale softmax_v at T = 1 off S, s the student's softmax over the entries off S; on S
// g_scale (G_k - q_k sum_g) + label_scale softmax_k at T = 1; at the label less label_scale.
struct SparseGradient {
  LogSoftmax off, q, unit;
  float tail, unit_scale, g_scale, sum_g, label_scale;

  __device__ SparseGradient(const SparseDivergenceArguments& a, const SparseStatistics& s, const LogSoftmax& q,
                            const LogSoftmax& unit, float r, float g_kept, float g_bucket, const RowLoss<float>& loss)
      : off(LogSoftmax::of(s.off, q.scale)),
        q(q),
        unit(unit),
        tail(0),
        unit_scale(0),
        g_scale(loss.g_scale),
        sum_g(g_kept + g_bucket),
        label_scale(loss.ce_scale) {
    if (s.off.sum == 0) off.log2_sum = 0;  // nothing off S: its entries are 0, not 0 / 0
    // A constant divergence may have an infinite G. Over S alone an entry off S has no part in it.
    if (!loss.constant && a.tail != Tail::kRenormalize) tail = g_scale * (g_bucket - r * sum_g);
    const bool own_unit = a.loss.inverse_temperature != 1;
    if (own_unit) unit_scale = label_scale;
    if (!own_unit) tail += label_scale * r;
  }

  template <int N>
  __device__ void off_kept(const float (&z)[N], float (&out)[N]) const {
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = tail * exp2_fast(off(z[i]));
    if (unit_scale != 0) {
#pragma unroll
      for (int i = 0; i < N; ++i) out[i] += unit_scale * exp2_fast(unit(z[i]));
    }
  }
  __device__ float on_kept(float z, float g, bool is_label) const {
    const float divergence = g_scale == 0 ? 0.0f : g_scale * (g - exp2_fast(q(z)) * sum_g);
    if (label_scale == 0) return divergence;
    return divergence + label_scale * (exp2_fast(unit(z)) - (is_label ? 1.0f : 0.0f));
  }
};

// Both visits must be over before: whole chunks are written without a look at the bits.
template <class Student>
__device__ void put_right(const SparseDivergenceArguments& a, const KeptShared& kept, const SparseGradient& term,
                          int64_t label, float label_logit, int phase, Student* gradient) {
  for (int k = threadIdx.x; k < a.kept; k += blockDim.x) {
    const int32_t id = kept.ids[k];
    if (!kept.counts(k) || id >= a.student_vocab) continue;
    const bool is_label = a.loss.ce_weight != 0 && id == label;
    Packing<Student>::store(gradient + id, term.on_kept(kept.z[k], kept.log2_p[k], is_label));
  }
  if (a.loss.ce_weight == 0 || threadIdx.x > 0 || kept.member(static_cast<int>(label) + phase)) return;
  float out[1];
  term.off_kept<1>({label_logit}, out);
  Packing<Student>::store(gradient + label, out[0] - term.label_scale);
}

// Entries [begin, end) of a gradient row.
template <class Student>
__device__ void fill_entries(Student* gradient, int begin, int end, float value) {
  for (int v = begin + static_cast<int>(threadIdx.x); v < end; v += blockDim.x) {
    Packing<Student>::store(gradient + v, value);
  }
}

template <class Student>
__device__ void fill_chunks(Student* gradient, int vocab, int phase, float value) {
  constexpr int N = StudentRow<Student>::N;
  float out[N];
#pragma unroll
  for (int i = 0; i < N; ++i) out[i] = value;
  for (int first = static_cast<int>(threadIdx.x) * N - phase; first < vocab; first += blockDim.x * N) {
    store_chunk<Student, N>(gradient, vocab, first, out);
  }
}

// What the divergence of a row comes to, and the parts that its gradient is made of.
struct SparseValue {
  LogSoftmax q;
  float divergence, g_kept, g_bucket, r;
};

__device__ inline SparseValue sparse_value(const KeptShared& kept, const SparseDivergenceArguments& a,
                                           const SparseInputs& in, const SparseStatistics& s, SparseScratch& scratch) {
  const float scale = static_cast<float>(kLog2E) * a.loss.inverse_temperature;
  const bool over_kept = a.tail == Tail::kRenormalize;
  const LogSoftmax q = LogSoftmax::of(over_kept ? s.on : s.all, scale);
  const float log2_norm = over_kept ? s.teacher.maximum + log2f(s.teacher.sum) : 0.0f;
  const float inverse_shares = a.tail == Tail::kSampled ? 1 / s.shares : 1.0f;
  const Term<float> sum = kept_sums(kept, a, q, log2_norm, inverse_shares, in.parameters, scratch);
  const float log2_r = s.off.log2_share(s.all, scale);
  const KeptForm form = static_cast<KeptForm>(a.form);
  const Term<float> bucket =
      bucket_term(form, a.tail, in.tail_logprob * static_cast<float>(kLog2E), log2_r, in.parameters);
  const RowParameters<float> row = in.parameters;
  const float constant = with_form(form, row, [=](auto terms) { return terms.constant(row); });
  return {q, sum.value + bucket.value + constant, sum.g, bucket.g, exp2_fast(log2_r)};
}

// Blocks of whole warps; dynamic shared memory of staged_chunks * 16 bytes and KeptShared::bytes; grid.x = rows. Two
// blocks to a multiprocessor: left to itself ptxas makes room for three on sm_100 and spills.
template <class Student>
__global__ void __launch_bounds__(kSparseBlockThreads, 2) sparse_divergence_kernel(const SparseDivergenceArguments a) {
  constexpr int N = StudentRow<Student>::N;
  __shared__ SparseScratch scratch;
  extern __shared__ uint4 slots[];
  const int64_t row = blockIdx.x;
  Student* gradient = a.gradient ? static_cast<Student*>(a.gradient) + a.gradient_rows.offset(row) : nullptr;
  const LogitRow<Student, N> logits(a.student, a.student_rows.offset(row), a.student_vocab, ElementType{});
  const int phase = phase_of<Student, N>(gradient ? gradient : logits.row);

  const auto constant_row = [&](float value) {
    if (threadIdx.x == 0) a.loss.values[row] = value;
    if (gradient) fill_chunks(gradient, a.student_vocab, phase, value);
  };
  if (gradient) fill_entries(gradient, a.student_vocab, a.gradient_vocab, 0.0f);
  const SparseInputs in(a, row);
  const bool skipped = in.skipped(a.loss);
  if (skipped || !in.legal(a)) return constant_row(skipped ? 0.0f : NAN);

  const StudentRow<Student> student(logits, phase, slots, a.staged_chunks);
  const KeptShared kept(slots + a.staged_chunks, a);
  load_kept(kept, a, row);
  __syncthreads();
  insert_kept(kept, a);
  __syncthreads();
  const float drawn = gather_kept(kept, a, logits, phase);
  const float label_logit = a.loss.ce_weight != 0 ? logits.entry(static_cast<int>(in.label)) : 0.0f;
  __syncthreads();

  const SparseStatistics s = sparse_statistics(student, kept, a, drawn, scratch);
  const bool kept_legal = a.tail == Tail::kRenormalize ? s.on.sum > 0 && s.teacher.sum > 0 : true;
  const bool drawn_legal = a.tail == Tail::kSampled ? s.shares > 0 : s.shares >= 0;  // false for NaN
  if (!(s.all.sum > 0) || !kept_legal || !drawn_legal) return constant_row(NAN);

  const SparseValue value = sparse_value(kept, a, in, s, scratch);
  const LogSoftmax unit = LogSoftmax::of(s.unit, static_cast<float>(kLog2E));
  const float cross_entropy = -unit(label_logit) * static_cast<float>(kLn2);
  const RowLoss<float> loss = RowLoss<float>::of(a.loss, in.weight, in.cap, value.divergence, cross_entropy);
  if (loss.value != loss.value || !gradient) return constant_row(loss.value);

  if (threadIdx.x == 0) a.loss.values[row] = loss.value;
  const SparseGradient term(a, s, value.q, unit, value.r, value.g_kept, value.g_bucket, loss);
  student.second_visit([&](int chunk, const float (&z)[N]) {
    float out[N];
    term.off_kept(z, out);
    store_chunk<Student, N>(gradient, a.student_vocab, student.first_entry(chunk), out);
  });
  __syncthreads();
  put_right(a, kept, term, in.label, label_logit, phase, gradient);
}

}  // namespace distillm
