// `sample_tokens` on CUDA: one block per row, or a cluster of blocks where one has not room for the row.
#include "../../ops/sample_tokens.h"
#include "../row/cluster_launch.h"
#include "../row/plan_cache.h"
#include "sample_plan.h"
#include "sample_tokens.cuh"

namespace distillm {
namespace {

struct SampleKernel {
  void (*function)(SampleArguments);
  int chunk_entries;
};

template <class T>
SampleKernel instantiated() {
  return {sample_tokens_kernel<T>, SampleRow<T>::N};
}

SampleKernel kernel_for(ScalarType type) {
  switch (element_type(type)) {
    case ElementType::kBFloat16: return instantiated<BFloat16>();
    case ElementType::kHalf: return instantiated<Half>();
    default: return instantiated<float>();
  }
}

int64_t bitmap_bytes(const SampleCall& call) {
  return call.previous || call.banned ? int64_t{4} * bitmap_words(static_cast<int>(call.vocab)) : 0;
}

// Asks the device what it takes, and readies the kernel for any plan: shared memory may grow to all that a block can
// have.
Planned<SamplePlan> planned(const SampleKernel& kernel, int64_t chunks, int64_t bitmaps, const DeviceScope& device) {
  cudaFuncAttributes attributes;
  STD_CUDA_CHECK(cudaFuncGetAttributes(&attributes, kernel.function));
  const int64_t dynamic =
      device.attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - static_cast<int64_t>(attributes.sharedSizeBytes);
  STD_TORCH_CHECK(dynamic >= bitmaps, "previous_tokens and banned need ", bitmaps,
                  " bytes of shared memory for this vocabulary, more than a block has on this device");
  STD_CUDA_CHECK(
      cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(dynamic)));
  return planned_to_fit(kernel.function, attributes, device, [&](int64_t most) {
    const SamplePlan plan = plan_sample(chunks, (dynamic - bitmaps) / 16, bitmaps, most);
    return Planned<SamplePlan>{plan, plan.dynamic_bytes(bitmaps)};
  });
}

void launch(const SampleTensors& t, const DeviceScope& device) {
  static PlanCache<Planned<SamplePlan>, int64_t, int64_t> plans;  // by the number of chunks and the size of the bitmaps
  const SampleKernel kernel = kernel_for(t.type);
  const int64_t chunks = most_chunks(static_cast<int>(t.call.vocab), kernel.chunk_entries);
  const int64_t bitmaps = bitmap_bytes(t.call);
  const auto made = plans.of(device.index(), reinterpret_cast<const void*>(kernel.function), chunks, bitmaps,
                             [&] { return planned(kernel, chunks, bitmaps, device); });
  check_grid(t.call.rows * made.plan.cluster, t.call.vocab);
  const SampleArguments arguments{t.call, static_cast<int32_t>(made.plan.staged_chunks)};
  launch_rows(kernel.function, made, t.call.rows, arguments, device);
}

struct Cuda {
  static void run(const SampleTensors& t) {
    if (t.call.rows > 0) launch(t, DeviceScope(t.in.logits));
  }
};

}  // namespace
}  // namespace distillm

STABLE_TORCH_LIBRARY_IMPL(distillm_ext, CUDA, m) {
  m.impl("sample_tokens", TORCH_BOX(&distillm::sample_tokens<distillm::Cuda>));
}
