// One block of packed_linear: sixty-four rows of a packed matrix times some rows of the input. With one row of input two
// blocks of 4 bits run beside each other (the sums of one alone would wait for their own latency), and up to thirty-two of 3
// bits one after the other, piece by piece.
//
// Codes of the sixty-four rows are interleaved in words of 32 bits, [units][words][64]: a unit is what fills whole words,
//
//   bits      1    2    4    3
//   columns  32   16    8   32
//   words     1    1    1    3
//
// so that sixteen rows lie in the lanes of a register. In a word of 1, 2 or 4 bits the codes follow each other. Word w of 3
// bits holds the codes of columns 4w to 4w + 3 at bits 0, 3, 8 and 11, and those of columns 16 later at 16, 19, 24 and 27: two
// in each byte. A fourth such word is what the bytes of the three leave: its bits 2w and 2w + 1 of a byte are bits 6 and 7 of
// that byte in word w. In all widths a word shifted right has two codes of a unit, half a unit apart, at the bottom of its two
// halves: a pair, looked up at once in bfloat16. AVX-512 keeps words of 3 bits in another order: three.hpp.
#pragma once

#include <cstdint>

namespace bl {

constexpr int64_t BLOCK = 64;   // rows of a matrix that lie beside each other
constexpr int64_t PIECE = 256;  // the most columns that are summed before a scale is applied
constexpr int64_t TABLED = 4;   // rows of the input whose tables (Input::TABLES) stay in the first-level cache

constexpr int64_t unit_columns(int bits) { return bits == 3 ? 32 : 32 / bits; }
constexpr int64_t unit_words(int bits) { return bits == 3 ? 3 : 1; }

// How the input is prepared: in the order of pairs, columns i and i + half a unit beside each other, zeros at the end.
enum class Input {
  SINGLE,  // float32
  PAIRS,   // bfloat16
  SUMS,    // one row; 1 and 2 bits: for each four bits of codes the sixteen sums that they may stand for
  BYTES,   // few rows: such sums as whole numbers, their bytes in planes (product_bytes.cpp; 3 bits: product_sixes.cpp)
  TABLES,  // many rows: as BYTES, but as it came: tables are made where they are used
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
  int planes;           // for BYTES (not of 3 bits, which take the row in float32): 2 or 3 bytes for each sum
  float* steps;         // for BYTES: what 1 stands for, one for each piece of the row
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
  int64_t blocks;        // 1, or with one row 2 of 4 bits and more of 3: all that is said of a block follows as often
  int64_t groups;        // that have a scale of their own; 1 for a scale a row, or none
  int64_t group_units;
  const uint32_t* codes;
  int64_t beside, place; // of neighbours (three.hpp) how many there are and which one is the first block; else 1 and 0
  int planes;            // of BYTES; of 3 bits: 3 or 4 digits
  const float* steps;    // of BYTES, but not of 3 bits: [rows][pieces]
  const float* levels;   // 2**bits
  const float* scales;   // [groups][64], or nullptr where they are
  const uint16_t* halves;  // fp16 [groups][64], to be multiplied by
  float unit;              // a power of two
  const float* offsets;  // [groups][64] or nullptr: added group_sum times
  const void* x;
  int64_t x_stride;      // words of 32 bits from row to row
  const Preparation* given;  // TABLES: the first row of the input as it came
  int64_t given_stride;      // bytes from row to row of it
  const float* sums;     // [rows][groups]: of the input's values in a group; used with offsets
  float* totals;         // [rows][64], added to
  const char* next;      // the scales of the block behind, fetched while this one is multiplied, or nullptr
  int64_t next_bytes;    // of them for each group
  void* tile;            // room for PIECE * 64 values, for many rows

  // Where the sixty-four scales of a group begin: those of neighbours lie beside each other as stored, not once turned.
  int64_t scale_at(int64_t group, int64_t block) const {
    return BLOCK * (beside > 1 && scales == nullptr ? group * beside + place + block : block * groups + group);
  }
};

}  // namespace bl
