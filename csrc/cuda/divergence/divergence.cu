// `divergence` on CUDA: chooses the kernel of this divergence and pair of dtypes and launches one cluster of blocks per
// row.
#include <algorithm>
#include <tuple>

#include "../row/cluster_launch.h"
#include "../row/plan_cache.h"
#include "divergence_kernels.h"
#include "divergence_plan.h"

namespace distillm {
namespace {

DivergenceShape shape_of(const DivergenceKernel& kernel, const DivergenceCall& call, int64_t vocab) {
  return {most_chunks(static_cast<int>(vocab), kernel.chunk_entries), kernel.slot_bytes, kernel.kept_bytes,
          call.gradient != nullptr, kernel.static_bytes};
}

// But for the most blocks of a cluster.
DeviceLimits limits_of(const DeviceScope& device) {
  return {device.attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
          device.attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
          device.attribute(cudaDevAttrReservedSharedMemoryPerBlock), 1};
}

DivergenceArguments arguments_of(const DivergenceCall& call, const DivergencePlan& plan) {
  return {call.student,
          call.teacher,
          call.gradient,
          call.student_rows,
          call.teacher_rows,
          call.gradient_rows,
          static_cast<int32_t>(call.student_vocab),
          static_cast<int32_t>(call.teacher_vocab),
          static_cast<int32_t>(call.gradient_vocab),
          element_type(call.student_type),
          element_type(call.teacher_type),
          static_cast<int32_t>(plan.staged_turns),
          static_cast<int32_t>(plan.kept_turns),
          static_cast<float*>(call.metrics),
          LossArguments::of(call)};
}

// Asks the device what it takes, and readies the kernel for any plan: shared memory may grow to all that a block can
// have.
Planned<DivergencePlan> planned(const DivergenceKernel& kernel, const DivergenceShape& shape,
                                const DeviceScope& device) {
  cudaFuncAttributes attributes;
  STD_CUDA_CHECK(cudaFuncGetAttributes(&attributes, kernel.function));
  DeviceLimits limits = limits_of(device);
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(limits.block_bytes - attributes.sharedSizeBytes)));
  return planned_to_fit(kernel.function, attributes, device, [&](int64_t most) {
    limits.cluster = most;
    const DivergencePlan plan = plan_divergence(shape, limits);
    return Planned<DivergencePlan>{plan, plan.dynamic_bytes(shape)};
  });
}

void launch(const DivergenceKernel& kernel, const DivergenceCall& call, const DeviceScope& device) {
  static PlanCache<Planned<DivergencePlan>, int64_t, bool> plans;  // by the number of chunks, and whether G is kept
  const int64_t vocab = std::max(call.student_vocab, call.teacher_vocab);
  const DivergenceShape shape = shape_of(kernel, call, vocab);
  const auto made = plans.of(device.index(), reinterpret_cast<const void*>(kernel.function), shape.chunks, shape.keeps,
                             [&] { return planned(kernel, shape, device); });
  check_grid(call.rows * made.plan.cluster, vocab);
  launch_rows(kernel.function, made, call.rows, arguments_of(call, made.plan), device);
}

DivergenceKernel kernel_of(const DivergenceCall& call) {
  const std::string& name = call.options.divergence;
  if (call.student_type != call.teacher_type) return divergence_kernel_of<AnyElement>(name);
  switch (element_type(call.student_type)) {
    case ElementType::kBFloat16: return divergence_kernel_of<BFloat16>(name);
    case ElementType::kHalf: return divergence_kernel_of<Half>(name);
    default: return divergence_kernel_of<float>(name);
  }
}

struct Cuda {
  static Tensor new_gradient(const Tensor& like) { return torch_empty_like(like); }

  static void run(const DivergenceTensors& t) {
    const DivergenceKernel kernel = kernel_of(t.call);
    STD_TORCH_CHECK(kernel.function, "divergence '", t.call.options.divergence, "' has no CUDA kernel");
    if (t.call.rows > 0) launch(kernel, t.call, DeviceScope(t.student));
  }
};

}  // namespace
}  // namespace distillm

STABLE_TORCH_LIBRARY_IMPL(distillm_ext, CUDA, m) {
  m.impl("divergence", TORCH_BOX(&distillm::DivergenceOps<distillm::Cuda>::divergence));
  m.impl("divergence_", TORCH_BOX(&distillm::DivergenceOps<distillm::Cuda>::divergence_));
}
