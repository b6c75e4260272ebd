// y = x W^T + bias + addend for packed matrices that share an input: the shape of a call, checked and cut into blocks.
#pragma once

#include <cstdint>

#include "bitloft.h"

namespace bl {

// Whether the kernels of packed_linear read this matrix: codes of 1 to 4 bits whose groups fill whole words.
bool multiplies(const bl_matrix& matrix);

}  // namespace bl
