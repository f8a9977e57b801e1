// Divergence from a compressed teacher and gradient of a range of rows on one thread. Included once per instruction
// set, by row_kernel_list.h.
//
// Two passes over the student's row, and K entries:
//   1. exponentials of the entries off S relative to the largest so far, kept in scratch, and their sum; the kept
//      entries are masked in the copy of a tile that holds some, so that the mass off S is a sum of its own terms;
//   -  the kept entries: softmax statistics, terms of the divergence, G;
//   2. gradient: exponentials times one factor per tile, written once, then K entries put right.
// The logits come from memory once. Scratch is one row of the arithmetic type, one bit per entry and five arrays of K.
#pragma once

#include "../divergence/divergence_rows.h"
#include "../instruction_sets/row_kernels.h"
#include "kept_entries.h"

namespace distillm {
inline namespace DISTILLM_ISA {

// The terms of kept entries, from logits and log-probabilities. Like EntryTerm, held by value and used on scalars.
template <class Real, class Kept>
struct KeptTerm {
  Softmax<Real> q_softmax;
  Real log2_norm;  // what S of the teacher is divided by
  Kept terms;

  DISTILLM_HD Real value(Real z, Real log2_p, Real share) const { return terms(entry(z, log2_p), share).value; }
  DISTILLM_HD Real g(Real z, Real log2_p, Real share) const { return terms(entry(z, log2_p), share).g; }

 private:
  DISTILLM_HD Entry<Real> entry(Real z, Real log2_p_of_all) const {
    const Real log2_q = q_softmax.log2_probability(z), log2_p = log2_p_of_all - log2_norm;
    return {log2_p, log2_q, exp2_fast(log2_p), exp2_fast(log2_q)};
  }
};

// Sums of value and G over the kept entries; leaves their G.
template <class Real, class Kept>
Term<double> kept_sums(KeptTerm<Real, Kept> term, const KeptEntries<Real>& kept) {
  Term<double> total{0, 0};
  for (int64_t start = 0; start < kept.count; start += kTile) {
    const int64_t count = kept.count - start < kTile ? kept.count - start : kTile;
    const Real *z = kept.z + start, *log2_p = kept.log2_p + start, *share = kept.share + start;
    Real* out = kept.g + start;
    Real value = 0, g = 0;
#pragma omp simd reduction(+ : value, g)
    for (int64_t i = 0; i < count; ++i) {
      value += term.value(z[i], log2_p[i], share[i]);
      const Real g_i = term.g(z[i], log2_p[i], share[i]);
      g += g_i;
      out[i] = g_i;
    }
    total.value += value;
    total.g += g;
  }
  return total;
}

// The bucket's term: t from the teacher, r from the student. A student without any mass off S is a constant.
template <class Kept>
Term<double> bucket_term(Tail tail, double log2_t, double log2_r, RowParameters<double> row) {
  if constexpr (Kept::kSampled) {
    return {0, 0};
  } else {
    if (tail == Tail::kRenormalize || (tail == Tail::kTruncate && Kept::infinite_without_teacher({}))) return {0, 0};
    const double bounded = at_least(log2_r, kLog2LeastTail), r = exp2_fast(log2_r);
    if (tail == Tail::kTruncate) log2_t = -std::numeric_limits<double>::infinity();
    const Term<double> term = typename Kept::Bucket(row)({log2_t, bounded, exp2_fast(log2_t), r});
    return {term.value, log2_r < kLog2LeastTail ? 0 : term.g};
  }
}

// What the divergence of one row comes to before weight, cap and cross-entropy.
template <class Real>
struct SparseSums {
  Softmax<Real> q;  // of the sides of the divergence: over S alone for Tail::kRenormalize
  double value, g_kept, g_bucket;
  bool usable;
};

template <class Real, class Kept>
SparseSums<Real> sparse_sums(const SparseDivergenceCall& call, int64_t row, const SplitSoftmax<Real>& student,
                             const KeptEntries<Real>& kept, RowParameters<Real> parameters) {
  const bool over_kept = call.tail == Tail::kRenormalize;
  const Softmax<Real> q = (over_kept ? student.on : student.all).softmax();
  const Softmax<Real> p = over_kept ? online_sum_of(kept.log2_p, kept.count, Real(1)).softmax() : Softmax<Real>{};
  const Real log2_norm = over_kept ? p.maximum + p.log2_sum : Real(0);
  const Term<double> sums = kept_sums(KeptTerm<Real, Kept>{q, log2_norm, Kept(parameters)}, kept);
  const double log2_t = static_cast<const Real*>(call.tail_logprob)[row] * kLog2E;
  const Term<double> bucket =
      bucket_term<Kept>(call.tail, log2_t, student.log2_tail(), RowParameters<double>::of(parameters));
  const bool bucket_legal = call.tail != Tail::kBucket || log2_t < std::numeric_limits<double>::infinity();
  const bool drawn = call.tail != Tail::kSampled || kept.count > 0;
  const bool usable = q.usable() && log2_norm == log2_norm && student.all.softmax().usable() && kept.legal &&
                      bucket_legal && drawn && Kept::legal(parameters);
  return {q, sums.value + bucket.value + Kept::constant(parameters), sums.g, bucket.g, usable};
}

// gradient_v = s_v tail off S, s the student's softmax over the entries off S; plus ce softmax_v at T = 1 where the
// cross-entropy has a softmax of its own.
template <class Real>
struct TailPass {
  LogitRow<Real> student;
  Exponentials<Real> tail;
  OnlineSum<Real> off;
  CrossEntropy<Real> ce;
  Real factor, ce_factor;

  void write(const OutputRow<Real>& output) const {
    alignas(64) Real logits[kTile], kept_logits[kTile], gradient[kTile];
    const Real inverse_sum = off.sum > 0 ? static_cast<Real>(1 / off.sum) : Real(0);
    for (int64_t start = 0; start < student.vocab; start += kTile) {
      const int64_t count = student.vocab - start < kTile ? student.vocab - start : kTile;
      const Real relative = exp2_fast((tail.tile_factor[start / kTile] - off.reference) * off.scale);
      Real* out = output.tile(start, gradient);
      const Real* z = ce.own_softmax ? student.tile(start, count, logits) : nullptr;
      if (z == out) z = static_cast<const Real*>(std::memcpy(kept_logits, z, count * sizeof(Real)));
      gradient_tile<Real>(nullptr, tail.values + start, count, {0, factor * (relative * inverse_sum), 0}, out);
      if (z) add_softmax_tile(z, count, ce.softmax, ce_factor, out);
      if (ce.weight != 0 && ce.label >= start && ce.label < start + count) out[ce.label - start] -= ce_factor;
      output.commit(start, count, out);
    }
  }
};

// gradient_i = g_scale (G_i - q_i sum G) + ce_scale (softmax_i at T = 1 - [i = label]) on S.
template <class Real>
void write_kept(const KeptEntries<Real>& kept, const Softmax<Real>& q, const CrossEntropy<Real>& ce, Real g_scale,
                Real sum_g, Real ce_scale, int64_t vocab, const OutputRow<Real>& output) {
  for (int64_t i = 0; i < kept.count; ++i) {
    const int64_t id = kept.ids[i];
    if (id >= vocab) continue;
    Real buffer[1];
    Real* out = output.tile(id, buffer);
    // g_scale is 0 for a constant divergence, whose G may be infinite.
    *out = g_scale == 0 ? Real(0) : g_scale * (kept.g[i] - exp2_fast(q.log2_probability(kept.z[i])) * sum_g);
    if (ce_scale != 0) *out += ce_scale * (exp2_fast(ce.softmax.log2_probability(kept.z[i])) - Real(id == ce.label));
    output.commit(id, 1, out);
  }
}

template <class Real>
void write_sparse_gradient(const RowTask<Real>& task, Tail tail, const SparseScratch<Real>& scratch,
                           const SplitSoftmax<Real>& student, const SparseSums<Real>& sums,
                           const CrossEntropy<Real>& ce, const RowLoss<Real>& loss) {
  const double g_scale = loss.g_scale, ce_scale = loss.ce_scale;
  const double r = std::exp2(student.log2_tail()), sum_g = sums.g_kept + sums.g_bucket;
  // An entry off S has the share s_v of what the bucket has; over S alone there is no bucket.
  double bucket = 0;
  if (!loss.constant && tail != Tail::kRenormalize) bucket = g_scale * (sums.g_bucket - r * sum_g);
  if (!ce.own_softmax) bucket += ce_scale * r;
  TailPass<Real>{task.student, scratch.tail, student.off, ce, static_cast<Real>(bucket), static_cast<Real>(ce_scale)}
      .write(*task.output);
  write_kept(scratch.kept, sums.q, ce, static_cast<Real>(g_scale), static_cast<Real>(sum_g),
             static_cast<Real>(ce_scale), task.student.vocab, *task.output);
}

// One row that is not left out: returns its loss and writes its gradient where there is an output.
template <class Real, class Kept>
Real sparse_divergence_row(const SparseDivergenceCall& call, const RowTask<Real>& task) {
  SparseScratch<Real> scratch = SparseScratch<Real>::of(call);
  collect_kept(call, task.index, task.student, scratch.kept);
  const SplitSoftmax<Real> student(tail_exponentials(task.student, task.scale(), scratch.kept.set, scratch.tail),
                                   online_sum_of(scratch.kept.z, scratch.kept.count, task.scale()));
  const CrossEntropy<Real> ce = cross_entropy_of(task.call, task.index, task.student, student.all.softmax());
  const Real cross_entropy = cross_entropy_value(ce, task.student);
  const SparseSums<Real> sums = sparse_sums<Real, Kept>(call, task.index, student, scratch.kept, task.parameters);
  RowLoss<Real> loss = task.loss(static_cast<Real>(sums.value), cross_entropy);
  if (!sums.usable || !(task.cap >= 0)) loss.value = std::numeric_limits<Real>::quiet_NaN();
  if (!task.output) return loss.value;
  if (loss.value != loss.value || (loss.constant && loss.ce_scale == 0)) {
    fill_row(*task.output, 0, task.student.vocab, loss.value != loss.value ? loss.value : Real(0));
  } else {
    write_sparse_gradient(task, call.tail, scratch, student, sums, ce, loss);
  }
  return loss.value;
}

template <class Real, class Kept, class KeptAtZero>
void sparse_divergence_rows(const SparseDivergenceCall& call, int64_t begin, int64_t end) {
  const DivergenceCall& dense = call.dense;
  Real* loss = static_cast<Real*>(dense.loss);
  for (int64_t row = begin; row < end; ++row) {
    char* gradient = static_cast<char*>(dense.gradient);
    if (gradient) gradient += dense.gradient_rows.offset(row) * bytes_of(dense.student_type);
    const OutputRow<Real> output{gradient, dense.student_type};
    const RowTask<Real> task = row_task<Real>(dense, row, gradient ? &output : nullptr);
    if (task.weight == 0 || (dense.labels && dense.labels[row] == dense.options.ignore_index)) {
      leave_out(task);
      loss[row] = 0;
    } else {
      loss[row] = task.parameters.alpha == 0 ? sparse_divergence_row<Real, KeptAtZero>(call, task)
                                             : sparse_divergence_row<Real, Kept>(call, task);
    }
    if (gradient) fill_row(output, dense.student_vocab, dense.gradient_vocab, Real(0));
  }
}

// The kernel for a divergence's public name and a tail, or null.
inline SparseDivergenceRows find_sparse_divergence_rows(const char* name, Tail tail, bool float64) {
#define DISTILLM_MATCH(public_name, D, Z, Any)                                          \
  if (tail != Tail::kSampled && !strcmp(name, public_name)) {                           \
    return float64 ? sparse_divergence_rows<double, Exact<D, double>, Exact<Z, double>> \
                   : sparse_divergence_rows<float, Exact<D, float>, Exact<Z, float>>;   \
  }
  DISTILLM_FOR_EACH_SPARSE_DIVERGENCE(DISTILLM_MATCH)
#undef DISTILLM_MATCH
#define DISTILLM_MATCH(public_name, D, Z, Any)                            \
  if (tail == Tail::kSampled && !strcmp(name, public_name)) {             \
    return float64 ? sparse_divergence_rows<double, D<double>, Z<double>> \
                   : sparse_divergence_rows<float, D<float>, Z<float>>;   \
  }
  DISTILLM_FOR_EACH_SAMPLED_DIVERGENCE(DISTILLM_MATCH)
#undef DISTILLM_MATCH
  return nullptr;
}

}  // namespace DISTILLM_ISA
}  // namespace distillm
