// One block of packed_linear: sixty-four rows of a packed matrix times some rows of the input. With one row of input and
// 4 bits two blocks run beside each other: the sums of one alone would wait for their own latency.
//
// Codes of the sixty-four rows are interleaved in words of 32 bits, [units][words][64]: a unit is what fills whole words,
//
//   bits      1    2    4    3
//   columns  32   16    8   32
//   words     1    1    1    3
//
// so that sixteen rows lie in the lanes of a register. In a word of 1, 2 or 4 bits the codes follow each other; three
// words of 3 bits hold the codes of columns i and i + 16 at bits 3j and 16 + 3j of word i / 5, j = i % 5, and those of
// columns 15 and 31 in the bits 15 and 31 that the three words leave. In all widths a word shifted right by bits * j has
// two codes of a unit, half a unit apart, at the bottom of its two halves: a pair, looked up at once in bfloat16.
#pragma once

#include <cstdint>

namespace bl {

constexpr int64_t BLOCK = 64;   // rows of a matrix that lie beside each other
constexpr int64_t PIECE = 256;  // the most columns that are summed before a scale is applied

constexpr int64_t unit_columns(int bits) { return bits == 3 ? 32 : 32 / bits; }
constexpr int64_t unit_words(int bits) { return bits == 3 ? 3 : 1; }

// How the input is prepared: in the order of pairs, columns i and i + half a unit beside each other, zeros at the end.
enum class Input {
  SINGLE,  // float32
  PAIRS,   // bfloat16
  SUMS,    // one row; 1 and 2 bits: for each four bits of codes the sixteen sums that they may stand for
  BYTES,   // one row: the same sums (products, with 3 bits) as whole numbers, their bytes in planes (product_bytes.cpp)
  QUADS,   // 8 bits, a scale for each row (product_bytes.cpp)
};

// One row of the input, as it came and as it is wanted.
struct Preparation {
  Input input;
  int bits;
  int32_t dtype;
  const void* x;
  int64_t columns, units;
  const float* levels;  // for SUMS and BYTES
  int planes;           // for BYTES: 2 or 3 bytes for each sum
  float* steps;         // for BYTES: what 1 stands for, one for each piece
  void* out;
  float* sums;  // of the values in each group, or nullptr
  int64_t groups, group_columns;
};

// Totals of a block to their place in the output.
struct Finish {
  const float* totals;  // [rows][64]
  int64_t rows, columns;
  void* out;
  int64_t stride;  // values from row to row
  int32_t dtype;
};

struct Product {
  int bits;
  Input input;
  int64_t rows;          // of the input
  int64_t blocks;        // 1, or 2 with one row and 4 bits: all that is said of a block follows a second time
  int64_t groups;        // that have a scale of their own; 1 for a scale a row, or none
  int64_t group_units;
  const uint32_t* codes;
  int planes;            // of BYTES
  const float* steps;    // of BYTES
  const float* levels;   // 2**bits
  const float* scales;   // [groups][64], or nullptr where they are
  const uint16_t* halves;  // fp16 [groups][64], to be multiplied by
  float unit;              // a power of two
  const float* offsets;  // [groups][64] or nullptr: added group_sum times
  const void* x;
  int64_t x_stride;      // words of 32 bits from row to row
  const float* sums;     // [rows][groups]: of the input's values in a group; used with offsets
  float* totals;         // [rows][64], added to
  const char* next;      // the scales of the block behind, fetched while this one is multiplied, or nullptr
  int64_t next_bytes;    // of them for each group
  void* tile;            // room for PIECE * 64 values, for many rows
};

}  // namespace bl
