// Operator schemas of namespace `distillm_ext`, and what this build is.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>

#include "cpu/instruction_sets/instruction_set.h"
#include "ops/divergence.h"

#ifndef DISTILLM_TORCH_VERSION
#define DISTILLM_TORCH_VERSION "unknown"
#endif

STABLE_TORCH_LIBRARY(distillm_ext, m) {
  m.def(
      "divergence(Tensor student, Tensor teacher, Tensor? labels, Tensor? weight, Tensor? alpha_rows, Tensor? cap, "
      "str divergence, " DISTILLM_OPTIONS
      ", bool need_gradient, bool need_metrics) -> "
      "(Tensor loss, Tensor gradient, Tensor metrics)");
  m.def(
      "divergence_(Tensor(a!) student, Tensor teacher, Tensor? labels, Tensor? weight, Tensor? alpha_rows, Tensor? "
      "cap, "
      "str divergence, " DISTILLM_OPTIONS ", bool need_metrics) -> (Tensor loss, Tensor metrics)");
  m.def(
      "sparse_divergence(Tensor student, Tensor ids, Tensor logprobs, Tensor log_norm, Tensor tail_logprob, Tensor? "
      "counts, Tensor? labels, Tensor? weight, Tensor? alpha_rows, Tensor? cap, str divergence, str "
      "tail, " DISTILLM_OPTIONS ", int teacher_vocab, bool need_gradient) -> (Tensor loss, Tensor gradient)");
  m.def(
      "sparse_divergence_(Tensor(a!) student, Tensor ids, Tensor logprobs, Tensor log_norm, Tensor tail_logprob, "
      "Tensor? counts, Tensor? labels, Tensor? weight, Tensor? alpha_rows, Tensor? cap, str divergence, str "
      "tail, " DISTILLM_OPTIONS ", int teacher_vocab) -> Tensor loss");
  m.def(
      "logprob_divergence(Tensor student, Tensor teacher, Tensor? weight, str divergence, float beta, float? "
      "probability_floor, bool need_gradient) -> (Tensor loss, Tensor gradient)");
  m.def(
      "topk_logits(Tensor logits, Tensor? labels, Tensor? position, int k, float[] temperatures, int seed) -> (Tensor "
      "ids, Tensor logprobs, Tensor log_norm, Tensor tail_logprob, Tensor label_logprob, Tensor valid, Tensor counts)");
  m.def("scale_rows_(Tensor(a!) gradient, Tensor scale) -> ()");
  m.def("few_rows_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def(
      "pack_logits(Tensor ids, Tensor logprobs, Tensor log_norm, Tensor tail_logprob, Tensor? label_logprob, Tensor "
      "valid, Tensor? counts, int vocab_size, float[] temperatures, str codec) -> Tensor");
  m.def(
      "unpack_logits(Tensor packed, str codec, int k, int vocab_size, float[] temperatures, bool has_labels, bool "
      "has_counts) -> (Tensor ids, Tensor logprobs, Tensor log_norm, Tensor tail_logprob, Tensor label_logprob, Tensor "
      "valid, Tensor counts)");
  m.def(
      "sample_tokens(Tensor logits, Tensor? temperature_rows, Tensor? top_k_rows, Tensor? top_p_rows, Tensor? "
      "min_p_rows, Tensor? penalty_rows, Tensor? seed_rows, Tensor? position_rows, Tensor? previous, Tensor? banned, "
      "Tensor? bits, float temperature, int top_k, float top_p, float min_p, float penalty, int seed, int position) "
      "-> (Tensor token, Tensor logprob, Tensor filtered_logprob, Tensor valid)");
  m.def("release_gradient_memory() -> int");
  m.def("cpu_instruction_set() -> str");
  m.def("torch_version_built() -> str");
}

namespace distillm {
namespace {

std::string cpu_instruction_set() { return instruction_set().name; }
std::string torch_version_built() { return DISTILLM_TORCH_VERSION; }

}  // namespace
}  // namespace distillm

STABLE_TORCH_LIBRARY_IMPL(distillm_ext, CompositeExplicitAutograd, m) {
  m.impl("cpu_instruction_set", TORCH_BOX(&distillm::cpu_instruction_set));
  m.impl("torch_version_built", TORCH_BOX(&distillm::torch_version_built));
}
