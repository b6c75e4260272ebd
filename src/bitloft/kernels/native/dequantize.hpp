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

// x - row, without the row itself being written.
struct ResidualRow {
  const bl_matrix* matrix;
  const float* levels;
  int64_t row;
  const float* x;
  float* out;      // matrix->columns numbers, or nullptr: only the sum is wanted; may be x
  double* square;  // the sum of their squares is written
};

}  // namespace bl
