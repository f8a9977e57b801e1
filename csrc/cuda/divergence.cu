// `divergence` on CUDA: chooses the kernel of this divergence and pair of dtypes and launches one cluster of blocks per
// row.
#include <algorithm>
#include <map>
#include <mutex>
#include <tuple>

#include "cluster_launch.h"
#include "divergence_kernels.cuh"
#include "divergence_plan.h"

namespace distillm {
namespace {

DivergenceShape shape_of(const DivergenceKernel& kernel, const DivergenceCall& call, int64_t vocab) {
  return {most_chunks(static_cast<int>(vocab), kernel.chunk_entries), kernel.slot_bytes, kernel.kept_bytes,
          call.gradient != nullptr, kernel.static_bytes};
}

DeviceLimits limits_of(const cudaFuncAttributes& kernel, const DeviceScope& device) {
  return {device.attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
          device.attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
          device.attribute(cudaDevAttrReservedSharedMemoryPerBlock), most_blocks_of_cluster(kernel, device)};
}

DivergenceArguments arguments_of(const DivergenceCall& call, const DivergencePlan& plan) {
  const DivergenceOptions& options = call.options;
  return {call.student,
          call.teacher,
          call.gradient,
          call.student_rows,
          call.teacher_rows,
          call.gradient_rows,
          static_cast<int32_t>(call.student_vocab),
          static_cast<int32_t>(call.teacher_vocab),
          static_cast<int32_t>(call.gradient_vocab),
          element_type(call.teacher_type),
          static_cast<int32_t>(plan.staged_turns),
          static_cast<int32_t>(plan.kept_turns),
          call.labels,
          static_cast<const float*>(call.weight),
          static_cast<const float*>(call.alpha),
          static_cast<const float*>(call.cap),
          static_cast<float*>(call.loss),
          static_cast<float*>(call.metrics),
          options.ignore_index,
          static_cast<float>(options.alpha),
          static_cast<float>(options.beta),
          static_cast<float>(1 / options.temperature),
          static_cast<float>(options.ce_weight),
          options.detach_mixture};
}

// Asks the device what it takes, and readies the kernel for any plan: shared memory may grow to all that a block can
// have.
DivergencePlan planned(const DivergenceKernel& kernel, const DivergenceShape& shape, const DeviceScope& device) {
  cudaFuncAttributes attributes;
  STD_CUDA_CHECK(cudaFuncGetAttributes(&attributes, kernel.function));
  DeviceLimits limits = limits_of(attributes, device);
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(limits.block_bytes - attributes.sharedSizeBytes)));
  for (;; limits.cluster /= 2) {
    const DivergencePlan plan = plan_divergence(shape, limits);
    const ClusterLaunch launch(plan.cluster, 1, plan.threads, plan.dynamic_bytes(shape), device.stream());
    if (launch.fits(kernel.function)) return plan;
  }
}

// The plans made so far: a launch of a kind that was there before asks the driver nothing.
class Plans {
 public:
  DivergencePlan of(const DivergenceKernel& kernel, const DivergenceShape& shape, const DeviceScope& device) {
    const Key key{device.index(), reinterpret_cast<const void*>(kernel.function), shape.chunks, shape.keeps};
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = plans_.find(key);
    if (found != plans_.end()) return found->second;
    const DivergencePlan plan = planned(kernel, shape, device);
    if (plans_.size() == kMost) plans_.clear();
    return plans_.emplace(key, plan).first->second;
  }

 private:
  using Key = std::tuple<int, const void*, int64_t, bool>;  // device, kernel, chunks, whether G is kept
  static constexpr size_t kMost = 1024;
  std::mutex mutex_;
  std::map<Key, DivergencePlan> plans_;
};

void launch(const DivergenceKernel& kernel, const DivergenceCall& call, const DeviceScope& device) {
  static Plans plans;
  const int64_t vocab = std::max(call.student_vocab, call.teacher_vocab);
  const DivergenceShape shape = shape_of(kernel, call, vocab);
  const DivergencePlan plan = plans.of(kernel, shape, device);
  check_grid(call.rows * plan.cluster, vocab);
  const ClusterLaunch launch(plan.cluster, call.rows, plan.threads, plan.dynamic_bytes(shape), device.stream());
  STD_CUDA_CHECK(cudaLaunchKernelEx(launch.config(), kernel.function, arguments_of(call, plan)));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void run(const DivergenceTensors& t, const DeviceScope& device) {
  const bool one_type = t.call.student_type == t.call.teacher_type;
  const DivergenceKernel kernel =
      one_type ? divergence_kernel_of_one_type(t.call) : divergence_kernel_of_two_types(t.call);
  STD_TORCH_CHECK(kernel.function, "divergence '", t.call.options.divergence, "' has no CUDA kernel");
  if (t.call.rows > 0) launch(kernel, t.call, device);
}

std::tuple<Tensor, Tensor, Tensor> divergence(const Tensor& student, const Tensor& teacher,
                                              const std::optional<Tensor>& labels, const std::optional<Tensor>& weight,
                                              const std::optional<Tensor>& alpha_rows, const std::optional<Tensor>& cap,
                                              std::string name, double alpha, double beta, double temperature,
                                              double ce_weight, int64_t ignore_index, bool detach_mixture,
                                              int64_t vocab_size, bool need_gradient, bool need_metrics) {
  const DeviceScope device(student);
  const DivergenceTensors t = prepare_divergence(
      student, teacher, labels, weight, alpha_rows, cap,
      {std::move(name), alpha, beta, temperature, ce_weight, ignore_index, detach_mixture, vocab_size},
      need_gradient ? GradientTo::kNewTensor : GradientTo::kNowhere, need_metrics);
  run(t, device);
  return {t.loss, t.gradient, t.metrics};
}

std::tuple<Tensor, Tensor> divergence_(Tensor student, const Tensor& teacher, const std::optional<Tensor>& labels,
                                       const std::optional<Tensor>& weight, const std::optional<Tensor>& alpha_rows,
                                       const std::optional<Tensor>& cap, std::string name, double alpha, double beta,
                                       double temperature, double ce_weight, int64_t ignore_index, bool detach_mixture,
                                       int64_t vocab_size, bool need_metrics) {
  const DeviceScope device(student);
  const DivergenceTensors t = prepare_divergence(
      student, teacher, labels, weight, alpha_rows, cap,
      {std::move(name), alpha, beta, temperature, ce_weight, ignore_index, detach_mixture, vocab_size},
      GradientTo::kStudent, need_metrics);
  run(t, device);
  return {t.loss, t.metrics};
}

}  // namespace
}  // namespace distillm

STABLE_TORCH_LIBRARY_IMPL(distillm_ext, CUDA, m) {
  m.impl("divergence", TORCH_BOX(&distillm::divergence));
  m.impl("divergence_", TORCH_BOX(&distillm::divergence_));
}
