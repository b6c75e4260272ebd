// Which instruction set runs: the best that the machine has, or the one that BITLOFT_ISA names.
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "errors.hpp"
#include "kernels.hpp"

namespace bl {
namespace {

thread_local char sentence[512] = "";

#if defined(BL_X86)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16") &&
         __builtin_cpu_supports("gfni") && has_avx2();
}
#endif

struct Choice {
  const Kernels* table;
  bool available;
};

const Kernels* choose() {
  const Choice choices[] = {
#if defined(BL_X86)
      {&kernels_avx512, has_avx512()},
      {&kernels_avx2, has_avx2()},
#endif
      {&kernels_portable, true},
  };
  const char* wanted = std::getenv("BITLOFT_ISA");
  for (const Choice& choice : choices) {
    if (wanted != nullptr && *wanted != '\0' && std::strcmp(wanted, choice.table->name) != 0) continue;
    if (choice.available) return choice.table;
    if (wanted != nullptr && *wanted != '\0') {
      fail("BITLOFT_ISA is %s, which this processor does not have; use portable or leave it out.", wanted);
      return nullptr;
    }
  }
  fail("BITLOFT_ISA is '%s', which this build does not know; use avx512, avx2, portable or plain.", wanted);
  return nullptr;
}

}  // namespace

int fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(sentence, sizeof sentence, format, arguments);
  va_end(arguments);
  return -1;
}

const Kernels* kernels() {
  static const Kernels* const chosen = choose();
  return chosen;
}

}  // namespace bl

extern "C" {

int bl_interface(void) { return BL_INTERFACE; }

const char* bl_error(void) { return bl::sentence; }

const char* bl_isa(void) {
  const bl::Kernels* table = bl::kernels();
  return table == nullptr ? nullptr : table->name;
}
}
