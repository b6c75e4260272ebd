// One row of a packed matrix on its way to numbers: what dequantize.cpp hands to the kernel of one instruction set.
#pragma once

#include <cstdint>

#include "bitloft.h"

namespace bl {

struct DequantizeRow {
  const bl_matrix* matrix;
  const float* levels;  // sixteen, those of the codes first; unused for 8 and 16 bits
  int64_t row;
  int32_t dtype;
  void* out;  // matrix->columns numbers
};

}  // namespace bl
