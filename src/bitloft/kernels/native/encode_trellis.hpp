// One row on its way to trellis codes: what trellis.cpp hands to the kernel of one instruction set.
#pragma once

#include <cstdint>

namespace bl {

constexpr int64_t STATES = 256;    // the eight bits of the first plane that a value and its successors share
constexpr int64_t TAIL = 128;      // values before and after a row's ends, read in a circle, that decide its first state
constexpr int64_t DECISIONS = STATES / 16;  // words of sixteen bits a value

struct TrellisRow {
  const float* x;        // [columns]
  const float* weights;  // [columns], or nullptr
  int64_t columns, width;
  int32_t bits;
  bool scaled;           // the row has a scale; else it is coded as it is
  uint8_t* codes;        // [bits, width / 8], written
  uint8_t* spare;        // as many bytes
  float scale;           // written
  bool finite;           // written: no value was NaN or infinite
  float* work;           // 3 * width + 16 numbers
  uint16_t* decisions;   // DECISIONS * max(width, 2 * TAIL)
};

}  // namespace bl
