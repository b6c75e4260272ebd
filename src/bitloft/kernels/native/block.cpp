// Codes and scales of sixty-four rows, turned: see block.hpp and, for the order of codes, product.hpp.
//
// Compiled once per instruction set.
#include "block.hpp"

#include <math.h>

#include "kernels.hpp"
#include "lanes_codes.hpp"
#include "product.hpp"

namespace bl::BL_ISA {
namespace {

constexpr int64_t CHUNK = 64;  // bytes of a row that are turned at once: sixteen words

alignas(64) const uint8_t nothing_there[CHUNK] = {};

// Sixteen words of each of sixteen rows, turned; bytes beyond the end of a row, and rows beyond the end, are zero.
struct Turner {
  const uint8_t* first;  // byte 0 of row 0
  int64_t stride, bytes, rows;

  void turn(int64_t row, int64_t chunk, uint32_t* to) const {
    alignas(64) uint8_t ends[16][CHUNK];
    const float* at[16];
    const int64_t begin = chunk * CHUNK, there = bytes - begin < CHUNK ? bytes - begin : CHUNK;
    for (int i = 0; i < 16; ++i) {
      const uint8_t* found = first + (row + i) * stride + begin;
      if (row + i >= rows || there <= 0) {
        found = nothing_there;
      } else if (there < CHUNK) {
        std::memset(ends[i], 0, CHUNK);
        std::memcpy(ends[i], found, static_cast<size_t>(there));
        found = ends[i];
      }
      at[i] = reinterpret_cast<const float*>(found);
    }
    load_across(at, reinterpret_cast<float*>(to));
  }
};

// Three words of 3-bit codes from the two planes of 32 columns: see product.hpp.
void join_planes(const uint32_t* first, const uint32_t* second, const uint32_t* plane, uint32_t* to) {
  for (int lane = 0; lane < 16; ++lane) {
    const uint32_t a = first[lane], b = second[lane], h = plane[lane];
    uint32_t words[3] = {0, 0, 0};
    for (int i = 0; i < 15; ++i) {
      const uint32_t pair = (a >> 2 * i & 3) | (b >> 2 * i & 3) << 16 | (h >> i & 0x00010001u) << 2;
      words[i / 5] |= pair << 3 * (i % 5);
    }
    const uint32_t last = a >> 30 | b >> 30 << 16 | (h >> 15 & 0x00010001u) << 2;
    for (int w = 0; w < 3; ++w) to[w * BLOCK + lane] = words[w] | (last >> w & 0x00010001u) << 15;
  }
}

void split_planes(uint32_t w0, uint32_t w1, uint32_t w2, uint32_t* first, uint32_t* second, uint32_t* plane) {
  const uint32_t words[3] = {w0, w1, w2};
  *first = *second = *plane = 0;
  for (int i = 0; i < 16; ++i) {
    uint32_t pair = 0;
    if (i < 15) pair = words[i / 5] >> 3 * (i % 5);
    else for (int w = 0; w < 3; ++w) pair |= (words[w] >> 15 & 0x00010001u) << w;
    *first |= (pair & 3) << 2 * i;
    *second |= (pair >> 16 & 3) << 2 * i;
    *plane |= (pair >> 2 & 0x00010001u) << i;
  }
}

int64_t units_of(const bl_matrix& m) {
  const int64_t columns = unit_columns(m.bits);
  return (m.width + columns - 1) / columns;
}

void gather_three(const Block& b, uint32_t* words) {
  const bl_matrix& m = *b.matrix;
  const int64_t units = units_of(m), stride = m.width * 3 / 8;
  const Turner low{m.codes + b.row * stride, stride, m.width / 4, b.rows};
  const Turner high{low.first + m.width / 4, stride, m.width / 8, b.rows};
  alignas(64) uint32_t twos[2][256], ones[256];
  for (int64_t row = 0; row < BLOCK; row += 16)
    for (int64_t unit = 0; unit < units; unit += 16) {
      low.turn(row, unit / 8, twos[0]);
      low.turn(row, unit / 8 + 1, twos[1]);
      high.turn(row, unit / 16, ones);
      for (int64_t u = 0; u < 16 && unit + u < units; ++u)
        join_planes(&twos[0][0] + 32 * u, &twos[0][0] + 32 * u + 16, ones + 16 * u, words + (unit + u) * 3 * BLOCK + row);
    }
}

// Scales (or shifts) of some groups of one row, in units of 2**exponent.
void row_halves(const uint16_t* halves, int64_t count, float* to) {
  if (count == 16) return store(to, load_halves(reinterpret_cast<const uint8_t*>(halves)));
  for (int64_t i = 0; i < count; ++i) to[i] = half_value(halves[i]);
}

void row_scales(const bl_matrix& m, int64_t row, int64_t group, int64_t count, float* to) {
  const int64_t at = (m.flags & BL_TENSOR ? 0 : row * m.groups) + group;
  if (!(m.flags & BL_DQ)) return row_halves(static_cast<const uint16_t*>(m.scales) + at, count, to);
  const uint8_t* codes = static_cast<const uint8_t*>(m.scales) + at;
  if (count == 16 && at / 256 == (at + 15) / 256) {
    const Lanes low = all(half_value(m.low[at / 256])), step = all(half_value(m.step[at / 256]));
    return store(to, add(low, multiply(step, load_bytes(codes))));
  }
  for (int64_t i = 0; i < count; ++i)
    to[i] = half_value(m.low[(at + i) / 256]) + half_value(m.step[(at + i) / 256]) * static_cast<float>(codes[i]);
}

void arranged_scales(const Block& b, int64_t row, int64_t group, int64_t count, float* to) {
  const uint16_t* halves = static_cast<const uint16_t*>(b.matrix->scales) + b.row * b.matrix->groups;
  for (int64_t i = 0; i < count; ++i) to[i] = half_value(halves[(group + i) * BLOCK + row]);
}

float zero_at(const bl_matrix& m, int64_t row, int64_t group) {
  const int64_t bits = m.bits == 3 ? 4 : m.bits, row_bytes = (m.groups * bits + 7) / 8;
  return static_cast<float>(m.zeros[row * row_bytes + group * bits / 8] >> group * bits % 8 & ((1 << bits) - 1));
}

// shift - zero * scale, the part of a value that does not depend on its code.
void row_offsets(const bl_matrix& m, int64_t row, int64_t group, int64_t count, const float* scales, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = 0;
  if (m.shifts != nullptr) row_halves(m.shifts + (m.flags & BL_TENSOR ? 0 : row * m.groups) + group, count, to);
  if (m.zeros != nullptr)
    for (int64_t i = 0; i < count; ++i) to[i] -= zero_at(m, row, group + i) * scales[i];
}

// Turns sixteen rows of sixteen numbers and multiplies them by two powers of two (one may be beyond float32).
void put_across(const float (*rows)[16], int64_t groups, Lanes first, Lanes second, float* to) {
  alignas(64) float turned[256];
  const float* at[16];
  for (int i = 0; i < 16; ++i) at[i] = rows[i];
  load_across(at, turned);
  for (int64_t g = 0; g < groups; ++g) store(to + g * BLOCK, multiply(multiply(load(turned + 16 * g), first), second));
}

}  // namespace

// Codes of a block whose rows lie one after the other -> [units][words][64].
void gather(const Block& b, uint32_t* words) {
  const bl_matrix& m = *b.matrix;
  if (m.bits == 3) return gather_three(b, words);
  const int64_t units = units_of(m), stride = m.width * m.bits / 8;
  const Turner turner{m.codes + b.row * stride, stride, stride, b.rows};
  alignas(64) uint32_t turned[256];
  for (int64_t row = 0; row < BLOCK; row += 16)
    for (int64_t unit = 0; unit < units; unit += 16) {
      turner.turn(row, unit / 16, turned);
      for (int64_t u = 0; u < 16 && unit + u < units; ++u)
        std::memcpy(words + (unit + u) * BLOCK + row, turned + 16 * u, 64);
    }
}

// The inverse, for sixty-four rows whose words are full.
void scatter(const Block& b, const uint32_t* words, uint8_t* codes) {
  const bl_matrix& m = *b.matrix;
  const int64_t units = units_of(m), stride = m.width * m.bits / 8;
  for (int64_t row = 0; row < BLOCK; ++row) {
    uint8_t* to = codes + row * stride;
    for (int64_t u = 0; u < units; ++u) {
      if (m.bits != 3) {
        std::memcpy(to + 4 * u, words + u * BLOCK + row, 4);
        continue;
      }
      const uint32_t* w = words + u * 3 * BLOCK + row;
      uint32_t first, second, plane;
      split_planes(w[0], w[BLOCK], w[2 * BLOCK], &first, &second, &plane);
      std::memcpy(to + 8 * u, &first, 4);
      std::memcpy(to + 8 * u + 4, &second, 4);
      std::memcpy(to + m.width / 4 + 4 * u, &plane, 4);
    }
  }
}

// One block to the other order or back; codes and scales (may be nullptr) are written in place.
void arrange(const Block& b, uint8_t* codes, uint16_t* scales, bool back) {
  const bl_matrix& m = *b.matrix;
  const int64_t row_bytes = m.width * m.bits / 8, bytes = BLOCK * row_bytes, groups = m.groups;
  codes += b.row * row_bytes;
  uint8_t* copy = static_cast<uint8_t*>(__builtin_malloc(static_cast<size_t>(bytes > groups * BLOCK * 2 ? bytes : groups * BLOCK * 2)));
  if (back) {
    std::memcpy(copy, codes, static_cast<size_t>(bytes));
    scatter(b, reinterpret_cast<const uint32_t*>(copy), codes);
  } else {
    gather(b, reinterpret_cast<uint32_t*>(copy));
    std::memcpy(codes, copy, static_cast<size_t>(bytes));
  }
  if (scales != nullptr) {
    scales += b.row * groups;
    std::memcpy(copy, scales, static_cast<size_t>(groups * BLOCK * 2));
    const uint16_t* from = reinterpret_cast<const uint16_t*>(copy);
    for (int64_t row = 0; row < BLOCK; ++row)
      for (int64_t g = 0; g < groups; ++g) {
        if (back) scales[row * groups + g] = from[g * BLOCK + row];
        else scales[g * BLOCK + row] = from[row * groups + g];
      }
  }
  __builtin_free(copy);
}

// Scales -> [groups][64] (one row of ones where none are stored), and offsets where the format has them.
void turn_scales(const Block& b, bool arranged, float* scales, float* offsets) {
  const bl_matrix& m = *b.matrix;
  if (m.groups == 0) {
    for (int64_t i = 0; i < BLOCK; ++i) scales[i] = 1;
    return;
  }
  const int half = *m.exponent / 2;
  const Lanes first = all(ldexpf(1, half)), second = all(ldexpf(1, *m.exponent - half));
  alignas(64) float rows[2][16][16] = {};
  for (int64_t row = 0; row < BLOCK; row += 16)
    for (int64_t group = 0; group < m.groups; group += 16) {
      const int64_t count = m.groups - group < 16 ? m.groups - group : 16;
      for (int64_t i = 0; i < 16; ++i) {
        if (row + i >= b.rows) {
          std::memset(rows[0][i], 0, sizeof rows[0][i]);
          std::memset(rows[1][i], 0, sizeof rows[1][i]);
          continue;
        }
        if (arranged && scales_arranged(m)) arranged_scales(b, row + i, group, count, rows[0][i]);
        else row_scales(m, b.row + row + i, group, count, rows[0][i]);
        if (offsets != nullptr) row_offsets(m, b.row + row + i, group, count, rows[0][i], rows[1][i]);
      }
      put_across(rows[0], count, first, second, scales + group * BLOCK + row);
      if (offsets != nullptr) put_across(rows[1], count, first, second, offsets + group * BLOCK + row);
    }
}

void read_levels(const bl_matrix& m, float* levels) {
  for (int64_t i = 0; i < int64_t{1} << m.bits; ++i)
    levels[i] = m.learned != nullptr ? half_value(m.learned[i]) : m.levels[i];
}

}  // namespace bl::BL_ISA
