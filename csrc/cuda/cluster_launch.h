// Launches of blocks that share a row: in clusters, or in teams where there are none (cluster.cuh).
#pragma once

#include <algorithm>

#include "cluster.cuh"
#include "launch.h"

namespace distillm {

// Clusters need a device that has them and code compiled for one: PTX of an older architecture knows of none.
inline int64_t most_blocks_of_cluster(const cudaFuncAttributes& kernel, const DeviceScope& device) {
  return kernel.ptxVersion >= 90 && device.attribute(cudaDevAttrClusterLaunch) ? kMaxCluster : 1;
}

// Code for older architectures knows of teams.
inline bool works_in_teams(const cudaFuncAttributes& kernel, const DeviceScope& device) {
  return kernel.ptxVersion < 90 && device.attribute(cudaDevAttrCooperativeLaunch);
}

// Of either.
inline int64_t most_blocks_of_row(const cudaFuncAttributes& kernel, const DeviceScope& device) {
  return works_in_teams(kernel, device) ? kMaxCluster : most_blocks_of_cluster(kernel, device);
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

 protected:
  cudaLaunchAttribute attribute_ = {};
  cudaLaunchConfig_t config_ = {};
};

// A cooperative launch of `teams` teams of `size` blocks, and the memory in which they meet. It is torch's, and may be
// used again once the kernel is on the stream.
class TeamLaunch : public ClusterLaunch {
 public:
  // mailbox_bytes: of the kernel's static shared memory; like: any tensor on the device.
  TeamLaunch(int64_t size, int64_t teams, int64_t threads, int64_t dynamic_bytes, int64_t mailbox_bytes,
             const Tensor& like, cudaStream_t stream)
      : ClusterLaunch(size, teams, threads, dynamic_bytes, stream) {
    attribute_.id = cudaLaunchAttributeCooperative;
    attribute_.val.cooperative = 1;
    config_.numAttrs = 1;
    const int64_t counters = (teams * int64_t{sizeof(uint32_t)} + 15) / 16 * 16;
    bytes_ = torch::stable::new_empty(like, {counters + 2 * teams * size * mailbox_bytes}, ScalarType::Byte);
    unsigned char* const first = static_cast<unsigned char*>(bytes_.data_ptr());
    STD_CUDA_CHECK(cudaMemsetAsync(first, 0, static_cast<size_t>(counters), stream));
    memory_ = {first + counters, reinterpret_cast<uint32_t*>(first), static_cast<int32_t>(size),
               static_cast<int32_t>(teams)};
  }
  TeamMemory memory() const { return memory_; }

  // The most teams that are resident at once, as all of a launch have to be; 0: not even one.
  template <class Function>
  static int64_t most(Function* function, int64_t size, int64_t threads, int64_t dynamic_bytes,
                      const DeviceScope& device) {
    int blocks = 0;
    STD_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, function, static_cast<int>(threads),
                                                                 static_cast<size_t>(dynamic_bytes)));
    return int64_t{blocks} * device.attribute(cudaDevAttrMultiProcessorCount) / size;
  }

 private:
  Tensor bytes_;
  TeamMemory memory_ = {};
};

// A plan for one launch, which has `cluster`, the blocks of a row, and `threads`.
template <class Plan>
struct Planned {
  Plan plan;
  int64_t dynamic_bytes;  // shared memory of a block
  int64_t teams;          // the most of one launch; 0: it is none of teams
};

// plan_with(most blocks of a row) -> Planned without its teams: the first one that the device can hold, from
// most_blocks_of_row down.
template <class Function, class PlanWith>
auto planned_to_fit(Function* function, const cudaFuncAttributes& attributes, const DeviceScope& device,
                    const PlanWith& plan_with) {
  for (int64_t most = most_blocks_of_row(attributes, device);; most /= 2) {
    auto made = plan_with(most);
    const auto& plan = made.plan;
    if (plan.cluster > 1 && works_in_teams(attributes, device)) {
      made.teams = TeamLaunch::most(function, plan.cluster, plan.threads, made.dynamic_bytes, device);
      if (made.teams > 0) return made;
    } else if (ClusterLaunch(plan.cluster, 1, plan.threads, made.dynamic_bytes, device.stream()).fits(function)) {
      return made;
    }
  }
}

// Launches function(arguments_with(memory of the teams)) over all rows. mailbox_bytes, like: as for TeamLaunch.
template <class Arguments, class Plan, class ArgumentsWith>
void launch_rows(void (*function)(Arguments), const Planned<Plan>& made, int64_t rows, int64_t mailbox_bytes,
                 const Tensor& like, const DeviceScope& device, const ArgumentsWith& arguments_with) {
  const auto launch = [&](const ClusterLaunch& way, const TeamMemory& teams) {
    STD_CUDA_CHECK(cudaLaunchKernelEx(way.config(), function, arguments_with(teams)));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  };
  const auto& [plan, bytes, most_teams] = made;
  if (most_teams > 0) {
    const TeamLaunch teams(plan.cluster, std::min(rows, most_teams), plan.threads, bytes, mailbox_bytes, like,
                           device.stream());
    launch(teams, teams.memory());
  } else {
    launch(ClusterLaunch(plan.cluster, rows, plan.threads, bytes, device.stream()), {nullptr, nullptr, 1, 0});
  }
}

}  // namespace distillm
