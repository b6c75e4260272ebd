// Huge pages for codes that have been arranged: reading them then misses the translation buffers less.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace bl {

// Asks the kernel for huge pages where `bytes` at `memory` lie. Contents stay as they are; where the kernel will not (none to be
// had, switched off, or not all of a huge page is this process's), the pages do too. The first and the last may hold what lies
// beside the codes: other weights, as a rule, and a hint changes nothing for them either. Less than SMALL is not worth a page.
inline void ask_for_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t HUGE = uintptr_t{1} << 21;
  constexpr int COLLAPSE = 25;  // MADV_COLLAPSE, since Linux 6.1: now, not when a daemon comes by
  constexpr int64_t SMALL = 1 << 18;
  if (bytes < SMALL) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory) / HUGE * HUGE;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + static_cast<uintptr_t>(bytes) + HUGE - 1) / HUGE * HUGE;
  for (uintptr_t at = begin; at < end; at += HUGE) {  // one by one: a page that cannot be does not stop the others
    void* const page = reinterpret_cast<void*>(at);
    if (madvise(page, HUGE, MADV_HUGEPAGE) == 0) madvise(page, HUGE, COLLAPSE);
  }
#endif
}

}  // namespace bl
