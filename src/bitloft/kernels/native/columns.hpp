// Products with trellis codes that run down the columns of a matrix (kernels/columnwise.py), sixty-four rows at a time.
//
// What a column has of sixty-four rows is eight bytes of each plane. The kernels of AVX-512 take eight columns at once, a cell:
//
//   [planes][8 bytes of rows][8 columns]      one line of 64 bytes for each plane
//
// so that whole numbers of the input, one byte a column, meet the levels of one row in eight neighbouring bytes. Arranged, the cells
// of sixty-four rows follow each other, [rows / 64][columns / 8], behind them what is left of each column in the order of the file; so do the scales, [groups][64].
#pragma once

#include <cstdint>

#include "bitloft.h"
#include "product.hpp"

namespace bl {

constexpr int64_t CELL = 8;   // columns of a cell
constexpr int64_t LINE = 64;  // bytes that a plane of it takes

// Where a row of sixty-four stands among the sums that dot products with cells leave, and among arranged scales: two rows of each byte
// beside each other.
inline int64_t paired(int64_t row) { return row % 8 / 2 * 16 + row / 8 * 2 + row % 2; }

inline bool by_column(const bl_matrix& m) { return (m.flags & BL_COLUMNS) != 0; }

// Bytes of one plane of a column.
inline int64_t plane_bytes(const bl_matrix& m) { return (m.rows + 7) / 8; }

// Columns that are summed as whole numbers before a scale is applied: a group, or PIECE of it at most.
struct Pieces {
  int64_t columns, group;

  int64_t cells() const { return (columns + CELL - 1) / CELL; }
  int64_t of_group() const { return (group + PIECE - 1) / PIECE; }
  int64_t count() const { return (columns + group - 1) / group * of_group(); }
  // Columns of a piece that are there, from its first one on; a group's last pieces may be empty.
  int64_t begin(int64_t piece) const { return piece / of_group() * group + piece % of_group() * PIECE; }
  int64_t size(int64_t piece) const {
    const int64_t first = begin(piece), end = (piece / of_group() + 1) * group;
    const int64_t left = (end < columns ? end : columns) - first;
    return left < 0 ? 0 : left < PIECE ? left : PIECE;
  }
};

// One row of the input: as float32, zeros behind, or in `digits` bytes, of which there are 1 to 3 (then a step for each piece and two
// numbers that its sums start from, in this order behind them).
struct ColumnInput {
  const void* x;
  int32_t dtype;
  Pieces pieces;
  int digits;  // 0: float32
  char* out;

  static int64_t steps_at(const Pieces& p, int digits) { return p.cells() * CELL * digits; }
  static int64_t starts_at(const Pieces& p, int digits) { return steps_at(p, digits) + p.count() * 4; }
  static int64_t bytes(const Pieces& p, int digits) {
    return digits == 0 ? p.cells() * CELL * 4 : starts_at(p, digits) + p.count() * 8;
  }
};

// Blocks of sixty-four rows of the matrix, from `row` on, times some rows of the input: piece by piece, so that a column's bytes are
// read while they are near where they lie as in the file.
struct ColumnProduct {
  const bl_matrix* matrix;
  int64_t row, blocks;
  int digits;
  int64_t inputs;
  const char* x;
  int64_t stride;          // bytes from input to input
  const float* scales;     // [blocks][groups][64], or nullptr where they are
  const uint16_t* halves;  // fp16 [blocks][groups][64], to be multiplied by
  float unit;              // a power of two
  bool in_pairs;           // the order of scales
  float* totals;           // [blocks][inputs][64], added to
  float* room;             // as many

  ColumnProduct block(int64_t b) const {
    ColumnProduct one = *this;
    const int64_t groups = b * matrix->groups * BLOCK, sums = b * inputs * BLOCK;
    one.row += b * BLOCK, one.blocks = 1, one.halves += groups, one.totals += sums, one.room += sums;
    if (scales != nullptr) one.scales += groups;
    return one;
  }
};

// Some columns of one group to numbers, `rows` of each from `row` on.
struct ColumnTile {
  const bl_matrix* matrix;
  int64_t first, count;  // columns
  int64_t row, rows;
  int32_t dtype;
  char* out;
  int64_t stride;  // values from column to column
};

// Sixty-four rows to cells in place of the codes that `codes` holds, or back; `copy` are all codes as they were.
struct ColumnMove {
  const bl_matrix* matrix;
  int64_t block;
  const uint8_t* copy;
  uint8_t* codes;
  bool back;
};

}  // namespace bl
