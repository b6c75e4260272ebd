// Sixteen groups on their way to codes: what encode.cpp hands to the kernel of one instruction set.
#pragma once

#include <cstdint>

#include "bitloft.h"

namespace bl {

struct GroupTile {
  const float* rows[16];  // where each group begins; a tile that is not full repeats one
  int64_t count, size;    // values of a group, and with padding, which is a multiple of 8
  int32_t rule, bits;
  bool uniform, shifted, zeroed;  // codes of an even grid; groups have a shift; an integer zero point
  const float* levels;   // 2**bits, ascending; unused by the rules of uniform codes
  float* scales;         // 16 each, written, or read under BL_GIVEN
  float* shifts;
  float* zeros;
  float* work;      // work_of(size) floats, 64-byte aligned
  uint32_t* words;  // [size / 8, 16]: eight codes of a group, the first lowest; 3 bits: 16 bits of low pairs, then 8 of
                    // high bits; 8 bits: [size / 4, 16], four codes each
  bool finite;      // written: no value was NaN or infinite
};

// The values turned so that a lane is a group, and a copy to sort.
inline int64_t work_of(int64_t size) { return 2 * 16 * (size + 16); }

// Numbers of groups on their way to fp16: `count` of them, in units of 2**exponent.
struct Halves {
  const float* from;
  int64_t count;
  int32_t exponent;
  uint16_t* to;
};

// At most 256 scales that share one range (packed.double_quantize).
struct ScaleBlock {
  const float* from;
  int64_t count;
  int32_t exponent;
  uint8_t* codes;
  uint16_t *low, *step;
};

}  // namespace bl
