// Sixty-four rows of a packed matrix times rows of the input: see product.hpp for the order of the codes.
//
// Every total is the sum over groups of scale * (sum of level * x in the order of the pairs), however many input rows
// there are: `direct` looks levels up as it goes, for up to FEW rows; `tiled` writes them down once and multiplies them
// with all rows, in the same order. Only Input::SUMS, for one row, adds pairs of products from a table first.
//
// Compiled once per instruction set.
#include "kernels.hpp"
#include "product.hpp"
#include "three.hpp"
#include "words.hpp"

#if defined(BL_HAS_avx512) || defined(BL_HAS_avx2)
#define BL_INLINE inline __attribute__((always_inline))
#define UNROLL(n) _Pragma(BL_TEXT(GCC unroll n))
#define BL_TEXT(x) #x
#else  // sixteen lanes are a loop themselves: more of it would only be more code
#define BL_INLINE inline
#define UNROLL(n)
#endif

namespace bl::BL_ISA {

void prepare_planes(const Preparation& p);  // product_bytes.cpp
void by_bytes(const Product& p);
void by_tables(const Product& p);
void prepare_eight_bits(const Preparation& p);
void by_quads(const Product& p);
void prepare_threes(const Preparation& p);  // product_sixes.cpp
void by_sixes(const Product& p);

namespace {

constexpr int VECTORS = BLOCK / 16;
constexpr int MOST = 6;  // rows of the input whose sums fit the registers beside four vectors of values
constexpr int AHEAD = 8192;  // bytes of codes fetched ahead: a hardware prefetcher alone leaves half the bandwidth

#if defined(BL_HAS_avx512)
template <int BITS>
constexpr bool WRITTEN_OUT = BITS == 3;  // words are put in order first, the fourth with them
#else
template <int BITS>
constexpr bool WRITTEN_OUT = false;
#endif
// Words of a unit as the kernels step through them, and room for those of a piece.
template <int BITS>
constexpr int64_t STRIDE = (WRITTEN_OUT<BITS> ? 4 : unit_words(BITS)) * BLOCK;
template <int BITS>
constexpr int64_t ROOM = WRITTEN_OUT<BITS> ? PIECE / unit_columns(BITS) * STRIDE<BITS> : 16;

// Two codes of a unit for each of sixteen rows, at the bottom of both halves of a word; `i` is known when compiled.
template <int BITS>
BL_INLINE Words pair_at(const uint32_t* codes, int i) {
  if constexpr (BITS == 3) {
    const int shift = i % 2 * 3 + i % 4 / 2 * 8;
    if (i < 12 || WRITTEN_OUT<3>) return right(load_words(codes + i / 4 * BLOCK), shift);
    const Words first = right(load_words(codes), 6), second = right(load_words(codes + BLOCK), 4);
    const Words third = right(load_words(codes + 2 * BLOCK), 2);
    return right(select(all_words(0x30303030), third, select(all_words(0x0c0c0c0c), second, first)), shift);
  }
  return right(load_words(codes), BITS * i);
}

// sum + value * x, or the dot product of two pairs
template <Input INPUT>
BL_INLINE Lanes step(Lanes sum, Lanes value, uint32_t x) {
#if defined(BL_HAS_avx512)
  if constexpr (INPUT == Input::PAIRS) return dot(sum, {_mm512_castps_si512(value.v)}, all_words(x));
#endif
  float number;
  std::memcpy(&number, &x, sizeof number);
  return fma(value, all(number), sum);
}

// What a unit contributes: X words of the input, each used with STEPS vectors of values of sixteen rows.
template <int BITS, Input INPUT>
struct Unit;

template <int BITS>
struct Unit<BITS, Input::SINGLE> {
  static constexpr int STEPS = unit_columns(BITS), X = STEPS;
  Book<BITS> book;
  explicit Unit(const float* levels) : book(levels) {}

  BL_INLINE Lanes values(const uint32_t* codes, int i) const {
    const Words pair = pair_at<BITS>(codes, i / 2);
    return book.find(i % 2 == 0 ? pair : right(pair, 16));
  }
};

#if defined(BL_HAS_avx512)
template <int BITS>
struct Unit<BITS, Input::PAIRS> {
  static constexpr int STEPS = unit_columns(BITS) / 2, X = STEPS;
  PairBook<BITS> book;
  explicit Unit(const float* levels) : book(levels) {}

  BL_INLINE Lanes values(const uint32_t* codes, int i) const {
    return {_mm512_castsi512_ps(book.find(pair_at<BITS>(codes, i)).v)};
  }
};
#endif

// The part of a group that one look at the scale ends: calls f(first unit, units, group).
template <int BITS, class F>
BL_INLINE void each_piece(const Product& p, F&& f) {
  constexpr int64_t most = PIECE / unit_columns(BITS);
  for (int64_t group = 0; group < p.groups; ++group) {
    for (int64_t unit = 0; unit < p.group_units; unit += most) {
      const int64_t left = p.group_units - unit;
      f(group * p.group_units + unit, left < most ? left : most, group);
    }
  }
}

// One row reads as fast as memory does: its codes come to the second-level cache first, which has room for more on the way.
template <int BITS, bool FAR = false>
BL_INLINE void fetch_ahead(const uint32_t* codes) {
UNROLL(12)
  for (int line = 0; line < unit_words(BITS) * VECTORS; ++line) {
    const char* at = reinterpret_cast<const char*>(codes) + line * 64;
    if constexpr (FAR) __builtin_prefetch(at + 2 * AHEAD, 0, 2);
    else __builtin_prefetch(at + AHEAD);
  }
}

BL_INLINE void fetch_scales(const Product& p, int64_t group) {
  for (int64_t byte = 0; byte < p.next_bytes; byte += 64) __builtin_prefetch(p.next + group * p.next_bytes + byte);
}

// The words of a piece, [units][STRIDE]; `room` holds them where they lie in another order.
template <int BITS>
BL_INLINE const uint32_t* words_of(const Product& p, int64_t unit, [[maybe_unused]] int64_t units, [[maybe_unused]] int64_t block, [[maybe_unused]] uint32_t* room) {
#if defined(BL_HAS_avx512)
  if constexpr (WRITTEN_OUT<BITS>) {
    constexpr int64_t WORDS = unit_words(BITS) * BLOCK;
    const uint32_t* codes = p.codes + piece_at(unit, units, p.beside, p.place + block);
    const char* next = reinterpret_cast<const char*>(codes + later(p, block) * units * WORDS);
    for (int64_t u = 0; u < units; ++u) {
UNROLL(12)
      for (int64_t line = 0; line < WORDS * 4; line += 64) __builtin_prefetch(next + u * WORDS * 4 + line, 0, 2);
      write_words(codes + u * WORDS, room + u * STRIDE<BITS>);
    }
    return room;
  }
#endif
  return p.codes + unit * unit_words(BITS) * BLOCK;
}

// The scales of sixteen rows.
BL_INLINE Lanes scale_of(const Product& p, int64_t group, int64_t block, int vector) {
  const int64_t at = p.scale_at(group, block) + vector * 16;
  if (p.scales != nullptr) return load(p.scales + at);
  return multiply(load_halves(reinterpret_cast<const uint8_t*>(p.halves + at)), all(p.unit));
}

template <int ROWS>
BL_INLINE void add_scaled(const Lanes* sums, const Product& p, int64_t group, float* totals, int64_t block = 0) {
UNROLL(4)
  for (int v = 0; v < VECTORS; ++v) {
    const Lanes scale = scale_of(p, group, block, v);
UNROLL(6)
    for (int r = 0; r < ROWS; ++r) {
      float* total = totals + r * BLOCK + v * 16;
      store(total, fma(sums[r * VECTORS + v], scale, load(total)));
    }
  }
}

template <int BITS, Input INPUT, int ROWS, int BLOCKS = 1>
void direct(const Product& p) {
  using Part = Unit<BITS, INPUT>;
  const Part part(p.levels);
  const int64_t stride = p.groups * p.group_units * unit_words(BITS) * BLOCK;
  each_piece<BITS>(p, [&](int64_t unit, int64_t units, int64_t group) {
    for (int64_t block = 0; block < (WRITTEN_OUT<BITS> ? p.blocks : 1); ++block) {
      constexpr int ACROSS = BLOCKS * VECTORS;
      Lanes sums[ROWS * ACROSS];
UNROLL(16)
      for (int i = 0; i < ROWS * ACROSS; ++i) sums[i] = none();
      alignas(64) uint32_t room[ROOM<BITS>];
      const uint32_t* codes = words_of<BITS>(p, unit, units, block, room);
      const uint32_t* x = static_cast<const uint32_t*>(p.x) + unit * Part::X;
      for (int64_t u = 0; u < units; ++u, codes += STRIDE<BITS>, x += Part::X) {
UNROLL(2)
        for (int b = 0; b < BLOCKS && !WRITTEN_OUT<BITS>; ++b) fetch_ahead<BITS, ROWS == 1>(codes + b * stride);
UNROLL(32)
        for (int i = 0; i < Part::STEPS; ++i) {
          Lanes values[ACROSS];
UNROLL(8)
          for (int v = 0; v < ACROSS; ++v) values[v] = part.values(codes + v / VECTORS * stride + v % VECTORS * 16, i);
UNROLL(4)
          for (int r = 0; r < ROWS; ++r) {
            const uint32_t number = x[r * p.x_stride + i];
UNROLL(8)
            for (int v = 0; v < ACROSS; ++v) sums[r * ACROSS + v] = step<INPUT>(sums[r * ACROSS + v], values[v], number);
          }
        }
      }
UNROLL(2)
      for (int b = 0; b < BLOCKS; ++b) add_scaled<ROWS>(sums + b * VECTORS, p, group, p.totals + (block + b) * ROWS * BLOCK, block + b);
    }
    fetch_scales(p, group);
  });
}

// One row, 1 or 2 bits, in float32: four bits of codes choose one of sixteen sums of products.
template <int BITS>
void by_sums(const Product& p) {
  each_piece<BITS>(p, [&](int64_t unit, int64_t units, int64_t group) {
    Lanes sums[VECTORS] = {none(), none(), none(), none()};
    const uint32_t* codes = p.codes + unit * BLOCK;
    const float* table = static_cast<const float*>(p.x) + unit * 8 * 16;
    for (int64_t u = 0; u < units; ++u, codes += BLOCK, table += 8 * 16) {
      fetch_ahead<BITS>(codes);
UNROLL(8)
      for (int i = 0; i < 8; ++i)
UNROLL(4)
        for (int v = 0; v < VECTORS; ++v)
          sums[v] = add(sums[v], find_sum(right(load_words(codes + v * 16), 4 * i), table + 16 * i));
    }
    add_scaled<1>(sums, p, group, p.totals);
    fetch_scales(p, group);
  });
}

// A piece written down for many rows: values of sixty-four rows for one step after the other.
template <int BITS, Input INPUT>
BL_INLINE void write_down(const Unit<BITS, INPUT>& part, const Product& p, int64_t unit, int64_t units, int64_t block, float* tile) {
  alignas(64) uint32_t room[ROOM<BITS>];
  const uint32_t* codes = words_of<BITS>(p, unit, units, block, room);
  for (int64_t u = 0; u < units; ++u, codes += STRIDE<BITS>, tile += part.STEPS * BLOCK) {
    if constexpr (!WRITTEN_OUT<BITS>) fetch_ahead<BITS>(codes);
UNROLL(32)
    for (int i = 0; i < part.STEPS; ++i)
UNROLL(4)
      for (int v = 0; v < VECTORS; ++v) store(tile + i * BLOCK + v * 16, part.values(codes + v * 16, i));
  }
}

// Some pieces that were written down, one after the other: each has a scale of its own and `steps` steps.
struct Written {
  int64_t block, group, pieces, steps;
  const float* tile;
};

// Half of the vectors at a time: then totals stay in registers beside the sums, from piece to piece.
template <Input INPUT, int ROWS>
void multiply_rows(const Product& p, const Written& w, const uint32_t* from, float* totals) {
  constexpr int HALF = VECTORS / 2;
  for (int first = 0; first < VECTORS; first += HALF) {
    const float* tile = w.tile + first * 16;
    const uint32_t* x = from;
    Lanes total[ROWS * HALF];
UNROLL(12)
    for (int i = 0; i < ROWS * HALF; ++i) total[i] = load(totals + i / HALF * BLOCK + (first + i % HALF) * 16);
    for (int64_t piece = 0; piece < w.pieces; ++piece) {
      Lanes sums[ROWS * HALF];
UNROLL(12)
      for (int i = 0; i < ROWS * HALF; ++i) sums[i] = none();
      for (int64_t i = 0; i < w.steps; ++i, tile += BLOCK, ++x) {
        Lanes values[HALF];
UNROLL(2)
        for (int v = 0; v < HALF; ++v) values[v] = load(tile + v * 16);
UNROLL(6)
        for (int r = 0; r < ROWS; ++r)
UNROLL(2)
          for (int v = 0; v < HALF; ++v) sums[r * HALF + v] = step<INPUT>(sums[r * HALF + v], values[v], x[r * p.x_stride]);
      }
UNROLL(2)
      for (int v = 0; v < HALF; ++v) {
        const Lanes scale = scale_of(p, w.group + piece, w.block, first + v);
UNROLL(6)
        for (int r = 0; r < ROWS; ++r) total[r * HALF + v] = fma(sums[r * HALF + v], scale, total[r * HALF + v]);
      }
    }
UNROLL(12)
    for (int i = 0; i < ROWS * HALF; ++i) store(totals + i / HALF * BLOCK + (first + i % HALF) * 16, total[i]);
  }
}

template <Input INPUT>
void multiply_some(int64_t count, const Product& p, const Written& w, const uint32_t* x, float* totals) {
#if defined(BL_HAS_avx512) || defined(BL_HAS_avx2)
  switch (count) {
    case 6: return multiply_rows<INPUT, 6>(p, w, x, totals);
    case 5: return multiply_rows<INPUT, 5>(p, w, x, totals);
    case 4: return multiply_rows<INPUT, 4>(p, w, x, totals);
    case 3: return multiply_rows<INPUT, 3>(p, w, x, totals);
    default: break;
  }
#endif
  for (int64_t r = 0; r < count; ++r) multiply_rows<INPUT, 1>(p, w, x + r * p.x_stride, totals + r * BLOCK);
}

// As many groups at once as a piece has room for.
template <int BITS, class F>
BL_INLINE void each_chunk(const Product& p, F&& f) {
  constexpr int64_t most = PIECE / unit_columns(BITS);
  if (p.group_units > most) return each_piece<BITS>(p, [&](int64_t unit, int64_t units, int64_t group) { f(unit, units, group, 1); });
  const int64_t together = p.group_units > 0 ? most / p.group_units : 1;  // no columns, nothing to add
  for (int64_t group = 0; group < p.groups; group += together)
    f(group * p.group_units, p.group_units, group, p.groups - group < together ? p.groups - group : together);
}

template <int BITS, Input INPUT>
void tiled(const Product& p) {
  using Part = Unit<BITS, INPUT>;
  const Part part(p.levels);
  float* tile = static_cast<float*>(p.tile);
  const int64_t turns = (p.rows + MOST - 1) / MOST;
  each_chunk<BITS>(p, [&](int64_t unit, int64_t units, int64_t group, int64_t pieces) {
    for (int64_t block = 0; block < p.blocks; ++block) {
      for (int64_t i = 0; i < pieces; ++i) write_down<BITS, INPUT>(part, p, unit + i * units, units, block, tile + i * units * Part::STEPS * BLOCK);
      const Written written{block, group, pieces, units * Part::X, tile};
      for (int64_t turn = 0; turn < turns; ++turn) {
        const int64_t row = turn * p.rows / turns, count = (turn + 1) * p.rows / turns - row;
        const uint32_t* x = static_cast<const uint32_t*>(p.x) + row * p.x_stride + unit * Part::X;
        multiply_some<INPUT>(count, p, written, x, p.totals + (block * p.rows + row) * BLOCK);
      }
    }
  });
}

template <int BITS, Input INPUT>
void multiply(const Product& p) {
#if defined(BL_HAS_avx512) || defined(BL_HAS_avx2)
  switch (p.rows) {
    case 1:
      if constexpr (BITS == 4)
        if (p.blocks == 2) return direct<BITS, INPUT, 1, 2>(p);
      return direct<BITS, INPUT, 1>(p);
    case 2: return direct<BITS, INPUT, 2>(p);
    case 3: return direct<BITS, INPUT, 3>(p);
    case 4: return direct<BITS, INPUT, 4>(p);
    default: break;
  }
#endif
  tiled<BITS, INPUT>(p);
}

template <Input INPUT>
void multiply_by(const Product& p) {
  switch (p.bits) {
    case 1: return multiply<1, INPUT>(p);
    case 2: return multiply<2, INPUT>(p);
    case 3: return multiply<3, INPUT>(p);
    default: return multiply<4, INPUT>(p);
  }
}

void add_offsets(const Product& p) {
  for (int64_t i = 0; i < p.blocks * p.rows; ++i)
    for (int v = 0; v < VECTORS; ++v) {
      const float *offsets = p.offsets + i / p.rows * p.groups * BLOCK + v * 16, *sums = p.sums + i % p.rows * p.groups;
      Lanes total = load(p.totals + i * BLOCK + v * 16);
      for (int64_t group = 0; group < p.groups; ++group)
        total = fma(load(offsets + group * BLOCK), all(sums[group]), total);
      store(p.totals + i * BLOCK + v * 16, total);
    }
}

float value_of(const void* x, int64_t i, int32_t dtype) {
  if (dtype == BL_F32) return static_cast<const float*>(x)[i];
  const uint16_t bits = static_cast<const uint16_t*>(x)[i];
  if (dtype == BL_F16) return half_value(bits);
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

template <class Number, int64_t COLUMNS>
BL_INLINE void pair_up(const Number* from, Number* to) {
UNROLL(16)
  for (int64_t i = 0; i < COLUMNS / 2; ++i) to[2 * i] = from[i], to[2 * i + 1] = from[i + COLUMNS / 2];
}

// Whole units straight from the input, the last one by way of a copy that ends with zeros.
template <class Number, int64_t COLUMNS>
void pair_row(const Number* x, int64_t columns, int64_t units, Number* to) {
  const int64_t whole = columns / COLUMNS;
  for (int64_t u = 0; u < whole; ++u) pair_up<Number, COLUMNS>(x + u * COLUMNS, to + u * COLUMNS);
  for (int64_t u = whole; u < units; ++u) {
    Number last[COLUMNS] = {};
    for (int64_t i = u * COLUMNS; i < columns; ++i) last[i - u * COLUMNS] = x[i];
    pair_up<Number, COLUMNS>(last, to + u * COLUMNS);
  }
}

template <class Number>
void pair_row(const Preparation& p, const Number* x, int64_t columns) {
  Number* to = static_cast<Number*>(p.out);
  switch (unit_columns(p.bits)) {
    case 8: return pair_row<Number, 8>(x, columns, p.units, to);
    case 16: return pair_row<Number, 16>(x, columns, p.units, to);
    default: return pair_row<Number, 32>(x, columns, p.units, to);
  }
}

constexpr int64_t STRETCH = 1024;  // columns that are widened to float32 at once: a multiple of every unit

void prepare_single(const Preparation& p) {
  if (p.dtype == BL_F32) return pair_row(p, static_cast<const float*>(p.x), p.columns);
  Preparation part = p;
  for (int64_t begin = 0; begin < p.units * unit_columns(p.bits); begin += STRETCH) {
    alignas(64) float wide[STRETCH];
    const int64_t count = p.columns - begin < STRETCH ? p.columns - begin : STRETCH;
    for (int64_t i = 0; i < count; ++i) wide[i] = value_of(p.x, begin + i, p.dtype);
    const int64_t units = p.units - begin / unit_columns(p.bits), most = STRETCH / unit_columns(p.bits);
    part.units = units < most ? units : most;
    part.out = static_cast<float*>(p.out) + begin;
    pair_row(part, wide, count < 0 ? 0 : count);
  }
}

template <int BITS>
void prepare_sums(const Preparation& p) {
  constexpr int COLUMNS = 4 / BITS;
  alignas(64) float level[COLUMNS][16];
  for (int i = 0; i < COLUMNS; ++i)
    for (int c = 0; c < 16; ++c) level[i][c] = p.levels[c >> BITS * i & ((1 << BITS) - 1)];
  float* to = static_cast<float*>(p.out);
  for (int64_t column = 0; column < p.units * unit_columns(BITS); column += COLUMNS, to += 16) {
    Lanes sums = none();
    for (int i = 0; i < COLUMNS && column + i < p.columns; ++i)
      sums = fma(all(value_of(p.x, column + i, p.dtype)), load(level[i]), sums);
    store(to, sums);
  }
}

BL_INLINE void store_as(uint8_t* to, Lanes x, int32_t dtype) {
  if (dtype == BL_F32) return store(reinterpret_cast<float*>(to), x);
  if (dtype == BL_F16) return store_halves(to, x);
#if defined(BL_HAS_avx512)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x.v)));
#else
  store_brains(to, x);
#endif
}

}  // namespace

void prepare(const Preparation& p) {
  for (int64_t group = 0; p.sums != nullptr && group < p.groups; ++group) {
    const int64_t begin = group * p.group_columns, end = begin + p.group_columns;
    float sum = 0;
    for (int64_t i = begin; i < end && i < p.columns; ++i) sum += value_of(p.x, i, p.dtype);
    p.sums[group] = sum;
  }
  if (p.input == Input::TABLES) return;
  if (p.input == Input::BYTES && p.bits == 3) prepare_threes(p);
  else if (p.input == Input::BYTES) prepare_planes(p);
  else if (p.input == Input::QUADS) prepare_eight_bits(p);
  else if (p.input == Input::PAIRS) pair_row(p, static_cast<const uint16_t*>(p.x), p.columns);
  else if (p.input == Input::SINGLE) prepare_single(p);
  else if (p.bits == 1) prepare_sums<1>(p);
  else prepare_sums<2>(p);
}

void finish(const Finish& f) {
  const int64_t size = f.dtype == BL_F32 ? 4 : 2;
  for (int64_t row = 0; row < f.rows; ++row) {
    uint8_t* to = static_cast<uint8_t*>(f.out) + row * f.stride * size;
    for (int64_t i = 0; i < f.columns; i += 16) {
      const Lanes x = load(f.totals + row * BLOCK + i);
      if (f.columns - i >= 16) {
        store_as(to + i * size, x, f.dtype);
      } else {
        alignas(64) uint8_t last[64];
        store_as(last, x, f.dtype);
        std::memcpy(to + i * size, last, static_cast<size_t>((f.columns - i) * size));
      }
    }
  }
}

void product(const Product& p) {
  if (p.input == Input::BYTES) {
    if (p.bits == 3) by_sixes(p);
    else by_bytes(p);
  } else if (p.input == Input::TABLES) {
    by_tables(p);
  } else if (p.input == Input::QUADS) {
    by_quads(p);
  } else if (p.input == Input::SUMS) {
    if (p.bits == 1) by_sums<1>(p);
    else by_sums<2>(p);
  } else if (p.input == Input::SINGLE) {
    multiply_by<Input::SINGLE>(p);
  } else {
#if defined(BL_HAS_avx512)
    multiply_by<Input::PAIRS>(p);
#endif
  }
  if (p.offsets != nullptr) add_offsets(p);
}

}  // namespace bl::BL_ISA
