// `divergence` on CUDA: chooses the kernel of this divergence and pair of dtypes and launches one cluster of blocks per
// row.
#include <algorithm>
#include <map>
#include <mutex>
#include <tuple>

#include "divergence_kernels.cuh"
#include "divergence_plan.h"
#include "launch.h"

namespace distillm {
namespace {

DivergenceShape shape_of(const DivergenceKernel& kernel, const DivergenceCall& call, int64_t vocab) {
  return {most_chunks(static_cast<int>(vocab), kernel.chunk_entries), kernel.slot_bytes, kernel.kept_bytes,
          call.gradient != nullptr, kernel.static_bytes};
}

// Clusters need a device that has them and code compiled for one: PTX of an older architecture knows of none. 12.0
// and later are launched without: there a cluster is one block.
int64_t most_blocks_of_cluster(const cudaFuncAttributes& kernel, const DeviceScope& device) {
  const int major = device.attribute(cudaDevAttrComputeCapabilityMajor);
  const bool has_clusters = major >= 9 && major < 12 && device.attribute(cudaDevAttrClusterLaunch);
  return has_clusters && kernel.ptxVersion >= 90 ? kMaxCluster : 1;
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

// The launch configuration of a plan. The attribute lives here since the configuration points to it.
class Launch {
 public:
  Launch(const DivergencePlan& plan, int64_t rows, int64_t dynamic_bytes, cudaStream_t stream) {
    cluster_.id = cudaLaunchAttributeClusterDimension;
    cluster_.val.clusterDim = {static_cast<unsigned>(plan.cluster), 1, 1};
    config_.gridDim = dim3(static_cast<unsigned>(rows * plan.cluster));
    config_.blockDim = dim3(static_cast<unsigned>(plan.threads));
    config_.dynamicSmemBytes = static_cast<size_t>(dynamic_bytes);
    config_.stream = stream;
    config_.attrs = &cluster_;
    config_.numAttrs = plan.cluster > 1 ? 1 : 0;
  }
  Launch(const Launch&) = delete;
  Launch& operator=(const Launch&) = delete;
  const cudaLaunchConfig_t* config() const { return &config_; }

 private:
  cudaLaunchAttribute cluster_ = {};
  cudaLaunchConfig_t config_ = {};
};

// Whether the device can hold a cluster of this plan at all: a part of it (MIG) may have too few multiprocessors.
bool fits(const DivergenceKernel& kernel, const Launch& launch) {
  int clusters = 0;
  STD_CUDA_CHECK(cudaOccupancyMaxActiveClusters(&clusters, kernel.function, launch.config()));
  return clusters > 0;
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
    const Launch launch(plan, 1, plan.dynamic_bytes(shape), device.stream());
    if (plan.cluster == 1 || fits(kernel, launch)) return plan;
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
  const Launch launch(plan, call.rows, plan.dynamic_bytes(shape), device.stream());
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
