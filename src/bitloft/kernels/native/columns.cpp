// Products with trellis codes that run down columns.
//
// AVX-512: a row of the input becomes whole numbers, their bytes in planes, as in product_bytes.cpp: two bytes where it is bfloat16,
// else three, multiples of a step of each piece. Levels are whole numbers as they are, so nothing is rounded while they are added. The
// bits that choose levels are parities of a byte and the one before it, which a product with a matrix over bits finds for two rows of a byte
// at once: one such product for sixty-four levels, and a shift for each other plane. Each row of the input gets what it gets alone.
//
// Elsewhere, and for input that is not finite, huge or tiny: levels as float32, one column after the other.
#include "columns.hpp"

#include "input_row.hpp"
#include "kernels.hpp"
#include "trellis.hpp"

namespace bl::BL_ISA {
namespace {

constexpr int64_t SOME = 64;  // columns whose levels are written down as float32 at once

// Bytes of `columns` columns in the order of the file.
struct Stored {
  const uint8_t* codes;  // of the first one
  int64_t column_bytes, bytes;  // from column to column, of a plane
};

Stored stored(const bl_matrix& m, int64_t column) {
  const int64_t bytes = plane_bytes(m);
  return {m.codes + column * bytes * m.bits, bytes * m.bits, bytes};
}

#if defined(BL_HAS_avx512)

constexpr int64_t FAR = 4096;  // bytes of codes that are fetched ahead
constexpr int PAIRS = 4;       // of rows of a byte
constexpr int64_t LEVELS = 8 * LINE;  // bytes of a cell's levels

// Cells of a piece, and for each the byte of the first plane before it, of every column.
struct Cells {
  const uint8_t* codes;
  const uint8_t* before;
  int64_t apart;  // bytes from one of `before` to the next
  int64_t count;
};

// Which bits of a byte (or of the byte before) are added up for bit i of what two neighbouring rows of it look up with, 2 * pair and
// the next: four bits each.
template <int K>
constexpr uint64_t pair_taps(int pair, bool before) {
  uint64_t matrix = 0;
  for (int i = 0; i < 8; ++i) {
    uint64_t row = 0;
    for (int d = 0; d <= MEMORY && i % 4 < Trellis<K>::SPLIT; ++d) {
      const int at = 2 * pair + i / 4 - d;
      if ((Trellis<K>::TAPS[i % 4] >> d & 1) && (at < 0) == before) row |= uint64_t{1} << (at < 0 ? at + 8 : at);
    }
    matrix |= row << 8 * (7 - i);
  }
  return matrix;
}

template <int N>
struct Number {
  static constexpr int value = N;
};

template <int BY>
BL_INLINE __m512i moved(__m512i x) {
  if constexpr (BY > 0) return _mm512_slli_epi64(x, BY);
  if constexpr (BY < 0) return _mm512_srli_epi64(x, -BY);
  return x;
}

// What the two rows of a pair are looked up in.
struct Book {
  __m512i first, second;
};

// The levels of one cell, 128 more than they are: two vectors for each pair, [8 bytes of rows][8 columns].
template <int K>
struct Cell {
  __m512i planes[K], before;

  BL_INLINE Cell(const uint8_t* codes, const uint8_t* before_it) {
#pragma GCC unroll 4
    for (int p = 0; p < K; ++p) planes[p] = _mm512_loadu_si512(codes + p * LINE);
    before = _mm512_alignr_epi64(planes[0], _mm512_set1_epi64(static_cast<int64_t>(load64(before_it))), 7);
  }

  // Bits from the other planes come above those of the subset. Where one of six is to spare, the second row of a pair has them one bit
  // higher, so that a plane is moved once for both; the bit that is left out holds what the other row reads there.
  static constexpr int SPARE = Trellis<K>::SPLIT + K - 1 < 6 ? 1 : 0;

  // The levels of the rows of a pair, by what is looked up: bits that mean nothing repeat them.
  template <int ROW>
  static BL_INLINE __m512i table() {
    constexpr int SPLIT = Trellis<K>::SPLIT;
    alignas(64) static constexpr auto levels = [] {
      typename Trellis<K>::Bytes found(Trellis<K>::LEVELS), out = found;
      for (int i = 0; i < 64; ++i) out.v[i] = found.v[ROW * SPARE == 0 || K == 1 ? i : (i & ((1 << SPLIT) - 1)) | i >> (SPLIT + 1) << SPLIT];
      return out;
    }();
    return _mm512_xor_si512(_mm512_load_si512(levels.v), _mm512_set1_epi8(static_cast<char>(128)));
  }

  template <int PAIR, int ROW, int P = 1>
  BL_INLINE __m512i index(__m512i low) const {
    if constexpr (P >= K) {
      return low;
    } else {
      constexpr int AT = Trellis<K>::SPLIT + P - 1;
      // the first plane also fills the bit that is left out
      const __m512i below = _mm512_set1_epi8(static_cast<char>((1 << (P > 1 ? AT + ROW * SPARE : AT)) - 1));
      const __m512i plane = moved<AT - 2 * PAIR - (SPARE ? 0 : ROW)>(planes[P]);
      return index<PAIR, ROW, P + 1>(_mm512_ternarylogic_epi64(below, low, plane, 0xca));
    }
  }

  template <int PAIR>
  BL_INLINE void levels(const Book& book, __m512i* first, __m512i* second) const {
    const __m512i found = _mm512_xor_si512(
        _mm512_gf2p8affine_epi64_epi8(planes[0], _mm512_set1_epi64(static_cast<int64_t>(pair_taps<K>(PAIR, false))), 0),
        _mm512_gf2p8affine_epi64_epi8(before, _mm512_set1_epi64(static_cast<int64_t>(pair_taps<K>(PAIR, true))), 0));
    *first = _mm512_permutexvar_epi8(index<PAIR, 0>(found), book.first);
    *second = _mm512_permutexvar_epi8(index<PAIR, 1>(_mm512_srli_epi64(found, 4)), book.second);
  }
};

// ---- cells from the order of the file ---------------------------------------------------------------------------------

__m512i turning() {
  alignas(64) uint8_t from[64];
  for (int i = 0; i < 64; ++i) from[i] = static_cast<uint8_t>(i % 8 * 8 + i / 8);
  return _mm512_load_si512(from);
}

// A line from what `count` columns have at `at`: eight bytes of each, or `left`.
BL_INLINE void gather_line(const uint8_t* at, int64_t apart, int64_t count, int64_t left, __m512i turn, uint8_t* line) {
  if (__builtin_expect(count == CELL && left >= 8, true)) {
    const auto word = [&](int64_t j) { return static_cast<int64_t>(load64(at + j * apart)); };
    const __m512i words = _mm512_set_epi64(word(7), word(6), word(5), word(4), word(3), word(2), word(1), word(0));
    return _mm512_storeu_si512(line, _mm512_permutexvar_epi8(turn, words));
  }
  alignas(64) uint64_t words[CELL] = {};
  for (int64_t j = 0; j < count; ++j) std::memcpy(&words[j], at + j * apart, static_cast<size_t>(left < 8 ? left : 8));
  _mm512_storeu_si512(line, _mm512_permutexvar_epi8(turn, _mm512_load_si512(words)));
}

// Room for the cells of a piece that are not read where they lie.
struct Gathered {
  alignas(64) uint8_t codes[PIECE / CELL * 4 * LINE];
  uint8_t before[PIECE];
};

// Cells from stored columns, `chunk` of 64 rows.
void gather_cells(const Stored& s, int bits, int64_t columns, int64_t chunk, uint8_t* codes) {
  const __m512i turn = turning();
  for (int64_t j = 0; j < columns; j += CELL)
    for (int p = 0; p < bits; ++p, codes += LINE) {
      const int64_t count = columns - j < CELL ? columns - j : CELL;
      gather_line(s.codes + j * s.column_bytes + p * s.bytes + 8 * chunk, s.column_bytes, count, s.bytes - 8 * chunk, turn, codes);
    }
}

void gather_before(const Stored& s, int64_t columns, int64_t chunk, uint8_t* before) {
  const int64_t at = chunk > 0 ? 8 * chunk - 1 : s.bytes - 1;
  std::memset(before, 0, static_cast<size_t>((columns + CELL - 1) / CELL * CELL));
  for (int64_t j = 0; j < columns; ++j) before[j] = s.codes[j * s.column_bytes + at];
}

// What is left of each column behind the last whole sixty-four rows of an arranged matrix.
Stored tail(const bl_matrix& m, int64_t column) {
  const int64_t whole = m.rows / BLOCK * 8, bytes = plane_bytes(m) - whole;
  return {m.codes + m.columns * whole * m.bits + column * bytes * m.bits, bytes * m.bits, bytes};
}

Cells cells_of(const ColumnProduct& p, int64_t begin, int64_t columns, Gathered& room) {
  const bl_matrix& m = *p.matrix;
  const int64_t chunk = p.row / BLOCK, blocks = m.rows / BLOCK, count = (columns + CELL - 1) / CELL, apart = m.bits * LINE;
  if (!(m.flags & BL_ARRANGED)) {
    const Stored s = stored(m, begin);
    gather_cells(s, m.bits, columns, chunk, room.codes);
    gather_before(s, columns, chunk, room.before);
    return {room.codes, room.before, CELL, count};
  }
  const int64_t at = begin / CELL * apart, block = m.columns / CELL * apart;
  Cells found{m.codes + chunk * block + at, m.codes + (chunk - 1) * block + at + LINE - CELL, apart, count};
  const Stored rest = tail(m, begin);
  if (chunk == blocks) gather_cells(rest, m.bits, columns, 0, room.codes), found.codes = room.codes;
  if (chunk > 0) return found;
  found.before += blocks * block;
  if (rest.bytes > 0) gather_before(rest, columns, 0, room.before), found.before = room.before, found.apart = CELL;
  return found;
}

// ---- the input ---------------------------------------------------------------------------------------------------------

// Digits of sixteen numbers, the lowest first: -128 to 127 each. What is left is returned.
BL_INLINE __m512i take_digit(__m512i numbers, __m512i* digit) {
  *digit = _mm512_srai_epi32(_mm512_slli_epi32(numbers, 24), 24);
  return _mm512_srai_epi32(_mm512_sub_epi32(numbers, *digit), 8);
}

template <int DIGITS>
void write_piece(const float* x, int64_t size, float scale, char* to, uint32_t* starts) {
  __m512i sums[DIGITS];
  for (int k = 0; k < DIGITS; ++k) sums[k] = _mm512_setzero_si512();
  for (int64_t i = 0; i < size; i += 16) {
    __m512i left = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + i), _mm512_set1_ps(scale)));
#pragma GCC unroll 3
    for (int k = 0; k < DIGITS; ++k) {
      __m512i digit;
      left = take_digit(left, &digit);
      sums[k] = _mm512_add_epi32(sums[k], digit);
      const __m128i bytes = _mm512_cvtepi32_epi8(digit);
      const int64_t first = _mm_cvtsi128_si64(bytes), second = _mm_extract_epi64(bytes, 1);
      std::memcpy(to + (i / CELL * DIGITS + k) * CELL, &first, CELL);
      if (i + CELL < size) std::memcpy(to + ((i / CELL + 1) * DIGITS + k) * CELL, &second, CELL);
    }
  }
  uint32_t totals[3] = {};
  for (int k = 0; k < DIGITS; ++k) totals[k] = static_cast<uint32_t>(_mm512_reduce_add_epi32(sums[k]));
  starts[0] = DIGITS == 1 ? 0 - 128 * totals[0] : 0 - 128 * (256 * totals[DIGITS - 1] + totals[DIGITS - 2]);
  starts[1] = 0 - 128 * totals[0];
}

template <int DIGITS>
void write_digits(const ColumnInput& in) {
  // three digits, the largest of which may be 127 for the next one not to overflow; eight bits are the whole row's
  constexpr float TOP = DIGITS == 1 ? 127.0f : DIGITS == 2 ? 32600.0f : 8355000.0f;
  const Pieces& p = in.pieces;
  Preparation as_it_came{};
  as_it_came.x = in.x, as_it_came.columns = p.columns, as_it_came.dtype = in.dtype;
  alignas(64) float x[PIECE + 16];
  float* steps = reinterpret_cast<float*>(in.out + ColumnInput::steps_at(p, DIGITS));
  uint32_t* starts = reinterpret_cast<uint32_t*>(in.out + ColumnInput::starts_at(p, DIGITS));
  float most = 0, rest = 0;
  if (DIGITS == 1)
    for (int64_t begin = 0; begin < p.columns; begin += PIECE) {
      const float found = widen(as_it_came, begin, PIECE, x);
      most = found > most ? found : most;
      for (int64_t i = 0; i < PIECE; ++i) rest += x[i] - x[i];  // not 0 where a value is no number
    }
  for (int64_t piece = 0; piece < p.count(); ++piece) {
    const int64_t begin = p.begin(piece), size = p.size(piece);
    if (size == 0) continue;
    const float found = widen(as_it_came, begin, size, x);
    for (int64_t i = size; i < size + 16 && i < PIECE + 16; ++i) x[i] = 0;
    if (DIGITS > 1) most = found;
    const float scale = rest != 0 ? 0.0f : most > SMALLEST ? TOP / most : TOP / SMALLEST;
    write_piece<DIGITS>(x, size, scale, in.out + begin * DIGITS, starts + 2 * piece);
    steps[piece] = (most > SMALLEST ? most : SMALLEST) / TOP + rest;
  }
}

// ---- sums --------------------------------------------------------------------------------------------------------------

// Four vectors of rows in their order -> [pair][8 bytes][2 rows], and back: what dot products leave.
BL_INLINE void to_pairs(const __m512* rows, __m512* pairs) {
  const __m512 a = _mm512_shuffle_f32x4(rows[0], rows[1], 0x88), b = _mm512_shuffle_f32x4(rows[0], rows[1], 0xdd);
  const __m512 c = _mm512_shuffle_f32x4(rows[2], rows[3], 0x88), d = _mm512_shuffle_f32x4(rows[2], rows[3], 0xdd);
  const __m512d even = _mm512_castps_pd(_mm512_shuffle_f32x4(a, c, 0x88)), odd = _mm512_castps_pd(_mm512_shuffle_f32x4(a, c, 0xdd));
  const __m512d even2 = _mm512_castps_pd(_mm512_shuffle_f32x4(b, d, 0x88)), odd2 = _mm512_castps_pd(_mm512_shuffle_f32x4(b, d, 0xdd));
  pairs[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(even, odd)), pairs[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(even, odd));
  pairs[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(even2, odd2)), pairs[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(even2, odd2));
}

void add_in_order(const float* pairs, float* totals) {
  for (int64_t row = 0; row < BLOCK; ++row) totals[row] += pairs[paired(row)];
}

// Sums of two rows of each byte over four columns in each lane -> over eight.
BL_INLINE __m512i join(__m512i first, __m512i second) {
  const __m512i low = _mm512_mask_shuffle_epi32(first, 0xaaaa, second, _MM_PERM_CCAA), high = _mm512_mask_shuffle_epi32(second, 0x5555, first, _MM_PERM_DDBB);
  return _mm512_add_epi32(low, high);
}

// Sums of COUNT pairs, from FIRST on, for one row of the input.
template <int DIGITS, int COUNT>
struct Sums {
  __m512i of[DIGITS][2 * COUNT];

  BL_INLINE Sums() {
#pragma GCC unroll 3
    for (int k = 0; k < DIGITS; ++k)
#pragma GCC unroll 8
      for (int i = 0; i < 2 * COUNT; ++i) of[k][i] = _mm512_setzero_si512();
  }

  BL_INLINE void add(int i, __m512i levels, const __m512i* digits) {
#pragma GCC unroll 3
    for (int k = 0; k < DIGITS; ++k) of[k][i] = _mm512_dpbusd_epi32(of[k][i], levels, digits[k]);
  }

  // Pair i as float32, in steps.
  BL_INLINE __m512 total(int i, const uint32_t* starts) const {
    __m512i first = of[DIGITS - 1][2 * i], second = of[DIGITS - 1][2 * i + 1];
    if constexpr (DIGITS > 1) {
      first = _mm512_add_epi32(_mm512_slli_epi32(first, 8), of[DIGITS - 2][2 * i]);
      second = _mm512_add_epi32(_mm512_slli_epi32(second, 8), of[DIGITS - 2][2 * i + 1]);
    }
    const __m512 high = _mm512_cvtepi32_ps(_mm512_add_epi32(join(first, second), _mm512_set1_epi32(static_cast<int>(starts[0]))));
    if constexpr (DIGITS < 3) return high;
    const __m512i low = _mm512_add_epi32(join(of[0][2 * i], of[0][2 * i + 1]), _mm512_set1_epi32(static_cast<int>(starts[1])));
    return _mm512_fmadd_ps(high, _mm512_set1_ps(256), _mm512_cvtepi32_ps(low));
  }
};

template <int DIGITS>
BL_INLINE void read_digits(const char* x, int64_t cell, __m512i* digits) {
#pragma GCC unroll 3
  for (int k = 0; k < DIGITS; ++k)
    digits[k] = _mm512_set1_epi64(static_cast<int64_t>(load64(reinterpret_cast<const uint8_t*>(x) + (cell * DIGITS + k) * CELL)));
}

// A piece for one row of the input, levels found and used at once: COUNT pairs of rows of each byte.
template <int K, int DIGITS, int FIRST, int COUNT>
BL_INLINE void sum_cells(const Cells& cells, const char* x, const uint32_t* starts, __m512* found) {
  const Book book{Cell<K>::template table<0>(), Cell<K>::template table<1>()};
  Sums<DIGITS, COUNT> sums;
  const uint8_t *codes = cells.codes, *before = cells.before;
  for (int64_t c = 0; c < cells.count; ++c, codes += K * LINE, before += cells.apart) {
#pragma GCC unroll 4
    for (int p = 0; p < K && FIRST == 0; ++p) _mm_prefetch(codes + FAR + p * LINE, _MM_HINT_T0);
    const Cell<K> cell(codes, before);
    __m512i digits[DIGITS];
    read_digits<DIGITS>(x, c, digits);
    const auto add = [&](auto pair) __attribute__((always_inline)) {
      constexpr int PAIR = decltype(pair)::value;
      __m512i first, second;
      cell.template levels<FIRST + PAIR>(book, &first, &second);
      sums.add(2 * PAIR, first, digits), sums.add(2 * PAIR + 1, second, digits);
    };
    add(Number<0>{});
    if constexpr (COUNT > 1) add(Number<1>{});
    if constexpr (COUNT > 2) add(Number<2>{}), add(Number<3>{});
  }
#pragma GCC unroll 4
  for (int i = 0; i < COUNT; ++i) found[i] = sums.total(i, starts);
}

// Levels of a piece, [cells][8 rows of a byte][64].
template <int K>
void write_levels(const Cells& cells, uint8_t* to) {
  const Book book{Cell<K>::template table<0>(), Cell<K>::template table<1>()};
  const uint8_t *codes = cells.codes, *before = cells.before;
  for (int64_t c = 0; c < cells.count; ++c, codes += K * LINE, before += cells.apart, to += LEVELS) {
#pragma GCC unroll 4
    for (int p = 0; p < K; ++p) _mm_prefetch(codes + FAR + p * LINE, _MM_HINT_T0);
    const Cell<K> cell(codes, before);
    __m512i levels[2 * PAIRS];
    cell.template levels<0>(book, levels, levels + 1), cell.template levels<1>(book, levels + 2, levels + 3);
    cell.template levels<2>(book, levels + 4, levels + 5), cell.template levels<3>(book, levels + 6, levels + 7);
#pragma GCC unroll 8
    for (int i = 0; i < 2 * PAIRS; ++i) _mm512_store_si512(to + i * LINE, levels[i]);
  }
}

template <int DIGITS, int FIRST, int COUNT>
BL_INLINE void sum_levels(const uint8_t* levels, int64_t cells, const char* x, const uint32_t* starts, __m512* found) {
  Sums<DIGITS, COUNT> sums;
  for (int64_t c = 0; c < cells; ++c, levels += LEVELS) {
    __m512i digits[DIGITS];
    read_digits<DIGITS>(x, c, digits);
#pragma GCC unroll 8
    for (int i = 0; i < 2 * COUNT; ++i) sums.add(i, _mm512_load_si512(levels + (2 * FIRST + i) * LINE), digits);
  }
#pragma GCC unroll 4
  for (int i = 0; i < COUNT; ++i) found[i] = sums.total(i, starts);
}

// The scales of a group times a power of two, in the order of pairs.
BL_INLINE void pair_scales(const ColumnProduct& p, int64_t group, __m512* scales) {
  const __m512 unit = _mm512_set1_ps(p.unit);
  __m512 rows[4];
#pragma GCC unroll 4
  for (int v = 0; v < 4; ++v) {
    const int64_t at = group * BLOCK + 16 * v;
    const __m512 scale = p.scales != nullptr ? _mm512_loadu_ps(p.scales + at) : load_halves(reinterpret_cast<const uint8_t*>(p.halves + at)).v;
    rows[v] = scales[v] = _mm512_mul_ps(scale, unit);
  }
  if (!p.in_pairs) to_pairs(rows, scales);
}

// One piece of one block for all rows of the input.
template <int K, int DIGITS>
void multiply_piece(const ColumnProduct& p, const Pieces& pieces, int64_t piece, Gathered& room, uint8_t* levels) {
  constexpr int AT_ONCE = DIGITS < 3 ? PAIRS : PAIRS / 2;  // as many sums as the registers hold
  const int64_t steps_at = ColumnInput::steps_at(pieces, DIGITS), starts_at = ColumnInput::starts_at(pieces, DIGITS);
  const int64_t begin = pieces.begin(piece);
  const Cells cells = cells_of(p, begin, pieces.size(piece), room);
  __m512 scales[PAIRS];
  pair_scales(p, begin / pieces.group, scales);
  if (p.inputs > 1) write_levels<K>(cells, levels);
  for (int64_t r = 0; r < p.inputs; ++r) {
    const char* row = p.x + r * p.stride;
    const char* x = row + begin * DIGITS;
    const uint32_t* starts = reinterpret_cast<const uint32_t*>(row + starts_at) + 2 * piece;
    __m512 found[PAIRS];
    if (p.inputs > 1) {
      sum_levels<DIGITS, 0, AT_ONCE>(levels, cells.count, x, starts, found);
      if constexpr (AT_ONCE < PAIRS) sum_levels<DIGITS, AT_ONCE, AT_ONCE>(levels, cells.count, x, starts, found + AT_ONCE);
    } else {
      sum_cells<K, DIGITS, 0, AT_ONCE>(cells, x, starts, found);
      if constexpr (AT_ONCE < PAIRS) sum_cells<K, DIGITS, AT_ONCE, AT_ONCE>(cells, x, starts, found + AT_ONCE);
    }
    const __m512 step = _mm512_set1_ps(LEVEL_UNIT * reinterpret_cast<const float*>(row + steps_at)[piece]);
    float* total = p.room + r * BLOCK;
#pragma GCC unroll 4
    for (int i = 0; i < PAIRS; ++i)
      _mm512_storeu_ps(total + 16 * i, _mm512_fmadd_ps(_mm512_mul_ps(found[i], step), scales[i], _mm512_loadu_ps(total + 16 * i)));
  }
}

template <int K, int DIGITS>
void multiply_digits(const ColumnProduct& p) {
  const Pieces pieces{p.matrix->columns, p.matrix->group};
  const int64_t sums = p.blocks * p.inputs;
  std::memset(p.room, 0, static_cast<size_t>(sums * BLOCK * 4));
  Gathered room;
  alignas(64) uint8_t levels[PIECE / CELL * LEVELS];
  for (int64_t piece = 0; piece < pieces.count(); ++piece)
    for (int64_t b = 0; b < p.blocks && pieces.size(piece) > 0; ++b) multiply_piece<K, DIGITS>(p.block(b), pieces, piece, room, levels);
  for (int64_t i = 0; i < sums; ++i) add_in_order(p.room + i * BLOCK, p.totals + i * BLOCK);
}

template <int K>
void multiply_by(const ColumnProduct& p) {
  if (p.digits == 1) return multiply_digits<K, 1>(p);
  if (p.digits == 2) return multiply_digits<K, 2>(p);
  multiply_digits<K, 3>(p);
}

// ---- as float32 --------------------------------------------------------------------------------------------------------

template <int K>
void float_levels(const ColumnProduct& p, int64_t begin, int64_t columns, float* to) {
  Gathered room;
  alignas(64) uint8_t levels[SOME / CELL * LEVELS];
  write_levels<K>(cells_of(p, begin, columns, room), levels);
  for (int64_t j = 0; j < columns; ++j)
    for (int64_t row = 0; row < BLOCK; ++row) {
      const uint8_t level = levels[j / CELL * LEVELS + row % 8 * LINE + row / 8 * CELL + j % CELL];
      to[j * BLOCK + row] = static_cast<float>(level - 128) * LEVEL_UNIT;
    }
}

#else

template <int K>
void float_levels(const ColumnProduct& p, int64_t begin, int64_t columns, float* to) {
  alignas(64) int8_t levels[BLOCK];
  for (int64_t j = 0; j < columns; ++j) {
    const Stored s = stored(*p.matrix, begin + j);
    trellis_levels<K>(s.codes, s.bytes, p.row / BLOCK, levels);
    for (int64_t i = 0; i < BLOCK; i += 16) store(to + j * BLOCK + i, multiply(load_levels(levels + i), all(LEVEL_UNIT)));
  }
}

#endif

// Sixty-four sums of one row of the input, the scales of its columns left out.
inline void sum_floats(const float* levels, int64_t columns, const float* x, Lanes* sums) {
  for (int v = 0; v < 4; ++v) sums[v] = none();
  for (int64_t j = 0; j < columns; ++j, levels += BLOCK)
    for (int v = 0; v < 4; ++v) sums[v] = fma(all(x[j]), load(levels + 16 * v), sums[v]);
}

// The scales of a group in the order of rows.
inline void row_scales(const ColumnProduct& p, int64_t group, float* to) {
  alignas(64) float scales[BLOCK];
  for (int64_t i = 0; i < BLOCK; i += 16) {
    const int64_t at = group * BLOCK + i;
    store(scales + i, p.scales != nullptr ? load(p.scales + at) : multiply(load_halves(reinterpret_cast<const uint8_t*>(p.halves + at)), all(p.unit)));
  }
  for (int64_t row = 0; row < BLOCK; ++row) to[row] = scales[p.in_pairs ? paired(row) : row];
}

template <int K>
void multiply_floats(const ColumnProduct& every) {
  const bl_matrix& m = *every.matrix;
  alignas(64) float levels[SOME * BLOCK], scales[BLOCK];
  for (int64_t begin = 0, columns; begin < m.columns; begin += columns) {
    const int64_t group = begin / m.group, end = (group + 1) * m.group < m.columns ? (group + 1) * m.group : m.columns;
    columns = end - begin < SOME ? end - begin : SOME;
    for (int64_t b = 0; b < every.blocks; ++b) {
      const ColumnProduct p = every.block(b);
      float_levels<K>(p, begin, columns, levels);
      row_scales(p, group, scales);
      for (int64_t r = 0; r < p.inputs; ++r) {
        Lanes sums[4];
        sum_floats(levels, columns, reinterpret_cast<const float*>(p.x + r * p.stride) + begin, sums);
        for (int v = 0; v < 4; ++v) {
          float* total = p.totals + r * BLOCK + 16 * v;
          store(total, fma(sums[v], load(scales + 16 * v), load(total)));
        }
      }
    }
  }
}

float number_at(const void* x, int64_t i, int32_t dtype) {
  if (dtype == BL_F32) return static_cast<const float*>(x)[i];
  const uint16_t half = static_cast<const uint16_t*>(x)[i];
  if (dtype == BL_F16) return half_value(half);
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace

void prepare_column_input(const ColumnInput& in) {
#if defined(BL_HAS_avx512)
  if (in.digits == 1) return write_digits<1>(in);
  if (in.digits == 2) return write_digits<2>(in);
  if (in.digits == 3) return write_digits<3>(in);
#endif
  float* to = reinterpret_cast<float*>(in.out);
  for (int64_t i = 0; i < in.pieces.cells() * CELL; ++i) to[i] = i < in.pieces.columns ? number_at(in.x, i, in.dtype) : 0.0f;
}

void column_product(const ColumnProduct& p) {
#if defined(BL_HAS_avx512)
  if (p.digits > 0) switch (p.matrix->bits) {
      case 1: return multiply_by<1>(p);
      case 2: return multiply_by<2>(p);
      case 3: return multiply_by<3>(p);
      default: return multiply_by<4>(p);
    }
#endif
  switch (p.matrix->bits) {
    case 1: return multiply_floats<1>(p);
    case 2: return multiply_floats<2>(p);
    case 3: return multiply_floats<3>(p);
    default: return multiply_floats<4>(p);
  }
}

// Sixty-four rows of all columns, which fill cells.
void move_columns([[maybe_unused]] const ColumnMove& move) {
#if defined(BL_HAS_avx512)
  const bl_matrix& m = *move.matrix;
  const int64_t bytes = plane_bytes(m), block = m.columns * 8 * m.bits;
  if (!move.back) return gather_cells({move.copy, bytes * m.bits, bytes}, m.bits, m.columns, move.block, move.codes + move.block * block);
  const __m512i turn = turning();
  const uint8_t* line = move.copy + move.block * block;
  for (int64_t j = 0; j < m.columns; j += CELL)
    for (int p = 0; p < m.bits; ++p, line += LINE) {
      alignas(64) uint8_t words[LINE];
      _mm512_store_si512(words, _mm512_permutexvar_epi8(turn, _mm512_loadu_si512(line)));
      for (int64_t i = 0; i < CELL; ++i) std::memcpy(move.codes + (j + i) * bytes * m.bits + p * bytes + 8 * move.block, words + 8 * i, 8);
    }
#endif
}

}  // namespace bl::BL_ISA
