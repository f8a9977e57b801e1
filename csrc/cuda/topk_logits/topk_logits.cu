// `topk_logits` on CUDA: one block per row; a launch covers T = 1 and up to three other temperatures.
#include <algorithm>

#include "../../ops/topk_logits.h"
#include "../row/launch.h"
#include "draw_logits.cuh"
#include "topk_logits.cuh"

namespace distillm {
namespace {

struct Launch {
  TopkLogitsArguments arguments;
  int slots;
};

template <class T, int kSlots>
void launch_slots(const TopkLogitsArguments& a, int64_t rows, const DeviceScope& device) {
  const bool sample = a.position != nullptr;
  const int64_t in_shared = a.workspace ? 0 : a.capacity;
  const int64_t entries = segment_entries(a.vocab, 16 / sizeof(T)), segments = (a.vocab + entries - 1) / entries;
  const int64_t bytes = sample ? DrawMemory<kSlots>::bytes(in_shared, segments) : 8 * in_shared;
  const auto kernel = sample ? draw_logits_kernel<T, kSlots> : topk_logits_kernel<T, kSlots>;
  const int threads = sample || a.k <= 256 ? kDrawThreads : 1024;
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
  kernel<<<static_cast<unsigned>(rows), threads, bytes, device.stream()>>>(a);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <class T>
void launch_type(const Launch& launch, int64_t rows, const DeviceScope& device) {
  if (launch.slots == 1) return launch_slots<T, 1>(launch.arguments, rows, device);
  if (launch.slots == 2) return launch_slots<T, 2>(launch.arguments, rows, device);
  launch_slots<T, 4>(launch.arguments, rows, device);
}

void launch(const Launch& launch, const TopkLogitsCall& call, const DeviceScope& device) {
  switch (element_type(call.type)) {
    case ElementType::kBFloat16: return launch_type<BFloat16>(launch, call.rows, device);
    case ElementType::kHalf: return launch_type<Half>(launch, call.rows, device);
    default: return launch_type<float>(launch, call.rows, device);
  }
}

// Candidates that a row has room for, a power of two: more than k by at least a block's threads, so that a threshold
// can be raised at any time, and than the groups of the first threshold.
int32_t candidate_capacity(int64_t k, bool sample) {
  if (!sample && k <= 1024) return k <= 64 ? 1024 : k <= 256 ? 2048 : 4096;
  const int64_t wanted = sample ? std::max<int64_t>(k, 2) : 2 * (k + 1024);
  int64_t capacity = 2;
  while (capacity < wanted) capacity *= 2;
  return static_cast<int32_t>(capacity);
}

TopkLogitsArguments arguments_of(const TopkLogitsCall& call) {
  TopkLogitsArguments a{};
  a.logits = call.logits;
  a.stride = call.stride;
  a.vocab = static_cast<int32_t>(call.vocab);
  a.k = static_cast<int32_t>(call.k);
  a.labels = call.labels;
  a.position = call.position;
  a.seed = call.seed;
  a.ids = call.ids;
  a.logprobs = static_cast<float*>(call.logprobs);
  a.log_norm = static_cast<float*>(call.log_norm);
  a.tail_logprob = static_cast<float*>(call.tail_logprob);
  a.label_logprob = static_cast<float*>(call.label_logprob);
  a.valid = call.valid;
  a.counts = call.counts;
  a.capacity = candidate_capacity(call.k, call.position != nullptr);
  a.temperature_count = call.temperature_count;
  return a;
}

// The outputs from `first` on that one launch can cover.
Launch next_launch(const TopkLogitsCall& call, TopkLogitsArguments a, int first) {
  int slots = 1, output = first;
  for (float& inverse : a.inverse_temperature) inverse = 1;
  for (; output < call.temperature_count; ++output) {
    const double temperature = call.temperatures[output];
    if (temperature == 1) continue;
    if (slots == kMaxSlots) break;
    a.inverse_temperature[slots] = static_cast<float>(1 / temperature);
    a.slot_of_output |= static_cast<uint64_t>(slots++) << (4 * (output - first));
  }
  a.first_output = first;
  a.output_count = output - first;
  return {a, slots};
}

struct Cuda {
  static void run(const TopkLogitsTensors& t, const TopkLogitsCall& call) {
    if (call.rows == 0) return;
    check_grid(call.rows, call.vocab);
    const DeviceScope device(t.logits);
    TopkLogitsArguments a = arguments_of(call);
    Tensor workspace = t.ids;  // kept until the launches are queued
    if (call.k > 1024) {       // more candidates than shared memory holds
      const int64_t words = static_cast<int64_t>(a.capacity) * (call.position ? 2 : 1);
      workspace = torch::stable::new_empty(t.ids, {call.rows, words}, ScalarType::Long);
      a.workspace = static_cast<uint64_t*>(workspace.data_ptr());
    }
    for (int first = 0; first < call.temperature_count;) {
      const Launch next = next_launch(call, a, first);
      launch(next, call, device);
      first += next.arguments.output_count;
    }
  }
};

}  // namespace
}  // namespace distillm

STABLE_TORCH_LIBRARY_IMPL(distillm_ext, CUDA, m) {
  m.impl("topk_logits", TORCH_BOX(&distillm::topk_logits<distillm::Cuda>));
}
