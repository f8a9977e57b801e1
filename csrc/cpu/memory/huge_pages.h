// Large fresh buffers cost a page fault per 4 KB when first written, more than the arithmetic that fills them.
#pragma once

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace distillm {

#ifdef __linux__
// Advice on the whole huge pages (2 MB) inside [data, data + bytes). A hint: refusal is harmless.
inline void advise_huge_pages(void* data, int64_t bytes, int advice) {
  constexpr uintptr_t kHugePage = 2u << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) & ~(kHugePage - 1);
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, advice);
}

// Asks for 2 MB pages.
inline void prefer_huge_pages(void* data, int64_t bytes) { advise_huge_pages(data, bytes, MADV_HUGEPAGE); }

// The contents are no longer needed: where memory is short the kernel takes the pages, otherwise they stay mapped.
inline void lend_to_the_kernel(void* data, int64_t bytes) { advise_huge_pages(data, bytes, MADV_FREE); }
#else
inline void prefer_huge_pages(void*, int64_t) {}
inline void lend_to_the_kernel(void*, int64_t) {}
#endif

}  // namespace distillm
