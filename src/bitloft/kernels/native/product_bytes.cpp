// One row of input, or any number of them with 1 and 2 bits: four bits of codes choose one of sixteen sums of products, as in by_sums of product.cpp, but the sums are whole numbers, and their bytes lie in planes.
//
// A permute of bytes looks sixty-four of them up at once, four sums of each of sixteen rows, and a dot product with ones
// adds the four. In float32 the same takes twice the instructions: each register holds sixteen sums, not sixty-four.
// The whole numbers of a piece (a group, 256 columns at most) are multiples of a step of their own: three bytes, a sign
// and 23 bits for float32 and float16 input; two, a sign and 15 bits, for bfloat16. Nothing is rounded while they are added.
// So the error of a piece is that of rounding each product to the last bit of the largest one, which is also what a
// running sum in float32 does. Input that is not finite, huge or tiny is multiplied by the other kernels.
#include <math.h>

#include "input_row.hpp"
#include "kernels.hpp"
#include "three.hpp"

namespace bl::BL_ISA {

#if defined(BL_HAS_avx512)

namespace {

constexpr int VECTORS = BLOCK / 16;
constexpr int64_t FAR = 8192;  // bytes of codes fetched ahead into the second-level cache: the first holds tables
constexpr float TINY_ROW = 0x1p-60f, HUGE_ROW = 0x1p100f;

// Bytes of a plane of four nibbles' sums, 64, from registers of sixteen whole numbers each.
struct Planes {
  __m512i low, high;  // which bytes of two registers are planes 0 and 1, and plane 2

  Planes() {
    alignas(64) uint8_t first[64], second[64];
    for (int i = 0; i < 64; ++i) {
      const int number = i % 32 < 16 ? i % 16 * 4 : 64 + i % 16 * 4;  // of the first register or the second
      first[i] = static_cast<uint8_t>(number + i / 32);
      second[i] = static_cast<uint8_t>(number + 2);
    }
    low = _mm512_load_si512(first), high = _mm512_load_si512(second);
  }

  template <int PLANES>
  BL_INLINE void store(const __m512i* sums, uint8_t* to) const {
    const __m512i a = _mm512_permutex2var_epi8(sums[0], low, sums[1]), b = _mm512_permutex2var_epi8(sums[2], low, sums[3]);
    _mm512_store_si512(to, _mm512_shuffle_i64x2(a, b, 0x44));
    _mm512_store_si512(to + 64, _mm512_shuffle_i64x2(a, b, 0xee));
    if constexpr (PLANES == 3) {
      const __m512i c = _mm512_permutex2var_epi8(sums[0], high, sums[1]), d = _mm512_permutex2var_epi8(sums[2], high, sums[3]);
      _mm512_store_si512(to + 128, _mm512_shuffle_i64x2(c, d, 0x44));
    }
  }
};

template <int N>
struct Number {
  static constexpr int value = N;
};

// A unit is used in two steps, each of which looks up one sum for each of the four bytes of a word, of COLUMNS columns each.
constexpr int STEPS = 2, SPAN = 64;  // bytes of a plane
template <int BITS>
constexpr int COLUMNS = 4 / BITS;

// The first column, within a unit, that byte `b` of a step looks up: the lower nibbles, then the upper.
template <int BITS>
constexpr int column_of(int step, int b) {
  return (2 * b + step) * COLUMNS<BITS>;
}

// Bytes that choose from tables of sixteen: the code below, the number of the byte in its word above.
struct Index {
  const __m512i codes = _mm512_set1_epi32(0x0f0f0f0f), places = _mm512_set1_epi32(0x30201000);

  BL_INLINE __m512i of(const uint32_t* at, int step) const {
    const __m512i words = _mm512_loadu_si512(at);
    return _mm512_ternarylogic_epi32(step == 0 ? words : _mm512_srli_epi32(words, 4), codes, places, 0xea);
  }
};

// Tables of sums of one row, piece by piece.
template <int BITS, int PLANES>
class Tables {
 public:
  static constexpr int64_t UNIT = STEPS * SPAN * PLANES;  // bytes of a unit

  explicit Tables(const float* levels) {
    for (int i = 0; i < COLUMNS<BITS>; ++i)
      for (int c = 0; c < 16; ++c) level_[i][c] = levels[c >> BITS * i & ((1 << BITS) - 1)];
    for (int c = 0; c < 1 << BITS; ++c) largest_ = fabsf(levels[c]) > largest_ ? fabsf(levels[c]) : largest_;
  }

  // Of `count` columns from `begin` on, a piece; returns what 1 stands for.
  float make(const Preparation& p, int64_t begin, int64_t count, uint8_t* to) const {
    // sums of up to 256 numbers stay below 2^31
    const float top = PLANES == 2 ? 32752.0f : count / COLUMNS<BITS> > 128 ? 4194000.0f : 8388000.0f;
    alignas(64) float x[PIECE];
    const float most = widen(p, begin, count, x) * largest_ * COLUMNS<BITS>;
    const float scale = most > SMALLEST ? top / most : top / SMALLEST;
    __m512 table[COLUMNS<BITS>];
    for (int i = 0; i < COLUMNS<BITS>; ++i) table[i] = _mm512_mul_ps(_mm512_load_ps(level_[i]), _mm512_set1_ps(scale));
    for (const float* unit = x; unit < x + count; unit += unit_columns(BITS))
#pragma GCC unroll 2
      for (int i = 0; i < STEPS; ++i, to += SPAN * PLANES) {
        __m512i sums[4];
#pragma GCC unroll 4
        for (int b = 0; b < 4; ++b) {
          __m512 sum = _mm512_mul_ps(_mm512_set1_ps(unit[column_of<BITS>(i, b)]), table[0]);
          for (int c = 1; c < COLUMNS<BITS>; ++c)
            sum = _mm512_fmadd_ps(_mm512_set1_ps(unit[column_of<BITS>(i, b) + c]), table[c], sum);
          sums[b] = _mm512_cvtps_epi32(sum);
        }
        planes_.store<PLANES>(sums, to);
      }
    return 1 / scale;
  }

 private:
  const Planes planes_;
  alignas(64) float level_[COLUMNS<BITS>][16];
  float largest_ = 0;
};

template <int BITS, int PLANES>
void prepare_bytes(const Preparation& p) {
  const Tables<BITS, PLANES> tables(p.levels);
  const int64_t width = p.units * unit_columns(BITS), group = width / p.groups;
  uint8_t* to = static_cast<uint8_t*>(p.out);
  float* step = p.steps;
  for (int64_t end = group, begin = 0; begin < width; end += group)
    for (int64_t count; begin < end; begin += count) {
      count = end - begin < PIECE ? end - begin : PIECE;
      *step++ = tables.make(p, begin, count, to);
      to += count / unit_columns(BITS) * tables.UNIT;
    }
}

// Sums of `units` units for TOGETHER rows of the input, whose tables lie `apart` bytes from each other, and SOME vectors of a
// block: an index is made once for all rows.
template <int BITS, int PLANES, int TOGETHER, int SOME = VECTORS>
struct Sums {
  __m512i of[TOGETHER][PLANES][SOME];

  BL_INLINE void add(const Index& index, const uint32_t* codes, const uint8_t* table, int64_t apart, int64_t units, const char* next) {
    constexpr int64_t WORDS = unit_words(BITS) * BLOCK;
    const __m512i ones = _mm512_set1_epi8(1);
#pragma GCC unroll 4
    for (int r = 0; r < TOGETHER; ++r)
#pragma GCC unroll 3
      for (int k = 0; k < PLANES; ++k)
#pragma GCC unroll 4
        for (int v = 0; v < SOME; ++v) of[r][k][v] = _mm512_setzero_si512();
    for (int64_t u = units; u > 0; --u, codes += WORDS) {
      if (next != nullptr) {
#pragma GCC unroll 12
        for (int64_t i = 0; i < WORDS; i += 16) _mm_prefetch(next + 4 * i, _MM_HINT_T1);
        next += 4 * WORDS;
      }
#pragma GCC unroll 2
      for (int i = 0; i < STEPS; ++i, table += SPAN * PLANES) {
        __m512i chosen[SOME];
#pragma GCC unroll 4
        for (int v = 0; v < SOME; ++v) chosen[v] = index.of(codes + v * 16, i);
#pragma GCC unroll 4
        for (int r = 0; r < TOGETHER; ++r)
#pragma GCC unroll 3
          for (int k = 0; k < PLANES; ++k) {
            const __m512i bytes = _mm512_load_si512(table + r * apart + SPAN * k);
#pragma GCC unroll 4
            for (int v = 0; v < SOME; ++v) {
              const __m512i found = _mm512_permutexvar_epi8(chosen[v], bytes);
              of[r][k][v] = k < PLANES - 1 ? _mm512_dpbusd_epi32(of[r][k][v], found, ones) : _mm512_dpbusd_epi32(of[r][k][v], ones, found);
            }
          }
      }
    }
  }

  // The sums of sixteen lanes, times `scale` and added to `total`.
  BL_INLINE __m512 scaled(int r, int v, __m512 scale, __m512 total) const {
    __m512i sum = of[r][PLANES - 1][v];
#pragma GCC unroll 2
    for (int k = PLANES - 2; k >= 0; --k) sum = _mm512_add_epi32(_mm512_slli_epi32(sum, 8), of[r][k][v]);
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, total);
  }
};

BL_INLINE __m512 scales_at(const Product& p, int64_t at) {
  return p.scales != nullptr ? _mm512_loadu_ps(p.scales + at) : load_halves(reinterpret_cast<const uint8_t*>(p.halves + at)).v;
}

BL_INLINE void fetch_next(const Product& p, int64_t group) {
  for (int64_t byte = 0; byte < p.next_bytes; byte += 64) _mm_prefetch(p.next + group * p.next_bytes + byte, _MM_HINT_T1);
}

// One row: its totals stay in registers.
template <int BITS, int PLANES>
void multiply_bytes(const Product& p) {
  constexpr int64_t most = PIECE / unit_columns(BITS), WORDS = unit_words(BITS) * BLOCK;
  const Index index;
  const uint32_t* codes = p.codes;
  const uint8_t* table = static_cast<const uint8_t*>(p.x);
  const float* step = p.steps;
  __m512 totals[VECTORS];
  for (int v = 0; v < VECTORS; ++v) totals[v] = _mm512_loadu_ps(p.totals + v * 16);
  for (int64_t group = 0; group < p.groups; ++group) {
    for (int64_t left = p.group_units; left > 0; left -= most) {
      const int64_t units = left < most ? left : most;
      Sums<BITS, PLANES, 1> sums;
      sums.add(index, codes, table, 0, units, reinterpret_cast<const char*>(codes) + FAR);
      codes += units * WORDS, table += units * STEPS * SPAN * PLANES;
      const __m512 factor = _mm512_set1_ps(*step++ * p.unit);
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) totals[v] = sums.scaled(0, v, _mm512_mul_ps(scales_at(p, group * BLOCK + v * 16), factor), totals[v]);
    }
    fetch_next(p, group);
  }
  for (int v = 0; v < VECTORS; ++v) _mm512_storeu_ps(p.totals + v * 16, totals[v]);
}

// One piece of TOGETHER rows, the first of them `row`.
template <int BITS, int PLANES, int TOGETHER>
BL_INLINE void multiply_piece(const Product& p, const Index& index, int64_t row, int64_t group, int64_t piece, int64_t pieces, int64_t unit, int64_t units) {
  const int64_t apart = p.x_stride * 4;
  Sums<BITS, PLANES, TOGETHER> sums;
  const uint32_t* codes = p.codes + unit * (unit_words(BITS) * BLOCK);
  sums.add(index, codes, static_cast<const uint8_t*>(p.x) + row * apart + unit * (STEPS * SPAN * PLANES), apart, units, row == 0 ? reinterpret_cast<const char*>(codes) + FAR : nullptr);
#pragma GCC unroll 4
  for (int v = 0; v < VECTORS; ++v) {
    const __m512 scale = scales_at(p, group * BLOCK + v * 16);
#pragma GCC unroll 2
    for (int r = 0; r < TOGETHER; ++r) {
      float* total = p.totals + (row + r) * BLOCK + v * 16;
      const __m512 factor = _mm512_set1_ps(p.steps[(row + r) * pieces + piece] * p.unit);
      _mm512_storeu_ps(total, sums.scaled(r, v, _mm512_mul_ps(scale, factor), _mm512_loadu_ps(total)));
    }
  }
}

// Some rows, piece by piece: codes are read once from memory, and each row gets what it gets alone.
template <int BITS, int PLANES>
void multiply_bytes_of_rows(const Product& p) {
  constexpr int64_t most = PIECE / unit_columns(BITS);
  constexpr int TOGETHER = PLANES == 2 ? 2 : 1;  // as many as the registers hold
  const Index index;
  const int64_t pieces = p.groups * ((p.group_units + most - 1) / most);
  int64_t piece = 0;
  for (int64_t group = 0; group < p.groups; ++group) {
    for (int64_t first = 0; first < p.group_units; first += most, ++piece) {
      const int64_t left = p.group_units - first, units = left < most ? left : most, unit = group * p.group_units + first;
      int64_t row = 0;
      for (; row + TOGETHER <= p.rows; row += TOGETHER) multiply_piece<BITS, PLANES, TOGETHER>(p, index, row, group, piece, pieces, unit, units);
      for (; row < p.rows; ++row) multiply_piece<BITS, PLANES, 1>(p, index, row, group, piece, pieces, unit, units);
    }
    fetch_next(p, group);
  }
}

// Many rows and many blocks: what follows is done for up to 256 columns at a time, some rows of them, one block after the other, so
// that tables, made on the spot, stay in the first-level cache. Each row gets what it gets alone.
template <int BITS, int PLANES>
class Many {
 public:
  explicit Many(const Product& p) : p_(p), tables_(p.levels) {}

  void multiply() {
    if (p_.group_units == 0) return;
    const int64_t pieces = p_.group_units < MOST ? MOST / p_.group_units : 1;  // groups at once
    for (int64_t group = 0; group < p_.groups; group += pieces)
      for (units_ = 0, unit_ = 0; unit_ < p_.group_units; unit_ += units_) {
        const int64_t left = p_.group_units - unit_;
        units_ = left < MOST ? left : MOST;
        group_ = group, pieces_ = p_.groups - group < pieces ? p_.groups - group : pieces;
        for (int64_t row = 0; row < p_.rows; row += ROWS) multiply_rows(row, p_.rows - row < ROWS ? p_.rows - row : ROWS);
      }
  }

 private:
  static constexpr int64_t MOST = PIECE / unit_columns(BITS), UNIT = Tables<BITS, PLANES>::UNIT, APART = MOST * UNIT;
  static constexpr int64_t ROWS = TABLED;

  const uint32_t* codes(int64_t block) const {
    return p_.codes + (block * p_.groups * p_.group_units + group_ * p_.group_units + unit_) * BLOCK;
  }

  void multiply_rows(int64_t row, int64_t rows) {
    for (int64_t r = 0; r < rows; ++r) {
      Preparation x = *p_.given;
      x.x = static_cast<const char*>(x.x) + (row + r) * p_.given_stride;
      for (int64_t piece = 0; piece < pieces_; ++piece) {
        const int64_t first = (group_ + piece) * p_.group_units + unit_;
        steps_[r][piece] = p_.unit * tables_.make(x, first * unit_columns(BITS), units_ * unit_columns(BITS), table_ + r * APART + piece * units_ * UNIT);
      }
    }
    for (int64_t block = 0; block < p_.blocks; ++block) {
      const char* next = row > 0 ? nullptr : reinterpret_cast<const char*>(block + 1 < p_.blocks ? codes(block + 1) : codes(0) + MOST * BLOCK);
      for (int64_t piece = 0; piece < pieces_; ++piece) {
        const char* ahead = next != nullptr ? next + piece * units_ * BLOCK * 4 : nullptr;
        if (rows == 4) multiply_piece<4>(block, row, piece, ahead);
        else if (rows == 3) multiply_piece<3>(block, row, piece, ahead);
        else if (rows == 2) multiply_piece<2>(block, row, piece, ahead);
        else multiply_piece<1>(block, row, piece, ahead);
      }
    }
  }

  template <int AT_ONCE>
  BL_INLINE void multiply_piece(int64_t block, int64_t row, int64_t piece, const char* next) {
    constexpr int SOME = AT_ONCE * PLANES <= 4 ? 4 : AT_ONCE * PLANES <= 8 ? 2 : 1;  // sums that fit the registers
    for (int first = 0; first < VECTORS; first += SOME) {
      Sums<BITS, PLANES, AT_ONCE, SOME> sums;
      sums.add(index_, codes(block) + piece * units_ * BLOCK + first * 16, table_ + piece * units_ * UNIT, APART, units_, first == 0 ? next : nullptr);
#pragma GCC unroll 4
      for (int v = 0; v < SOME; ++v) {
        const __m512 scale = scales_at(p_, p_.scale_at(group_ + piece, block) + (first + v) * 16);
#pragma GCC unroll 4
        for (int i = 0; i < AT_ONCE; ++i) {
          float* total = p_.totals + (block * p_.rows + row + i) * BLOCK + (first + v) * 16;
          _mm512_storeu_ps(total, sums.scaled(i, v, _mm512_mul_ps(scale, _mm512_set1_ps(steps_[i][piece])), _mm512_loadu_ps(total)));
        }
      }
    }
  }

  const Product& p_;
  const Tables<BITS, PLANES> tables_;
  const Index index_;
  int64_t group_ = 0, unit_ = 0, units_ = 0, pieces_ = 0;
  float steps_[ROWS][MOST];
  alignas(64) uint8_t table_[ROWS * APART];
};

// ---- input in 8 bits --------------------------------------------------------------------------------------------------
//
// y[r, o] = sum_groups scale * sum_i (level[code] * 127 / largest) * q[r, i] * factor[r], both rounded to whole numbers; q is a
// row of the input in 8 bits, factor what 1 of it stands for, times that of a level. The dot product takes one side without a
// sign: levels have 128 added, so a sum starts from -128 times the sum of q. A prepared row is [units][QUADS][4 columns] of q,
// then where the sum of each piece starts (int32), then its factor (float32).

// Words of four codes that a unit has, and the first column of byte `b` of one.
template <int BITS>
constexpr int QUADS = BITS == 3 ? 8 : 8 / BITS;
template <int BITS>
constexpr int quad_column(int quad, int b) {
  return BITS == 3 ? 4 * (quad / 2) + quad % 2 + 2 * (b % 2) + 16 * (b / 2) : quad + b * (8 / BITS);
}

int64_t pieces_of(int64_t groups, int64_t group_columns) { return groups * ((group_columns + PIECE - 1) / PIECE); }

float largest_level(int bits, const float* levels) {
  float most = 0;
  for (int c = 0; c < 1 << bits; ++c) most = fabsf(levels[c]) > most ? fabsf(levels[c]) : most;
  return most > 0 ? most : 1;
}

template <int BITS>
void prepare_quads(const Preparation& p) {
  constexpr int64_t COLUMNS = unit_columns(BITS);
  const int64_t width = p.units * COLUMNS, group = width / p.groups;
  alignas(64) float x[PIECE];
  float most = 0, rest = 0;
  for (int64_t begin = 0; begin < width; begin += PIECE) {
    const float found = widen(p, begin, width - begin < PIECE ? width - begin : PIECE, x);
    most = found > most ? found : most;
    for (int64_t i = 0; i < PIECE && begin + i < width; ++i) rest += x[i] - x[i];  // not 0 where a value is no number
  }
  const float scale = most > 0 ? 127 / most : 0;
  int8_t* to = static_cast<int8_t*>(p.out);
  int32_t* start = reinterpret_cast<int32_t*>(to + width);
  float* factor = reinterpret_cast<float*>(start + pieces_of(p.groups, group));
  *factor = most / 127 * largest_level(BITS, p.levels) / 127 + rest;
  for (int64_t end = group, begin = 0; begin < width; end += group) {
    int64_t whole = 0;  // the sum of a group
    for (int64_t count; begin < end; begin += count) {
      count = end - begin < PIECE ? end - begin : PIECE;
      widen(p, begin, count, x);
      int32_t sum = 0;
      for (const float* unit = x; unit < x + count; unit += COLUMNS)
#pragma GCC unroll 8
        for (int quad = 0; quad < QUADS<BITS>; ++quad)
#pragma GCC unroll 4
          for (int b = 0; b < 4; ++b) {
            const int32_t q = rest == 0 ? static_cast<int32_t>(rintf(unit[quad_column<BITS>(quad, b)] * scale)) : 0;
            sum += q, *to++ = static_cast<int8_t>(q);
          }
      *start++ = -128 * sum, whole += sum;
    }
    if (p.sums != nullptr) p.sums[end / group - 1] = static_cast<float>(whole) * (most / 127) + rest;
  }
}

template <int ROWS>
void quad_rows(const Product& p, int64_t group, int64_t piece, const uint32_t* tile, int64_t quads, const uint32_t* x, const uint32_t* tails, int64_t pieces, float* totals) {
  __m512i sums[ROWS * VECTORS];
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) sums[r * VECTORS + v] = _mm512_set1_epi32(static_cast<int>(tails[r * p.x_stride + piece]));
  for (int64_t i = 0; i < quads; ++i, tile += BLOCK) {
    __m512i values[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) values[v] = _mm512_load_si512(tile + v * 16);
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r) {
      const __m512i q = _mm512_set1_epi32(static_cast<int>(x[r * p.x_stride + i]));
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) sums[r * VECTORS + v] = _mm512_dpbusd_epi32(sums[r * VECTORS + v], values[v], q);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < VECTORS; ++v) {
    const int64_t at = p.scale_at(group, 0) + v * 16;
    const __m512 scale = p.scales != nullptr ? _mm512_loadu_ps(p.scales + at)
                                             : _mm512_mul_ps(load_halves(reinterpret_cast<const uint8_t*>(p.halves + at)).v, _mm512_set1_ps(p.unit));
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r) {
      float factor;
      std::memcpy(&factor, tails + r * p.x_stride + pieces, sizeof factor);
      float* total = totals + r * BLOCK + v * 16;
      const __m512 sum = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[r * VECTORS + v]), _mm512_set1_ps(factor));
      _mm512_storeu_ps(total, _mm512_fmadd_ps(sum, scale, _mm512_loadu_ps(total)));
    }
  }
}

// The levels of a unit in 8 bits, [QUADS][64] words.
template <int BITS>
BL_INLINE void write_quads(const uint32_t* codes, __m512i book, uint32_t* to) {
  alignas(64) uint32_t words[WORDS_OUT * BLOCK];
  if constexpr (BITS == 3) write_words(codes, words);
#pragma GCC unroll 8
  for (int quad = 0; quad < QUADS<BITS>; ++quad, to += BLOCK)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) {
      const __m512i word = BITS == 3 ? _mm512_load_si512(words + quad / 2 * BLOCK + v * 16) : _mm512_loadu_si512(codes + v * 16);
      const int shift = BITS == 3 ? 3 * (quad % 2) : BITS * quad;
      _mm512_store_si512(to + v * 16, _mm512_permutexvar_epi8(_mm512_srli_epi32(word, static_cast<unsigned>(shift)), book));
    }
}

template <int BITS>
void multiply_quads(const Product& p) {
  constexpr int64_t most = PIECE / unit_columns(BITS), WORDS = unit_words(BITS) * BLOCK;
  constexpr int64_t MOST_ROWS = 6;
  const float largest = largest_level(BITS, p.levels);
  alignas(64) uint8_t level[64];
  for (int i = 0; i < 64; ++i) level[i] = static_cast<uint8_t>(128 + static_cast<int>(rintf(p.levels[i & ((1 << BITS) - 1)] / largest * 127)));
  const __m512i book = _mm512_load_si512(level);
  uint32_t* tile = reinterpret_cast<uint32_t*>((reinterpret_cast<uintptr_t>(p.tile) + 63) & ~uintptr_t{63});
  const uint32_t* x = static_cast<const uint32_t*>(p.x);
  const uint32_t* tails = x + p.groups * p.group_units * QUADS<BITS>;
  const int64_t pieces = pieces_of(p.groups, p.group_units * unit_columns(BITS)), turns = (p.rows + MOST_ROWS - 1) / MOST_ROWS;
  int64_t piece = 0;
  for (int64_t group = 0; group < p.groups; ++group)
    for (int64_t left = p.group_units; left > 0; left -= most, ++piece) {
      const int64_t units = left < most ? left : most, quads = units * QUADS<BITS>;
      const int64_t unit = group * p.group_units + p.group_units - left;
      const uint32_t* codes = p.codes + (BITS == 3 ? piece_at(unit, units, p.beside, p.place) : unit * WORDS);
      const int64_t far = BITS == 3 ? later(p, 0) * units * WORDS * 4 : FAR;
      for (int64_t u = 0; u < units; ++u, codes += WORDS) {
#pragma GCC unroll 12
        for (int64_t i = 0; i < WORDS; i += 16) _mm_prefetch(reinterpret_cast<const char*>(codes + i) + far, _MM_HINT_T1);
        write_quads<BITS>(codes, book, tile + u * QUADS<BITS> * BLOCK);
      }
      for (int64_t turn = 0; turn < turns; ++turn) {
        const int64_t row = turn * p.rows / turns, count = (turn + 1) * p.rows / turns - row;
        const uint32_t *rows = x + row * p.x_stride, *ends = tails + row * p.x_stride;
        float* totals = p.totals + row * BLOCK;
        const auto run = [&](auto rows_of) { quad_rows<decltype(rows_of)::value>(p, group, piece, tile, quads, rows, ends, pieces, totals); };
        switch (count) {
          case 6: run(Number<6>{}); break;
          case 5: run(Number<5>{}); break;
          case 4: run(Number<4>{}); break;
          case 3: run(Number<3>{}); break;
          case 2: run(Number<2>{}); break;
          default: run(Number<1>{}); break;
        }
      }
      x += quads;
    }
}

}  // namespace

// The largest magnitude decides: without their sign numbers follow each other as their bits do, with infinity and what is no number
// behind the others.
bool tame(const void* x, int64_t count, int32_t dtype) {
  const uint8_t* bytes = static_cast<const uint8_t*>(x);
  const int64_t size = dtype == BL_F32 ? 4 : 2;
  __m512i most = _mm512_setzero_si512();
  for (int64_t i = 0; i < count * size; i += 64) {
    const int64_t left = count * size - i;
    const __m512i read = left >= 64 ? _mm512_loadu_si512(bytes + i) : _mm512_maskz_loadu_epi8(~uint64_t{0} >> (64 - left), bytes + i);
    if (dtype == BL_F32) most = _mm512_max_epu32(most, _mm512_and_si512(read, _mm512_set1_epi32(0x7fffffff)));
    else most = _mm512_max_epu16(most, _mm512_and_si512(read, _mm512_set1_epi16(0x7fff)));
  }
  if (dtype != BL_F32) most = _mm512_max_epu32(_mm512_srli_epi32(most, 16), _mm512_and_si512(most, _mm512_set1_epi32(0xffff)));
  const uint32_t largest = _mm512_reduce_max_epu32(most);
  if (dtype == BL_F16) return largest < 0x7c00;  // halves are neither huge nor tiny
  float value;
  const uint32_t bits = dtype == BL_F32 ? largest : largest << 16;
  std::memcpy(&value, &bits, sizeof value);
  return value < HUGE_ROW && (value > TINY_ROW || value == 0);
}

void prepare_planes(const Preparation& p) {
  const bool two = p.planes == 2;
  switch (p.bits) {
    case 1: return two ? prepare_bytes<1, 2>(p) : prepare_bytes<1, 3>(p);
    case 2: return two ? prepare_bytes<2, 2>(p) : prepare_bytes<2, 3>(p);
    default: return two ? prepare_bytes<4, 2>(p) : prepare_bytes<4, 3>(p);
  }
}

void by_bytes(const Product& p) {
  const bool two = p.planes == 2;
  if (p.rows > 1) {
    if (p.bits == 1) return two ? multiply_bytes_of_rows<1, 2>(p) : multiply_bytes_of_rows<1, 3>(p);
    return two ? multiply_bytes_of_rows<2, 2>(p) : multiply_bytes_of_rows<2, 3>(p);  // other widths come one row at a time
  }
  switch (p.bits) {
    case 1: return two ? multiply_bytes<1, 2>(p) : multiply_bytes<1, 3>(p);
    case 2: return two ? multiply_bytes<2, 2>(p) : multiply_bytes<2, 3>(p);
    default: return two ? multiply_bytes<4, 2>(p) : multiply_bytes<4, 3>(p);
  }
}

void by_tables(const Product& p) {
  const bool two = p.planes == 2;
  if (p.bits == 1) return two ? Many<1, 2>(p).multiply() : Many<1, 3>(p).multiply();
  return two ? Many<2, 2>(p).multiply() : Many<2, 3>(p).multiply();
}

void prepare_eight_bits(const Preparation& p) {
  switch (p.bits) {
    case 1: return prepare_quads<1>(p);
    case 2: return prepare_quads<2>(p);
    case 3: return prepare_quads<3>(p);
    default: return prepare_quads<4>(p);
  }
}

void by_quads(const Product& p) {
  switch (p.bits) {
    case 1: return multiply_quads<1>(p);
    case 2: return multiply_quads<2>(p);
    case 3: return multiply_quads<3>(p);
    default: return multiply_quads<4>(p);
  }
}

#else  // other sets have no permute of sixty-four bytes; linear.cpp does not ask them

bool tame(const void*, int64_t, int32_t) { return false; }
void prepare_planes(const Preparation&) {}
void by_bytes(const Product&) {}
void by_tables(const Product&) {}
void prepare_eight_bits(const Preparation&) {}
void by_quads(const Product&) {}

#endif

}  // namespace bl::BL_ISA
