// A packed matrix as the native side sees it: its check, and small questions about it.
#pragma once

#include <cstdint>

#include "bitloft.h"

namespace bl {

// 0, or -1 after fail(): all part sizes against rows, columns and format.
int check(const bl_matrix* matrix);

// Bits that one stored zero point takes.
int64_t zero_bits(const bl_matrix& matrix);

}  // namespace bl
