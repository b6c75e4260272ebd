// Sixty-four rows of a packed matrix as the kernels of packed_linear want them: codes interleaved (product.hpp), scales
// and offsets turned so that sixteen rows lie beside each other.
#pragma once

#include <cstdint>

#include "bitloft.h"

namespace bl {

struct Block {
  const bl_matrix* matrix;
  int64_t row;   // the first
  int64_t rows;  // 1 to 64; what is missing to 64 counts as rows of code 0 and scale 0 (whole blocks, to be arranged)
};

// Whether the rows of a matrix fill whole units, so that sixty-four of them can trade places in the same memory.
inline bool can_arrange(const bl_matrix& m) {
  return m.bits <= 4 && !(m.flags & BL_TRELLIS) && m.width % (m.bits == 3 ? 32 : 32 / m.bits) == 0;
}

// Whether its scales are arranged with the codes: those that are plain halves, one or more for a row.
inline bool scales_arranged(const bl_matrix& m) { return m.groups > 0 && !(m.flags & (BL_DQ | BL_TENSOR)); }

}  // namespace bl
