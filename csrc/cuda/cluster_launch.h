// Launches with a cluster of blocks per row.
#pragma once

#include "cluster.cuh"
#include "launch.h"

namespace distillm {

// Clusters need a device that has them and code compiled for one: PTX of an older architecture knows of none. 12.0
// and later are launched without: there a cluster is one block.
inline int64_t most_blocks_of_cluster(const cudaFuncAttributes& kernel, const DeviceScope& device) {
  const int major = device.attribute(cudaDevAttrComputeCapabilityMajor);
  const bool has_clusters = major >= 9 && major < 12 && device.attribute(cudaDevAttrClusterLaunch);
  return has_clusters && kernel.ptxVersion >= 90 ? kMaxCluster : 1;
}

// A launch configuration. The attribute lives here since the configuration points to it.
class ClusterLaunch {
 public:
  ClusterLaunch(int64_t cluster, int64_t rows, int64_t threads, int64_t dynamic_bytes, cudaStream_t stream) {
    cluster_.id = cudaLaunchAttributeClusterDimension;
    cluster_.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    config_.gridDim = dim3(static_cast<unsigned>(rows * cluster));
    config_.blockDim = dim3(static_cast<unsigned>(threads));
    config_.dynamicSmemBytes = static_cast<size_t>(dynamic_bytes);
    config_.stream = stream;
    config_.attrs = &cluster_;
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
  cudaLaunchAttribute cluster_ = {};
  cudaLaunchConfig_t config_ = {};
};

}  // namespace distillm
