// The row kernels on several threads at once, as parallel_for runs them: the same bits as on one thread. Meant for
// ThreadSanitizer. Links the row kernels, no torch library.
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "../cpu/instruction_sets/instruction_set.h"
#include "../cpu/instruction_sets/row_kernels.h"
#include "check.h"

using namespace distillm;

namespace {

constexpr int kThreads = 4, kRows = 24;
constexpr const char* kNames[] = {"forward_kl", "skew_kl",     "generalized_js",
                                  "alpha_beta", "adaptive_kl", "interpolated"};

// One call over float logits; in place where `gradient` is the student itself.
struct Problem {
  int64_t vocab;
  std::vector<float> student, teacher, gradient, loss, metrics;
  std::vector<int64_t> labels;

  explicit Problem(int64_t vocab)
      : vocab(vocab),
        student(kRows * vocab),
        teacher(kRows * vocab),
        gradient(kRows * vocab),
        loss(kRows),
        metrics(kRows * kMetrics),
        labels(kRows) {
    std::mt19937 generator(static_cast<unsigned>(vocab));
    std::normal_distribution<float> normal(0, 3);
    for (float& x : student) x = normal(generator);
    for (float& x : teacher) x = normal(generator);
    for (int row = 0; row < kRows; ++row) labels[row] = row % 5 == 3 ? -100 : row % vocab;
  }

  DivergenceCall call(const char* name, bool in_place) {
    const RowLayout rows = RowLayout::uniform(vocab);
    DivergenceCall call{};
    call.student = student.data();
    call.teacher = teacher.data();
    call.student_type = call.teacher_type = ScalarType::Float;
    call.rows = kRows;
    call.student_vocab = call.teacher_vocab = call.gradient_vocab = vocab;
    call.student_rows = call.teacher_rows = call.gradient_rows = rows;
    call.labels = labels.data();
    call.loss = loss.data();
    call.gradient = in_place ? student.data() : gradient.data();
    call.metrics = metrics.data();
    call.options.divergence = name;
    call.options.alpha = 0.4;
    call.options.beta = 0.5;
    call.options.temperature = 1.5;
    call.options.ce_weight = 0.3;
    call.options.ignore_index = -100;
    return call;
  }
};

// Rows are dealt out in turns, so that neighbours belong to different threads.
void run_threaded(DivergenceRows rows, const DivergenceCall& call) {
  std::vector<std::thread> threads;
  for (int thread = 0; thread < kThreads; ++thread) {
    threads.emplace_back([&, thread] {
      for (int row = thread; row < kRows; row += kThreads) rows(call, row, row + 1);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

void check_same(const std::vector<float>& found, const std::vector<float>& expected) {
  CHECK(!std::memcmp(found.data(), expected.data(), found.size() * sizeof(float)));
}

void test_threads_agree(const RowKernels& kernels, const char* name, int64_t vocab, bool in_place) {
  Problem alone(vocab), threaded(vocab);
  const DivergenceRows rows = kernels.divergence(name, false);
  rows(alone.call(name, in_place), 0, kRows);
  run_threaded(rows, threaded.call(name, in_place));
  check_same(threaded.loss, alone.loss);
  check_same(threaded.metrics, alone.metrics);
  check_same(in_place ? threaded.student : threaded.gradient, in_place ? alone.student : alone.gradient);
}

}  // namespace

int main() {
  for (const InstructionSet& set : supported_instruction_sets()) {
    for (const char* name : kNames) {
      // The scratch memory of the first thread grows, and is reused where the vocabulary shrinks.
      for (int64_t vocab : {37, 2500, 1024}) {
        for (bool in_place : {false, true}) test_threads_agree(*set.kernels, name, vocab, in_place);
      }
    }
  }
  return report("threaded_divergence");
}
