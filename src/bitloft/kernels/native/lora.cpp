// Low-rank products of a few rows, y[r] += sum over blocks of ((x[r] A^T) B), A and B being packed or plain rows.
//
// Two loops per block: `project` gives one number per component (a sum over the input, sixteen lanes times CHAINS sums
// in a fixed order), `expand` adds the components to the output one after the other. What a row gets does not depend on
// the rows beside it: more rows share the look-ups, and each runs through the same sums.
//
// Compiled once per instruction set.
#include <math.h>

#include "kernels.hpp"
#include "lanes.hpp"
#include "lora.hpp"
#include "trellis.hpp"

namespace bl::BL_ISA {
namespace {

constexpr int PIECES = LORA_CHUNK / 16;

// How the rows of a factor are stored; the first four are also their bits, and so are trellis codes above TRELLIS.
enum Code { SIGN = 1, TWO = 2, THREE = 3, FOUR = 4, BYTE = 8, HALF = 16, BRAIN = 17, SINGLE = 32, ANY = 33, TRELLIS = 40 };

template <int CODE>
constexpr int64_t chunk_bytes() {  // of the plane that holds most
  if (CODE == THREE) return LORA_CHUNK / 4;
  if (CODE > TRELLIS) return LORA_CHUNK / 8;
  if (CODE < BYTE) return LORA_CHUNK * CODE / 8;
  return CODE == BYTE ? LORA_CHUNK : CODE == HALF || CODE == BRAIN ? LORA_CHUNK * 2 : LORA_CHUNK * 4;
}

// Powers of two whose product with a half is exact in float32; an exponent beyond them is applied value by value.
constexpr int EXPONENTS = 100;

inline float half(const void* halves, int64_t i) { return half_value(load16(static_cast<const uint8_t*>(halves) + 2 * i)); }

// The numbers that belong to one group of one row: value = (level - zero) * scale + shift, in units of 2**exponent.
struct Group {
  float zero = 0, scale = 1, shift = 0;

  Group(const bl_matrix& m, int64_t row, int64_t group) {
    if (m.groups == 0) return;
    const int64_t at = (m.flags & BL_TENSOR ? 0 : row * m.groups) + group;
    if (m.flags & BL_DQ)
      scale = half(m.low, at / 256) + half(m.step, at / 256) * static_cast<const uint8_t*>(m.scales)[at];
    else
      scale = half(m.scales, at);
    if (m.zeros != nullptr) {
      const int64_t bits = m.bits == 3 ? 4 : m.bits, row_bytes = (m.groups * bits + 7) / 8;
      zero = static_cast<float>(m.zeros[row * row_bytes + group * bits / 8] >> group * bits % 8 & ((1 << bits) - 1));
    }
    if (m.shifts != nullptr) shift = half(m.shifts, at);
  }
};

inline float level_of(const bl_matrix& m, int64_t code) {
  return m.learned != nullptr ? half(m.learned, code) : m.levels[code];
}

// What turns sixteen codes into levels: a table of them, two numbers (evenly spaced levels), or nothing (floats).
template <int BITS>
struct Levels {
  using type = Table<BITS>;
  static type of(const bl_factor& factor) {
    float levels[16] = {};
    for (int64_t i = 0; i < 1 << BITS; ++i) levels[i] = level_of(*factor.packed, i);
    return type(levels);
  }
};

struct Even {
  Lanes first, step;
  Even minus(Lanes zero) const { return {subtract(first, zero), step}; }
  Even times(Lanes scale) const { return {multiply(first, scale), multiply(step, scale)}; }
};

template <>
struct Levels<BYTE> {
  using type = Even;
  static type of(const bl_factor& factor) {
    const float* levels = factor.packed->levels;
    return {all(levels[0]), all(levels[1] - levels[0])};
  }
};

struct Bare {
  Bare minus(Lanes) const { return {}; }
  Bare times(Lanes) const { return {}; }
};

template <int CODE>
  requires(CODE > BYTE)
struct Levels<CODE> {
  using type = Bare;
  static type of(const bl_factor&) { return {}; }
};

// Sixteen values of a chunk, before scales.
template <int CODE>
inline __attribute__((always_inline)) Lanes piece(const uint8_t* codes, const uint8_t* plane, int j, const typename Levels<CODE>::type& levels) {
  if constexpr (CODE <= FOUR) return look_up<CODE>(codes, plane, j, levels);
  if constexpr (CODE == BYTE) return fma(load_bytes(codes + 16 * j), levels.step, levels.first);
  if constexpr (CODE == HALF) return load_halves(codes + 32 * j);
  if constexpr (CODE == BRAIN) return load_brains(codes + 32 * j);
  return load(reinterpret_cast<const float*>(codes) + 16 * j);
}

// A factor as the two loops read it.
template <int CODE>
struct Source {
  explicit Source(const bl_factor& factor) : matrix(factor.packed), levels(Levels<CODE>::of(factor)) {
    const int64_t width = matrix != nullptr ? matrix->width : factor.columns;
    codes = matrix != nullptr ? matrix->codes : static_cast<const uint8_t*>(factor.plain);
    plane_bytes = width / 8;
    row_bytes = matrix != nullptr ? width * matrix->bits / 8 : width * (CODE == SINGLE ? 4 : 2);
    third = width / 4;
    unit = matrix != nullptr && matrix->groups > 0 ? ldexpf(CODE > TRELLIS ? LEVEL_UNIT : 1.0f, *matrix->exponent) : 1.0f;
    scaled = matrix != nullptr && CODE != ANY && matrix->groups > 0;
    shifted = scaled && matrix->zeros != nullptr;
    chunks = padded(factor.columns) / LORA_CHUNK;  // the factor's own padding may go further
    whole = CODE == ANY || chunks * LORA_CHUNK <= width ? chunks : width / LORA_CHUNK;
    direct = scaled && (matrix->flags & (BL_DQ | BL_TENSOR)) == 0;
    halves = direct ? static_cast<const uint8_t*>(matrix->scales) : nullptr;
    groups = scaled ? matrix->groups : 0;
    zero_bits = matrix != nullptr && matrix->bits == 3 ? 4 : CODE;
    zero_bytes = (groups * zero_bits + 7) / 8;
    per_group = scaled && matrix->groups > 1 ? matrix->group / LORA_CHUNK : chunks;
    rest = width - whole * LORA_CHUNK;
  }

  // As in Group, which would be a fifth of the time where a group is two chunks long.
  inline __attribute__((always_inline)) float scale(int64_t row, int64_t group) const {
    if (direct) return half_value(load16(halves + 2 * (row * groups + group))) * unit;
    return scaled ? Group(*matrix, row, group).scale * unit : CODE > TRELLIS ? LEVEL_UNIT : 1.0f;
  }

  inline __attribute__((always_inline)) float zero(int64_t row, int64_t group) const {
    const int64_t bit = group * zero_bits;
    return static_cast<float>(matrix->zeros[row * zero_bytes + bit / 8] >> bit % 8 & ((1 << zero_bits) - 1));
  }

  const bl_matrix* matrix;
  typename Levels<CODE>::type levels;
  const uint8_t* codes;
  const uint8_t* halves;
  int64_t row_bytes, plane_bytes, third, chunks, whole, per_group, rest, groups, zero_bits, zero_bytes;
  float unit;
  bool scaled, shifted, direct;
};

float level_at(const bl_matrix& m, const uint8_t* codes, int64_t at) {
  if (m.bits == 16) return half(codes, at);
  if (m.bits == 3)
    return level_of(m, (codes[at / 4] >> 2 * (at % 4) & 3) | (codes[m.width / 4 + at / 8] >> at % 8 & 1) << 2);
  return level_of(m, codes[at * m.bits / 8] >> at * m.bits % 8 & ((1 << m.bits) - 1));
}

// A chunk of any matrix, value by value: for groups that are no multiple of a chunk.
__attribute__((noinline)) void decode(const bl_matrix& m, int64_t row, int64_t chunk, float* values) {
  const uint8_t* codes = m.codes + row * (m.width * m.bits / 8);
  alignas(64) int8_t levels[LORA_CHUNK];
  const bool trellis = (m.flags & BL_TRELLIS) != 0;
  if (trellis && chunk * LORA_CHUNK < m.width) trellis_levels(m.bits, codes, m.width / 8, chunk, levels);
  for (int64_t j = 0; j < LORA_CHUNK; ++j) {
    const int64_t at = chunk * LORA_CHUNK + j;
    const Group g(m, row, at < m.width ? at / m.group : 0);
    const float level = at >= m.width ? 0.0f : trellis ? static_cast<float>(levels[j]) * LEVEL_UNIT : level_at(m, codes, at);
    const float value = at < m.width ? (level - g.zero) * g.scale + g.shift : 0.0f;
    values[j] = m.groups > 0 ? ldexpf(value, *m.exponent) : value;
  }
}

// Chunk `i` of a row, in place or copied: the last one where it is not whole (reading on would leave the payload), and
// every one that is decoded first. `take(j, values)` gets its four pieces.
template <int CODE, class F>
inline __attribute__((always_inline)) void take_chunk(const Source<CODE>& from, int64_t row, int64_t i, const typename Levels<CODE>::type& levels, F&& take) {
  if constexpr (CODE > TRELLIS) {
    alignas(64) int8_t found[LORA_CHUNK];
    trellis_levels<CODE - TRELLIS>(from.codes + row * from.row_bytes, from.plane_bytes, i, found);
    for (int j = 0; j < PIECES; ++j) take(j, load_levels(found + 16 * j));
    return;
  }
  alignas(64) uint8_t copy[LORA_CHUNK * 4], third[LORA_CHUNK / 8];
  const uint8_t* codes = from.codes + row * from.row_bytes + i * chunk_bytes<CODE>();
  const uint8_t* plane = from.codes + row * from.row_bytes + from.third + i * (LORA_CHUNK / 8);
  if constexpr (CODE == ANY) {
    decode(*from.matrix, row, i, reinterpret_cast<float*>(copy));
    codes = copy;
  } else if (__builtin_expect(i >= from.whole, false)) {
    std::memset(copy, 0, sizeof copy);
    std::memcpy(copy, codes, static_cast<size_t>(from.rest * chunk_bytes<CODE>() / LORA_CHUNK));
    if constexpr (CODE == THREE) std::memset(third, 0, sizeof third), std::memcpy(third, plane, static_cast<size_t>(from.rest / 8));
    codes = copy, plane = third;
  }
  for (int j = 0; j < PIECES; ++j) take(j, piece<CODE>(codes, plane, j, levels));
}

// products[k * ROWS + r] = scaling * sum_i A[k, i] x[r, i]
template <int CODE, int ROWS>
void project(const bl_factor& a, float scaling, const float* const* inputs, float* products) {
  const Source<CODE> from(a);
  const float* x[ROWS];
  for (int r = 0; r < ROWS; ++r) x[r] = inputs[r];
  for (int64_t k = 0; k < a.rows; ++k) {
    Lanes sums[ROWS][CHAINS];
    for (int r = 0; r < ROWS; ++r)
      for (int j = 0; j < CHAINS; ++j) sums[r][j] = none();
    const bool grouped = from.per_group < from.chunks;
    for (int64_t i = 0, g = 0; i < from.chunks; ++g) {
      typename Levels<CODE>::type levels = from.shifted ? from.levels.minus(all(from.zero(k, g))) : from.levels;
      if (grouped) levels = levels.times(all(from.scale(k, g)));
      const int64_t end = i + from.per_group < from.chunks ? i + from.per_group : from.chunks;
      for (; i < end; ++i)
        take_chunk(from, k, i, levels, [&](int j, Lanes values) __attribute__((always_inline)) {
          for (int r = 0; r < ROWS; ++r)
            sums[r][j % CHAINS] = fma(values, load(x[r] + LORA_CHUNK * i + 16 * j), sums[r][j % CHAINS]);
        });
    }
    const float scale = grouped ? scaling : scaling * from.scale(k, 0);
    for (int r = 0; r < ROWS; ++r) {
      Lanes total = sums[r][0];
      for (int j = 1; j < CHAINS; ++j) total = add(total, sums[r][j]);
      products[k * ROWS + r] = scale * sum(total);
    }
  }
}

// The chunks first .. last of y[r, i] += sum_k factors[k * ROWS + r] (level - zeros[k])
template <bool CENTERED, int CODE, int ROWS>
inline __attribute__((always_inline)) void expand_chunks(const Source<CODE>& from, int64_t count, const float* factors, const float* zeros, int64_t first, int64_t last, float* const* y) {
  for (int64_t i = first; i < last; ++i) {
    Lanes sums[ROWS][PIECES];
    for (int r = 0; r < ROWS; ++r)
      for (int j = 0; j < PIECES; ++j) sums[r][j] = load(y[r] + LORA_CHUNK * i + 16 * j);
    for (int64_t k = 0; k < count; ++k) {
      typename Levels<CODE>::type levels = from.levels;
      if constexpr (CENTERED) levels = levels.minus(all(zeros[k]));
      take_chunk(from, k, i, levels, [&](int j, Lanes values) __attribute__((always_inline)) {
        for (int r = 0; r < ROWS; ++r) sums[r][j] = fma(all(factors[k * ROWS + r]), values, sums[r][j]);
      });
    }
    for (int r = 0; r < ROWS; ++r)
      for (int j = 0; j < PIECES; ++j) store(y[r] + LORA_CHUNK * i + 16 * j, sums[r][j]);
  }
}

// y[r, i] += sum_k products[k * ROWS + r] B^T[k, i]; `spare` takes ROWS + 1 numbers per component
template <int CODE, int ROWS>
void expand(const bl_factor& bt, const float* products, float* spare, float* const* outputs) {
  const Source<CODE> from(bt);
  float *factors = spare, *zeros = spare + bt.rows * ROWS;
  float* y[ROWS];
  for (int r = 0; r < ROWS; ++r) y[r] = outputs[r];
  for (int64_t i = 0, g = 0; i < from.chunks; i += from.per_group, ++g) {
    const int64_t last = i + from.per_group < from.chunks ? i + from.per_group : from.chunks;
    for (int64_t k = 0; k < bt.rows; ++k) {
      const float scale = from.scale(k, g);
      for (int r = 0; r < ROWS; ++r) factors[k * ROWS + r] = products[k * ROWS + r] * scale;
      zeros[k] = from.shifted ? from.zero(k, g) : 0.0f;
    }
    if (from.shifted)
      expand_chunks<true, CODE, ROWS>(from, bt.rows, factors, zeros, i, last, y);
    else
      expand_chunks<false, CODE, ROWS>(from, bt.rows, factors, zeros, i, last, y);
  }
}

// How a factor is read; a group must be a whole row or whole chunks, or it is read value by value.
int code_of(const bl_factor& factor) {
  if (factor.packed == nullptr) return factor.dtype == BL_F32 ? SINGLE : factor.dtype == BL_BF16 ? BRAIN : HALF;
  const bl_matrix& m = *factor.packed;
  const bool whole = m.groups <= 1 || m.group % LORA_CHUNK == 0;
  const bool near = m.groups == 0 || (*m.exponent >= -EXPONENTS && *m.exponent <= EXPONENTS);
  if (!whole || !near || m.shifts != nullptr) return ANY;
  return (m.flags & BL_TRELLIS ? TRELLIS : 0) + m.bits;
}

template <int ROWS, template <int> class CALL, class... ARGUMENTS>
void by_code(int code, ARGUMENTS&&... arguments) {
  switch (code) {
    case SIGN: return CALL<SIGN>::template run<ROWS>(arguments...);
    case TWO: return CALL<TWO>::template run<ROWS>(arguments...);
    case THREE: return CALL<THREE>::template run<ROWS>(arguments...);
    case FOUR: return CALL<FOUR>::template run<ROWS>(arguments...);
    case BYTE: return CALL<BYTE>::template run<ROWS>(arguments...);
    case HALF: return CALL<HALF>::template run<ROWS>(arguments...);
    case BRAIN: return CALL<BRAIN>::template run<ROWS>(arguments...);
    case SINGLE: return CALL<SINGLE>::template run<ROWS>(arguments...);
    case TRELLIS + 1: return CALL<TRELLIS + 1>::template run<ROWS>(arguments...);
    case TRELLIS + 2: return CALL<TRELLIS + 2>::template run<ROWS>(arguments...);
    case TRELLIS + 3: return CALL<TRELLIS + 3>::template run<ROWS>(arguments...);
    case TRELLIS + 4: return CALL<TRELLIS + 4>::template run<ROWS>(arguments...);
    default: return CALL<ANY>::template run<ROWS>(arguments...);
  }
}

template <int CODE>
struct Project {
  template <int ROWS>
  static void run(const bl_block& block, const float* const* x, float* products) {
    project<CODE, ROWS>(block.a, block.scaling, x, products);
  }
};

template <int CODE>
struct Expand {
  template <int ROWS>
  static void run(const bl_block& block, float* products, float* const* y) {
    expand<CODE, ROWS>(block.bt, products, products + block.bt.rows * ROWS, y);
  }
};

// Columns as floats, zeros behind them up to a whole chunk.
void widen(const void* from, int32_t dtype, int64_t columns, float* to) {
  const uint8_t* bytes = static_cast<const uint8_t*>(from);
  const int64_t size = dtype == BL_F32 ? 4 : 2;
  for (int64_t i = 0; i < padded(columns); i += 16) {
    alignas(64) uint8_t copy[64] = {};
    const uint8_t* at = bytes + i * size;
    if (i + 16 > columns) {
      if (i < columns) std::memcpy(copy, at, static_cast<size_t>((columns - i) * size));
      at = copy;
    }
    store(to + i, dtype == BL_F32 ? load(reinterpret_cast<const float*>(at)) : dtype == BL_BF16 ? load_brains(at) : load_halves(at));
  }
}

void narrow(const float* from, int32_t dtype, int64_t columns, void* to) {
  uint8_t* bytes = static_cast<uint8_t*>(to);
  const int64_t size = dtype == BL_F32 ? 4 : 2;
  for (int64_t i = 0; i < columns; i += 16) {
    alignas(64) uint8_t copy[64];
    uint8_t* at = i + 16 > columns ? copy : bytes + i * size;
    const Lanes values = load(from + i);
    if (dtype == BL_F32) store(reinterpret_cast<float*>(at), values);
    if (dtype == BL_BF16) store_brains(at, values);
    if (dtype == BL_F16) store_halves(at, values);
    if (at == copy) std::memcpy(bytes + i * size, copy, static_cast<size_t>((columns - i) * size));
  }
}

template <int ROWS>
void run_rows(const LoraTile& tile, int first, int rows) {
  const float* x[ROWS];
  float* y[ROWS];
  for (int r = 0; r < ROWS; ++r) {
    const int source = first + (r < rows ? r : 0);  // a tile that is not full computes its first row again
    float* wide = tile.wide_x + r * padded(tile.columns);
    const bool ready = tile.x_dtype == BL_F32 && tile.columns % LORA_CHUNK == 0;
    if (!ready) widen(tile.x[source], tile.x_dtype, tile.columns, wide);
    x[r] = ready ? static_cast<const float*>(tile.x[source]) : wide;
    const bool direct = r < rows && tile.out_dtype == BL_F32 && tile.out_columns % LORA_CHUNK == 0;
    y[r] = direct ? static_cast<float*>(tile.out[source]) : tile.wide_out + r * padded(tile.out_columns);
    if (tile.accumulate && !direct) {
      widen(tile.out[source], tile.out_dtype, tile.out_columns, y[r]);
    } else if (!tile.accumulate && tile.out_columns > 0) {
      std::memset(y[r], 0, static_cast<size_t>(padded(tile.out_columns)) * sizeof(float));
    }
  }
  const bl_blocks* const lists[] = {tile.shared, tile.own};
  for (const bl_blocks* blocks : lists)
    for (int64_t b = 0; blocks != nullptr && b < blocks->count; ++b) {
      const bl_block& block = blocks->block[b];
      by_code<ROWS, Project>(code_of(block.a), block, x, tile.products);
      by_code<ROWS, Expand>(code_of(block.bt), block, tile.products, y);
    }
  for (int r = 0; r < rows; ++r)
    if (y[r] != tile.out[first + r]) narrow(y[r], tile.out_dtype, tile.out_columns, tile.out[first + r]);
}

}  // namespace

void lora_tile(const LoraTile& tile) {
  for (int first = 0; first < tile.rows; first += TILE_ROWS) {
    const int rows = tile.rows - first < TILE_ROWS ? tile.rows - first : TILE_ROWS;
    if (rows == 1) run_rows<1>(tile, first, rows);
    if (rows == 2) run_rows<2>(tile, first, rows);
    if (rows > 2) run_rows<TILE_ROWS>(tile, first, rows);
  }
}

}  // namespace bl::BL_ISA
