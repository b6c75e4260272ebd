// y = x W^T + bias + addend where the codes of W run down its columns: a part of bl_packed_linear.
#pragma once

#include <cstdint>

#include "bitloft.h"

namespace bl {

struct Kernels;

// Rows `row` to `row + rows` of a call whose products all have such weights; `tame`: these rows fit digits.
void multiply_columns(const Kernels& table, const bl_input& x, int64_t row, int64_t rows, bool tame, const bl_product* products, int64_t count,
                      int32_t flags, int threads);

// Whether bl_arrange takes this matrix: on AVX-512, columns that fill cells.
bool can_arrange_columns(const Kernels& table, const bl_matrix& matrix);

// Codes and scales (or nullptr) of such a matrix to the other order or back.
int arrange_columns(const Kernels& table, const bl_matrix& matrix, uint8_t* codes, uint16_t* scales, bool back, int threads);

}  // namespace bl
