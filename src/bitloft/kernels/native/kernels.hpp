// What one instruction set provides: a table of plain functions, filled by sources that are compiled once per set.
//
// A kernel source wraps everything in `namespace bl::BL_ISA` and neither uses std containers nor algorithms: an inline
// function of the standard library compiled with AVX-512 could be the copy that the linker keeps for all.
// Kernels are serial; who runs which chunk is decided by the sources that are compiled once (linear.cpp, ...).
#pragma once

#include <cstdint>

#include "bitloft.h"

namespace bl {

struct Block;
struct ColumnInput;
struct ColumnMove;
struct ColumnProduct;
struct ColumnTile;
struct Dense;
struct Finish;
struct LoraTile;
struct Preparation;
struct Product;
struct GroupTile;
struct Halves;
struct ScaleBlock;
struct DequantizeRow;
struct ResidualRow;
struct Attention;
struct TrellisRow;

struct Kernels {
  const char* name;
  bool pairs;       // multiplies bfloat16 pairs
  bool two_blocks;  // of a matrix at once, with one row of input
  bool bytes;       // multiplies planes of bytes (product_bytes.cpp) and keeps 3-bit codes of neighbours beside each other (three.hpp)
  void (*gather)(const Block&, uint32_t* words);
  void (*arrange)(const Block&, uint8_t* codes, uint16_t* scales, bool back);
  void (*turn_scales)(const Block&, bool arranged, float* scales, float* offsets);
  void (*read_levels)(const bl_matrix&, float* levels);
  void (*prepare)(const Preparation&);
  void (*product)(const Product&);
  bool (*tame)(const void* x, int64_t count, int32_t dtype);  // whether a row fits planes of bytes
  void (*finish)(const Finish&);
  void (*prepare_column_input)(const ColumnInput&);
  void (*column_product)(const ColumnProduct&);
  void (*move_columns)(const ColumnMove&);
  void (*column_tile)(const ColumnTile&);
  void (*lora_tile)(const LoraTile&);
  void (*encode_groups)(GroupTile&);
  void (*encode_halves)(const Halves&);
  void (*encode_scale_block)(const ScaleBlock&);
  void (*encode_trellis)(TrellisRow&);
  void (*dequantize_row)(const DequantizeRow&);
  void (*residual_row)(const ResidualRow&);
  void (*keep)(const Attention&);
  void (*attend)(const Attention&);
  void (*add_and_norm)(float* x, const float* added, const float* weight, float* y, int64_t width, float eps);
  void (*dense_rows)(const Dense&);
  void (*gate)(float* gate, const float* up, int64_t width);
};

extern const Kernels kernels_portable, kernels_avx2, kernels_avx512;

// The table for this machine, or for BITLOFT_ISA if that is set; nullptr after fail().
const Kernels* kernels();

}  // namespace bl
