// Memory that kernels work in.
#pragma once

#include <cstdint>

namespace distillm {

// At least `bytes` of memory that belong to the calling thread until its next call, aligned to a cache line. Kept from
// call to call, so that kernels allocate nothing.
void* thread_scratch(int64_t bytes);

}  // namespace distillm
