// `sample_tokens` on CUDA: one block per row, or a cluster of blocks where one has not room for the row.
#include "../ops/sample_tokens.h"
#include "cluster_launch.h"
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

void launch(const SampleTensors& t, const DeviceScope& device) {
  const SampleKernel kernel = kernel_for(t.type);
  const int vocab = static_cast<int>(t.call.vocab);
  const int64_t chunks = most_chunks(vocab, kernel.chunk_entries);
  const int64_t bitmaps = t.call.previous || t.call.banned ? int64_t{4} * bitmap_words(vocab) : 0;
  const int64_t room =
      device.attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - static_cast<int64_t>(sizeof(SampleScratch)) - bitmaps;
  STD_TORCH_CHECK(room >= 0, "previous_tokens and banned need ", bitmaps,
                  " bytes of shared memory for this vocabulary, more than a block has on this device");
  cudaFuncAttributes attributes;
  STD_CUDA_CHECK(cudaFuncGetAttributes(&attributes, kernel.function));
  for (int64_t most = most_blocks_of_cluster(attributes, device);; most /= 2) {
    const SamplePlan plan = plan_sample(chunks, room / 16, bitmaps, most);
    const int64_t shared_bytes = bitmaps + 16 * plan.staged_chunks;
    check_grid(t.call.rows * plan.cluster, vocab);
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(shared_bytes)));
    const ClusterLaunch launch(plan.cluster, t.call.rows, plan.threads, shared_bytes, device.stream());
    if (!launch.fits(kernel.function)) continue;
    const SampleArguments arguments{t.call, static_cast<int32_t>(plan.staged_chunks)};
    STD_CUDA_CHECK(cudaLaunchKernelEx(launch.config(), kernel.function, arguments));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    return;
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sample_tokens(
    const Tensor& logits, const std::optional<Tensor>& temperature_rows, const std::optional<Tensor>& top_k_rows,
    const std::optional<Tensor>& top_p_rows, const std::optional<Tensor>& min_p_rows,
    const std::optional<Tensor>& penalty_rows, const std::optional<Tensor>& seed_rows,
    const std::optional<Tensor>& position_rows, const std::optional<Tensor>& previous,
    const std::optional<Tensor>& banned, const std::optional<Tensor>& bits, double temperature, int64_t top_k,
    double top_p, double min_p, double penalty, int64_t seed, int64_t position) {
  const DeviceScope device(logits);
  const SampleTensors t = prepare_sample({logits, temperature_rows, top_k_rows, top_p_rows, min_p_rows, penalty_rows,
                                          seed_rows, position_rows, previous, banned, bits},
                                         temperature, top_k, top_p, min_p, penalty, seed, position);
  if (t.call.rows > 0) launch(t, device);
  return t.outputs();
}

}  // namespace
}  // namespace distillm

STABLE_TORCH_LIBRARY_IMPL(distillm_ext, CUDA, m) { m.impl("sample_tokens", TORCH_BOX(&distillm::sample_tokens)); }
