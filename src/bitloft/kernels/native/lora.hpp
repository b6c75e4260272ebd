// One piece of multi_lora: up to LORA_ROWS rows that take the same blocks, with its buffers.
#pragma once

#include <cstdint>

#include "bitloft.h"

namespace bl {

constexpr int64_t LORA_CHUNK = 64;  // values that a kernel handles at once; buffers are padded to whole chunks
constexpr int LORA_ROWS = 4;        // the most rows of a tile

struct LoraTile {
  int rows;                  // 1 .. LORA_ROWS
  const void* x[LORA_ROWS];  // [columns] of x_dtype each
  void* out[LORA_ROWS];      // [out_columns] of out_dtype each
  int32_t x_dtype, out_dtype;
  int64_t columns, out_columns;
  bool accumulate;                     // add to what `out` holds
  const bl_blocks* shared;             // of all rows, or nullptr
  const bl_blocks* own;                // of these rows' adapter, or nullptr
  float *wide_x, *wide_out, *products;  // [LORA_ROWS, padded columns], [LORA_ROWS, padded out_columns], [most components, 2 * LORA_ROWS + 1]
};

inline int64_t padded(int64_t columns) { return (columns + LORA_CHUNK - 1) / LORA_CHUNK * LORA_CHUNK; }

}  // namespace bl
