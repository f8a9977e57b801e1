#include "gradient_memory.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <vector>

#include "huge_pages.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Part of torch's stable C interface from 2.11 on; null under 2.10, where gradients come from torch's allocator.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides, int64_t storage_offset, int32_t dtype,
    int32_t device_type, int32_t device_index, AtenTensorHandle* result, int32_t layout, const uint8_t* opaque_metadata,
    int64_t opaque_metadata_size, void (*deleter)(void* data, void* context), void* context);

namespace distillm {
namespace {

// Below this the system's allocator recycles by itself.
constexpr int64_t kSmallest = int64_t{4} << 20;

struct Block {
  Tensor owner;  // of torch's allocator, so that its profiler and hooks see the memory
  int64_t bytes;
};

int64_t kept_limit() {
  const char* text = std::getenv("DISTILLM_CPU_CACHE_MIB");
  if (!text) return int64_t{1024} << 20;
  char* end = nullptr;
  const long long mib = std::strtoll(text, &end, 10);
  STD_TORCH_CHECK(end != text && *end == 0 && mib >= 0 && mib < (1 << 30),
                  "DISTILLM_CPU_CACHE_MIB must be a whole number of MiB, 0 to keep nothing, got '", text, "'");
  return static_cast<int64_t>(mib) << 20;
}

// Batches differ a little in length: sizes in steps of an eighth of their power of two, so that their gradients fit the
// same block. Pages that are never written cost nothing.
int64_t rounded(int64_t bytes) {
  int64_t power = kSmallest;
  while (power * 2 <= bytes) power *= 2;
  const int64_t step = power / 8;
  return (bytes + step - 1) / step * step;
}

class GradientMemory {
 public:
  Block take(int64_t bytes, const Tensor& like) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto fits = best_fit(bytes);
      if (fits != kept_.end()) {
        Block block = std::move(*fits);
        kept_.erase(fits);
        kept_bytes_ -= block.bytes;
        return block;
      }
    }
    const int64_t size = rounded(bytes);
    Block block{torch::stable::new_empty(like, {size}, ScalarType::Byte), size};
    prefer_huge_pages(block.owner.data_ptr(), size);
    return block;
  }

  void give_back(Block block) {
    lend_to_the_kernel(block.owner.data_ptr(), block.bytes);
    std::vector<Block> dropped;  // freed after the lock
    const std::lock_guard<std::mutex> lock(mutex_);
    kept_bytes_ += block.bytes;
    kept_.push_back(std::move(block));
    size_t oldest = 0;
    while (kept_bytes_ > limit_) kept_bytes_ -= kept_[oldest++].bytes;
    dropped.assign(std::make_move_iterator(kept_.begin()), std::make_move_iterator(kept_.begin() + oldest));
    kept_.erase(kept_.begin(), kept_.begin() + oldest);
  }

  int64_t release() {
    std::vector<Block> dropped;
    const std::lock_guard<std::mutex> lock(mutex_);
    dropped.swap(kept_);
    return std::exchange(kept_bytes_, 0);
  }

 private:
  // The smallest block that holds `bytes`; one of more than twice the size would be wasted on them.
  std::vector<Block>::iterator best_fit(int64_t bytes) {
    auto best = kept_.end();
    for (auto block = kept_.begin(); block != kept_.end(); ++block) {
      const bool fits = block->bytes >= bytes && block->bytes <= 2 * rounded(bytes);
      if (fits && (best == kept_.end() || block->bytes < best->bytes)) best = block;
    }
    return best;
  }

  std::mutex mutex_;
  std::vector<Block> kept_;  // oldest first
  int64_t kept_bytes_ = 0;
  const int64_t limit_ = kept_limit();
};

// Never destroyed: gradients may outlive every static object.
GradientMemory& memory() {
  static GradientMemory* const the_one = new GradientMemory;
  return *the_one;
}

void return_block(void*, void* context) {
  const std::unique_ptr<Block> block(static_cast<Block*>(context));
  memory().give_back(std::move(*block));
}

}  // namespace

Tensor recycled_empty_like(const Tensor& like) {
  const auto sizes = like.sizes();
  const int64_t bytes = like.numel() * like.element_size();
  if (!torch_from_blob || bytes < kSmallest) {
    Tensor fresh = torch::stable::new_empty(like, sizes);
    prefer_huge_pages(fresh.data_ptr(), bytes);
    return fresh;
  }
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size() - 1; i > 0; --i) strides[i - 1] = strides[i] * sizes[i];
  auto block = std::make_unique<Block>(memory().take(bytes, like));
  int32_t dtype, layout;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(like.get(), &layout));
  AtenTensorHandle result;
  TORCH_ERROR_CODE_CHECK(torch_from_blob(block->owner.data_ptr(), sizes.size(), sizes.data(), strides.data(), 0, dtype,
                                         aoti_torch_device_type_cpu(), -1, &result, layout, nullptr, 0, return_block,
                                         block.get()));
  block.release();
  return Tensor(result);
}

int64_t release_gradient_memory() { return memory().release(); }

}  // namespace distillm

STABLE_TORCH_LIBRARY_IMPL(distillm_ext, CompositeExplicitAutograd, m) {
  m.impl("release_gradient_memory", TORCH_BOX(&distillm::release_gradient_memory));
}
