// Launch plans, remembered. Host code without CUDA or torch, so that it can be tested alone.
#pragma once

#include <cstddef>
#include <map>
#include <mutex>
#include <tuple>

namespace distillm {

// The plans made so far, by device, kernel and whatever else of a call they depend on: a launch of a kind that was
// there before asks the driver nothing. Any thread may ask.
template <class Plan, class... Kind>
class PlanCache {
 public:
  // make() is called where there is no plan yet; what it throws is passed on, and nothing kept.
  template <class Make>
  Plan of(int device, const void* kernel, Kind... kind, const Make& make) {
    const Key key{device, kernel, kind...};
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = plans_.find(key);
    if (found != plans_.end()) return found->second;
    const Plan plan = make();
    if (plans_.size() == kMost) plans_.clear();
    return plans_.emplace(key, plan).first->second;
  }

 private:
  using Key = std::tuple<int, const void*, Kind...>;
  static constexpr std::size_t kMost = 1024;
  std::mutex mutex_;
  std::map<Key, Plan> plans_;
};

}  // namespace distillm
