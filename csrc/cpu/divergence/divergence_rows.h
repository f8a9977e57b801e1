// Divergence and gradient of a range of rows on one thread. Included once per instruction set, by row_kernel_list.h.
//
// Three passes over a row, tile by tile (divergence_passes.h):
//   1. both sides: exponentials relative to the largest logit so far, kept in scratch, and their sums (online softmax);
//   2. value and sum of G: probabilities are exponentials times one factor per tile; G takes the teacher's place in
//   scratch;
//   3. gradient: (1) of math/divergence.h from G and the student's exponentials, written once.
// The logits come from memory once. Scratch is two rows of the arithmetic type per thread; it replaces the logits in
// the cache, and no exponential, logarithm or division is computed twice. Metrics come along with 1.
#pragma once

#include <cstring>
#include <utility>

#include "../../math/row_divergence.h"
#include "../../math/row_loss.h"
#include "../instruction_sets/row_kernels.h"
#include "../memory/thread_scratch.h"
#include "adaptive_head.h"
#include "blended_row.h"
#include "divergence_passes.h"

namespace distillm {
inline namespace DISTILLM_ISA {

template <class Real>
Real entry_or(const void* values, int64_t row, double fallback) {
  return values ? static_cast<const Real*>(values)[row] : static_cast<Real>(fallback);
}

template <class Real>
LogitRow<Real> logit_row(const void* data, ScalarType type, int64_t offset, int64_t vocab) {
  return {static_cast<const char*>(data) + offset * bytes_of(type), type, vocab};
}

template <class Real>
CrossEntropy<Real> cross_entropy_of(const DivergenceCall& call, int64_t row, const LogitRow<Real>& student,
                                    const Softmax<Real>& q) {
  const Real weight = static_cast<Real>(call.options.ce_weight);
  if (weight == 0) return {0, 0, q, false};
  const bool own = call.options.temperature != 1;
  return {weight, call.labels[row], own ? softmax_of(student, static_cast<Real>(kLog2E)) : q, own};
}

// Cross-entropy in nats, NaN for a label outside the vocabulary.
template <class Real>
Real cross_entropy_value(const CrossEntropy<Real>& ce, const LogitRow<Real>& student) {
  if (ce.weight == 0) return 0;
  if (ce.label < 0 || ce.label >= student.vocab) return std::numeric_limits<Real>::quiet_NaN();
  Real buffer[1];
  const Real z = *student.tile(ce.label, 1, buffer);
  return -ce.softmax.log2_probability(z) * static_cast<Real>(kLn2);
}

// One row as the kernel sees it, with its place in scratch memory.
template <class Real>
struct RowTask {
  const DivergenceCall& call;
  int64_t index;
  LogitRow<Real> student, teacher;
  int64_t vocab;  // of the wider side
  Real weight, cap;
  RowParameters<Real> parameters;
  const OutputRow<Real>* output;  // of the gradient, null when it is not asked for
  Exponentials<Real> q, p;
  void* spare;  // as many bytes as the member asked for

  Real scale() const { return static_cast<Real>(kLog2E / call.options.temperature); }
  RowLoss<Real> loss(Real divergence, Real cross_entropy) const {
    return RowLoss<Real>::of(LossScalars<Real>::of(call.options), weight, cap, divergence, cross_entropy);
  }
  Real* metrics() const { return call.metrics ? static_cast<Real*>(call.metrics) + index * kMetrics : nullptr; }
};

template <class Real>
RowTask<Real> row_task(const DivergenceCall& call, int64_t row, const OutputRow<Real>* output) {
  return {call,
          row,
          logit_row<Real>(call.student, call.student_type, call.student_rows.offset(row), call.student_vocab),
          logit_row<Real>(call.teacher, call.teacher_type, call.teacher_rows.offset(row), call.teacher_vocab),
          call.student_vocab > call.teacher_vocab ? call.student_vocab : call.teacher_vocab,
          entry_or<Real>(call.weight, row, 1),
          entry_or<Real>(call.cap, row, std::numeric_limits<double>::infinity()),
          RowParameters<Real>::of(call.options, static_cast<const Real*>(call.alpha), row),
          output,
          {},
          {},
          nullptr};
}

// Two rows of exponentials, their tile factors and spare bytes in this thread's scratch memory.
template <class Real>
void take_scratch(RowTask<Real>& task, int64_t spare_bytes) {
  constexpr int64_t kAlign = 64 / sizeof(Real);
  const int64_t padded = (task.vocab + kAlign - 1) / kAlign * kAlign;
  const int64_t tiles = (task.vocab + kTile - 1) / kTile, padded_tiles = (tiles + kAlign - 1) / kAlign * kAlign;
  Real* data = static_cast<Real*>(thread_scratch(2 * (padded + padded_tiles) * sizeof(Real) + spare_bytes));
  task.q = {data, data + 2 * padded};
  task.p = {data + padded, data + 2 * padded + padded_tiles};
  task.spare = data + 2 * (padded + padded_tiles);
}

template <class Real>
struct RowSoftmaxes {
  Softmax<Real> q, p;
};

// Pass 1, and the metrics where they are asked for.
template <class Real>
RowSoftmaxes<Real> row_softmaxes(const RowTask<Real>& task) {
  SideMetrics<Real> student{0, 0}, teacher{0, 0};
  Real* out = task.metrics();
  const Softmax<Real> q = exponentials_of(task.student, task.vocab, task.scale(), task.q, out ? &student : nullptr);
  const Softmax<Real> p = exponentials_of(task.teacher, task.vocab, task.scale(), task.p, out ? &teacher : nullptr);
  if (out) {
    out[0] = teacher.entropy;
    out[1] = student.entropy;
    out[2] = teacher.top == student.top ? Real(1) : Real(0);
  }
  return {q, p};
}

template <class Real>
void write_gradient(const RowTask<Real>& task, const Real* g, const CrossEntropy<Real>& ce, Real sum_g,
                    const RowLoss<Real>& loss) {
  const Real q_scale = (g ? -loss.g_scale * sum_g : Real(0)) + (ce.own_softmax ? Real(0) : loss.ce_scale);
  GradientPass<Real>{task.student, task.q, g, ce, {loss.g_scale, q_scale, loss.ce_scale}}.write(*task.output);
}

// Passes 2 and 3: returns the loss of the row and writes its gradient where there is an output. `teacher` is the row
// that the teacher's exponentials are of; `legal`: whether the row's hyper-parameters are in range.
template <class Real, class Functor, class TeacherRow>
Real finish_row(const RowTask<Real>& task, const TeacherRow& teacher, const RowSoftmaxes<Real>& softmaxes,
                Functor functor, bool legal) {
  const RowPass<Real, Functor, TeacherRow> row{
      task.student, teacher, task.q, task.p, {softmaxes.q, softmaxes.p, functor}};
  const CrossEntropy<Real> ce = cross_entropy_of(task.call, task.index, task.student, softmaxes.q);
  const Real cross_entropy = cross_entropy_value(ce, task.student);
  const Term<double> sums = task.output ? row.template sums<true>() : row.template sums<false>();
  RowLoss<Real> loss = task.loss(static_cast<Real>(sums.value), cross_entropy);
  const bool usable = softmaxes.q.usable() && softmaxes.p.usable() && legal && task.cap >= 0;
  if (!usable) loss.value = std::numeric_limits<Real>::quiet_NaN();
  if (!task.output) return loss.value;
  if (loss.value != loss.value || (loss.constant && loss.ce_scale == 0)) {
    fill_row(*task.output, 0, task.student.vocab, loss.value != loss.value ? loss.value : Real(0));
  } else {
    write_gradient(task, loss.constant ? nullptr : task.p.values, ce, static_cast<Real>(sums.g), loss);
  }
  return loss.value;
}

// A divergence that is a functor per entry. AtZero: what it is where its alpha is 0.
template <class Real, class Functor, class AtZero>
struct EntrywiseMember {
  static Real loss(RowTask<Real>& task) {
    take_scratch(task, 0);
    const RowSoftmaxes<Real> softmaxes = row_softmaxes(task);
    const bool legal = Functor::legal(task.parameters);
    return task.parameters.alpha == 0 ? finish_row(task, task.teacher, softmaxes, AtZero(task.parameters), legal)
                                      : finish_row(task, task.teacher, softmaxes, Functor(task.parameters), legal);
  }
};

// interpolated: forward KL from the blended row, which takes the teacher's place once the metrics have seen it.
template <class Real>
struct InterpolatedMember {
  static Real loss(RowTask<Real>& task) {
    take_scratch(task, 0);
    RowSoftmaxes<Real> softmaxes =
        task.metrics() ? row_softmaxes(task)
                       : RowSoftmaxes<Real>{exponentials_of(task.student, task.vocab, task.scale(), task.q), {}};
    const BlendedRow<Real> roughly(task.student, softmaxes.q.maximum, task.teacher, task.parameters.alpha);
    softmaxes.p = exponentials_of(roughly, task.vocab, task.scale(), task.p);
    const BlendedRow<Real> blended = roughly.around(softmaxes.p.maximum);
    if (blended.precise) softmaxes.p = exponentials_of(blended, task.vocab, task.scale(), task.p);
    return finish_row(task, blended, softmaxes, ForwardKl<Real>(task.parameters),
                      in_unit_interval(task.parameters.alpha));
  }
};

// adaptive_kl: the share of each direction comes from the teacher's head.
template <class Real>
struct AdaptiveMember {
  static Real loss(RowTask<Real>& task) {
    take_scratch(task, HeadCandidates<Real>::bytes(task.vocab));
    const RowSoftmaxes<Real> softmaxes = row_softmaxes(task);
    const bool legal = in_unit_interval(task.parameters.alpha);
    if (legal && softmaxes.q.usable() && softmaxes.p.usable()) {
      task.parameters.beta = share(task, softmaxes.p);
    }
    // A direction without a share is left out: it may be infinite.
    const RowParameters<Real>& parameters = task.parameters;
    if (parameters.beta == 0) return finish_row(task, task.teacher, softmaxes, ForwardKl<Real>(parameters), legal);
    if (parameters.beta == 1) return finish_row(task, task.teacher, softmaxes, ReverseKl<Real>(parameters), legal);
    return finish_row(task, task.teacher, softmaxes, SymmetricKl<Real>(parameters), legal);
  }

  static Real share(const RowTask<Real>& task, const Softmax<Real>& p) {
    const double mu = task.call.alpha ? static_cast<double>(task.parameters.alpha) : task.call.options.alpha;
    const Threshold<Real> head =
        head_threshold(task.teacher, p, mu, HeadCandidates<Real>::in(task.spare, task.teacher.vocab));
    const HeadDistance<double> distance = head_distance(task.teacher, task.vocab, task.p, task.q, head);
    return static_cast<Real>(adaptive_share(distance.head, distance.tail));
  }
};

template <class Real>
void leave_out(const RowTask<Real>& task) {
  if (task.output) fill_row(*task.output, 0, task.student.vocab, Real(0));
  for (int64_t i = 0; task.metrics() && i < kMetrics; ++i) task.metrics()[i] = 0;
}

template <class Real, class Member>
void divergence_rows(const DivergenceCall& call, int64_t begin, int64_t end) {
  Real* loss = static_cast<Real*>(call.loss);
  for (int64_t row = begin; row < end; ++row) {
    char* gradient = static_cast<char*>(call.gradient);
    if (gradient) gradient += call.gradient_rows.offset(row) * bytes_of(call.student_type);
    const OutputRow<Real> output{gradient, call.student_type};
    RowTask<Real> task = row_task<Real>(call, row, gradient ? &output : nullptr);
    const bool left_out = task.weight == 0 || (call.labels && call.labels[row] == call.options.ignore_index);
    if (left_out) leave_out(task);
    loss[row] = left_out ? Real(0) : Member::loss(task);
    if (gradient) fill_row(output, call.student_vocab, call.gradient_vocab, Real(0));
    for (int64_t i = 0; call.metrics && loss[row] != loss[row] && i < kMetrics; ++i) task.metrics()[i] = loss[row];
  }
}

template <template <class> class Member>
DivergenceRows rows_of_member(bool float64) {
  return float64 ? divergence_rows<double, Member<double>> : divergence_rows<float, Member<float>>;
}

// The kernel for a divergence's public name, or null.
inline DivergenceRows find_divergence_rows(const char* name, bool float64) {
#define DISTILLM_MATCH(public_name, Functor, AtZero, Any)                                              \
  if (!strcmp(name, public_name)) {                                                                    \
    return float64 ? divergence_rows<double, EntrywiseMember<double, Functor<double>, AtZero<double>>> \
                   : divergence_rows<float, EntrywiseMember<float, Functor<float>, AtZero<float>>>;    \
  }
  DISTILLM_FOR_EACH_DIVERGENCE(DISTILLM_MATCH)
#undef DISTILLM_MATCH
  if (!strcmp(name, "interpolated")) return rows_of_member<InterpolatedMember>(float64);
  if (!strcmp(name, "adaptive_kl")) return rows_of_member<AdaptiveMember>(float64);
  return nullptr;
}

}  // namespace DISTILLM_ISA
}  // namespace distillm
