// Launches of kernels whose rows are worked on by a cluster of blocks each (cluster.cuh).
#pragma once

#include "cluster.cuh"
#include "launch.h"

namespace distillm {

// Clusters need a device that has them and code compiled for one: PTX of an older architecture knows of none.
inline int64_t most_blocks_of_cluster(const cudaFuncAttributes& kernel, const DeviceScope& device) {
  return kernel.ptxVersion >= 90 && device.attribute(cudaDevAttrClusterLaunch) ? kMaxCluster : 1;
}

// A launch configuration. The attribute lives here since the configuration points to it.
class ClusterLaunch {
 public:
  ClusterLaunch(int64_t cluster, int64_t rows, int64_t threads, int64_t dynamic_bytes, cudaStream_t stream) {
    attribute_.id = cudaLaunchAttributeClusterDimension;
    attribute_.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    config_.gridDim = dim3(static_cast<unsigned>(rows * cluster));
    config_.blockDim = dim3(static_cast<unsigned>(threads));
    config_.dynamicSmemBytes = static_cast<size_t>(dynamic_bytes);
    config_.stream = stream;
    config_.attrs = &attribute_;
    config_.numAttrs = cluster > 1 ? 1 : 0;
  }
  ClusterLaunch(const ClusterLaunch&) = delete;
  ClusterLaunch& operator=(const ClusterLaunch&) = delete;
  const cudaLaunchConfig_t* config() const { return &config_; }

  // Whether the device can hold such a cluster at all: a part of it (MIG) may have too few multiprocessors. Always
  // true without clusters.
  template <class Function>
  bool fits(Function* function) const {
    int clusters = 1;
    if (config_.numAttrs > 0) STD_CUDA_CHECK(cudaOccupancyMaxActiveClusters(&clusters, function, &config_));
    return clusters > 0;
  }

 private:
  cudaLaunchAttribute attribute_ = {};
  cudaLaunchConfig_t config_ = {};
};

// A plan for one launch, which has `cluster`, the blocks of a row, and `threads`.
template <class Plan>
struct Planned {
  Plan plan;
  int64_t dynamic_bytes;  // shared memory of a block
};

// plan_with(most blocks of a cluster) -> Planned: the first one that the device can hold, from the largest clusters
// down.
template <class Function, class PlanWith>
auto planned_to_fit(Function* function, const cudaFuncAttributes& attributes, const DeviceScope& device,
                    const PlanWith& plan_with) {
  for (int64_t most = most_blocks_of_cluster(attributes, device);; most /= 2) {
    const auto made = plan_with(most);
    const ClusterLaunch launch(made.plan.cluster, 1, made.plan.threads, made.dynamic_bytes, device.stream());
    if (launch.fits(function)) return made;
  }
}

// Launches a cluster per row.
template <class Arguments, class Plan>
void launch_rows(void (*function)(Arguments), const Planned<Plan>& made, int64_t rows, const Arguments& arguments,
                 const DeviceScope& device) {
  const ClusterLaunch launch(made.plan.cluster, rows, made.plan.threads, made.dynamic_bytes, device.stream());
  STD_CUDA_CHECK(cudaLaunchKernelEx(launch.config(), function, arguments));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace distillm
