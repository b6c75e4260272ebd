// Huge pages for codes that have been arranged: reading them then misses the translation buffers less.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace bl {

// Asks the kernel for huge pages where whole ones lie inside `bytes` at `memory`. Contents stay as they are; where the kernel
// will not (none to be had, or switched off), the pages do too.
inline void ask_for_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t HUGE = uintptr_t{1} << 21;
  constexpr int COLLAPSE = 25;  // MADV_COLLAPSE, since Linux 6.1: now, not when a daemon comes by
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + HUGE - 1) / HUGE * HUGE;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + static_cast<uintptr_t>(bytes)) / HUGE * HUGE;
  if (begin >= end) return;
  if (madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE) == 0) madvise(reinterpret_cast<void*>(begin), end - begin, COLLAPSE);
#endif
}

}  // namespace bl
