// Products with a plain float32 matrix: what dense.cpp hands to the kernel of one instruction set.
#pragma once

#include <cstdint>

namespace bl {

constexpr int64_t DENSE_LANES = 16;  // columns are a multiple of it

// out[r, o] = sum_i x[r, i] weight[o, i] for all rows and the outputs first .. first + count - 1.
struct Dense {
  const float* x;       // [rows, columns]
  const float* weight;  // [outputs, columns]
  float* out;           // [rows, outputs]
  int64_t rows, columns, outputs, first, count;
};

}  // namespace bl
