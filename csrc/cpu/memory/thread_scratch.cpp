#include "thread_scratch.h"

#include <cstdlib>
#include <memory>
#include <new>

namespace distillm {

void* thread_scratch(int64_t bytes) {
  static thread_local std::unique_ptr<void, decltype(&std::free)> memory(nullptr, &std::free);
  static thread_local int64_t held = 0;
  if (bytes > held) {
    held = (bytes + 4095) / 4096 * 4096;
    memory.reset(std::aligned_alloc(4096, held));
    if (!memory) throw std::bad_alloc();
  }
  return memory.get();
}

}  // namespace distillm
