// Codes and scales of sixty-four rows, turned: see block.hpp and, for the order of codes, product.hpp.
//
// Compiled once per instruction set.
#include "block.hpp"

#include <math.h>

#include "kernels.hpp"
#include "lanes_codes.hpp"
#include "three.hpp"

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

// Codes of four columns from their places in the two planes: at bits 0, 3, 8 and 11.
uint32_t join_four(uint32_t twos, uint32_t ones) {
  uint32_t found = 0;
  for (int i = 0; i < 4; ++i) found |= ((twos >> 2 * i & 3) | (ones >> i & 1) << 2) << (i % 2 * 3 + i / 2 * 8);
  return found;
}

void split_four(uint32_t codes, int at, uint32_t* twos, uint32_t* ones) {
  for (int i = 0; i < 4; ++i) {
    const uint32_t code = codes >> (i % 2 * 3 + i / 2 * 8);
    *twos |= (code & 3) << 2 * (at + i);
    *ones |= (code >> 2 & 1) << (at + i);
  }
}

// Three words of 3-bit codes from the two planes of 32 columns: see product.hpp.
void join_planes(const uint32_t* first, const uint32_t* second, const uint32_t* plane, uint32_t* to) {
  for (int lane = 0; lane < 16; ++lane) {
    uint32_t words[4];
    for (int w = 0; w < 4; ++w)
      words[w] = join_four(first[lane] >> 8 * w, plane[lane] >> 4 * w) | join_four(second[lane] >> 8 * w, plane[lane] >> (16 + 4 * w)) << 16;
    for (int w = 0; w < 3; ++w) to[w * BLOCK + lane] = words[w] | (words[3] >> 2 * w & 0x03030303) << 6;
  }
}

void split_planes(uint32_t w0, uint32_t w1, uint32_t w2, uint32_t* first, uint32_t* second, uint32_t* plane) {
  const uint32_t last = (w0 >> 6 & 0x03030303) | (w1 >> 6 & 0x03030303) << 2 | (w2 >> 6 & 0x03030303) << 4;
  const uint32_t words[4] = {w0, w1, w2, last};
  uint32_t low = 0, high = 0;
  *first = *second = 0;
  for (int w = 0; w < 4; ++w) {
    split_four(words[w], 4 * w, first, &low);
    split_four(words[w] >> 16, 4 * w, second, &high);
  }
  *plane = low | high << 16;
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
#if defined(BL_HAS_avx512)
  for (int64_t unit = 0; unit < units; ++unit) write_lines(words + unit * 3 * BLOCK);
#endif
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

#if defined(BL_HAS_avx512)
constexpr bool HAS_NEIGHBOURS = true;
#else
constexpr bool HAS_NEIGHBOURS = false;
#endif

void arranged_scales(const Block& b, int64_t row, int64_t group, int64_t count, float* to) {
  const bl_matrix& m = *b.matrix;
  const Neighbours n = HAS_NEIGHBOURS && m.bits == 3 && !(m.flags & BL_COLUMNS) ? neighbours(m, b.row) : Neighbours{b.row, 1, 0};
  const uint16_t* halves = static_cast<const uint16_t*>(m.scales) + n.first * m.groups;
  for (int64_t i = 0; i < count; ++i) to[i] = half_value(halves[((group + i) * n.beside + n.place) * BLOCK + row]);
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
  for (int64_t u = 0; u < units; ++u) {
    const uint32_t* unit = words + u * unit_words(m.bits) * BLOCK;
#if defined(BL_HAS_avx512)
    alignas(64) uint32_t room[WORDS_OUT * BLOCK];
    if (m.bits == 3) write_words(unit, room), unit = room;
#endif
    for (int64_t row = 0; row < BLOCK; ++row) {
      uint8_t* to = codes + row * stride;
      if (m.bits != 3) {
        std::memcpy(to + 4 * u, unit + row, 4);
        continue;
      }
      uint32_t first, second, plane;
      split_planes(unit[row], unit[BLOCK + row], unit[2 * BLOCK + row], &first, &second, &plane);
      std::memcpy(to + 8 * u, &first, 4);
      std::memcpy(to + 8 * u + 4, &second, 4);
      std::memcpy(to + m.width / 4 + 4 * u, &plane, 4);
    }
  }
}

namespace {

// Moves the words of one block to or from their pieces among its neighbours.
void move_pieces(const bl_matrix& m, uint32_t* block, uint32_t* all, int64_t beside, int64_t place, bool out) {
  const int64_t units = units_of(m), most = PIECE / unit_columns(m.bits), words = unit_words(m.bits) * BLOCK;
  const int64_t group_units = m.groups > 1 ? m.group / unit_columns(m.bits) : units;
  for (int64_t group = 0; group < units; group += group_units)
    for (int64_t unit = group, some; unit < group + group_units; unit += some) {
      some = group + group_units - unit < most ? group + group_units - unit : most;
      uint32_t *here = block + unit * words, *there = all + (unit * beside + place * some) * words;
      std::memcpy(out ? here : there, out ? there : here, static_cast<size_t>(some * words * 4));
    }
}

void arrange_scales(uint16_t* scales, int64_t groups, int64_t beside, bool back, uint16_t* copy) {
  std::memcpy(copy, scales, static_cast<size_t>(beside * BLOCK * groups * 2));
  for (int64_t row = 0; row < beside * BLOCK; ++row)
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t turned = (g * beside + row / BLOCK) * BLOCK + row % BLOCK;
      if (back) scales[row * groups + g] = copy[turned];
      else scales[turned] = copy[row * groups + g];
    }
}

}  // namespace

// Some blocks, all neighbours of each other, to the other order or back; codes and scales (may be nullptr) are written in place.
void arrange(const Block& b, uint8_t* codes, uint16_t* scales, bool back) {
  const bl_matrix& m = *b.matrix;
  const int64_t row_bytes = m.width * m.bits / 8, one = BLOCK * row_bytes, beside = b.rows / BLOCK, bytes = beside * one;
  const int64_t scale_bytes = scales != nullptr ? b.rows * m.groups * 2 : 0;
  codes += b.row * row_bytes;
  uint8_t* copy = static_cast<uint8_t*>(__builtin_malloc(static_cast<size_t>((bytes > scale_bytes ? bytes : scale_bytes) + one)));
  uint32_t* words = reinterpret_cast<uint32_t*>(copy + one);
  if (back) std::memcpy(words, codes, static_cast<size_t>(bytes));
  for (int64_t i = 0; i < beside; ++i) {
    const Block block{&m, b.row + i * BLOCK, BLOCK};
    if (!back) gather(block, reinterpret_cast<uint32_t*>(copy));
    move_pieces(m, reinterpret_cast<uint32_t*>(copy), words, beside, i, back);
    if (back) scatter(block, reinterpret_cast<const uint32_t*>(copy), codes + i * one);
  }
  if (!back) std::memcpy(codes, words, static_cast<size_t>(bytes));
  if (scales != nullptr) arrange_scales(scales + b.row * m.groups, m.groups, beside, back, reinterpret_cast<uint16_t*>(copy));
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
