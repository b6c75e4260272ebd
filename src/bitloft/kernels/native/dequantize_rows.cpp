// A row of codes to numbers: kernels/plain.py, sixteen neighbouring columns at once.
//
// All that can happen to a level within a group is done to the table, once per group: round(round(level - zero) * scale)
// + shift, rounded to the wanted dtype after each step as torch rounds them. What is left per value is the look-up. The
// alternative, arithmetic on the values, takes three operations a value and cannot be bit-equal in bfloat16 any cheaper.
#include "dequantize.hpp"

#include "columns.hpp"
#include "lanes.hpp"
#include "trellis.hpp"

namespace bl::BL_ISA {
namespace {

template <int DTYPE>
inline Lanes rounded_to(Lanes x) {
  alignas(64) uint8_t bytes[32];
  if constexpr (DTYPE == BL_F32) return x;
  if constexpr (DTYPE == BL_BF16) return store_brains(bytes, x), load_brains(bytes);
  return store_halves(bytes, x), load_halves(bytes);
}

// Where sixteen numbers of a row go, those from column j on: to memory in a dtype,
template <int DTYPE>
struct Store {
  static constexpr int dtype = DTYPE;
  uint8_t* out;

  // x is rounded to the dtype already
  void put(int64_t j, Lanes x) const {
    if constexpr (DTYPE == BL_F32) store(reinterpret_cast<float*>(out) + j, x);
    if constexpr (DTYPE == BL_BF16) store_exact_brains(out + 2 * j, x);
    if constexpr (DTYPE == BL_F16) store_halves(out + 2 * j, x);
  }

  void put_some(int64_t j, int64_t count, Lanes x) const {
    alignas(64) uint8_t copy[64];
    constexpr int SIZE = DTYPE == BL_F32 ? 4 : 2;
    Store{copy}.put(0, x);
    std::memcpy(out + j * SIZE, copy, static_cast<size_t>(count * SIZE));
  }
};

// or off a row of x, whose rest is kept and its squares summed.
struct Residual {
  static constexpr int dtype = BL_F32;
  const float* x;
  float* out;
  Lanes squares = none();

  Lanes rest(Lanes from, Lanes value) {
    const Lanes left = subtract(from, value);
    squares = add(squares, multiply(left, left));
    return left;
  }

  void put(int64_t j, Lanes value) {
    const Lanes left = rest(load(x + j), value);
    if (out != nullptr) store(out + j, left);
  }

  void put_some(int64_t j, int64_t count, Lanes value) {
    alignas(64) float from[16] = {}, kept[16] = {};
    std::memcpy(from, x + j, static_cast<size_t>(count) * sizeof(float));
    store(kept, value);
    for (int64_t i = count; i < 16; ++i) kept[i] = 0.0f;
    store(kept, rest(load(from), load(kept)));
    if (out != nullptr) std::memcpy(out + j, kept, static_cast<size_t>(count) * sizeof(float));
  }
};

// Scale, zero point and shift of one group of one row.
struct Group {
  float scale, zero, shift;
  bool scaled, shifted;
};

class Groups {
 public:
  Groups(const bl_matrix& m, int64_t row)
      : m_(m), row_(row), unit_(m_.groups > 0 ? __builtin_ldexpf(1.0f, *m_.exponent) : 1.0f) {}

  Group at(int64_t g) const {
    const bool whole = (m_.flags & BL_TENSOR) != 0;
    const int64_t i = whole ? 0 : row_ * m_.groups + g;
    if (m_.groups == 0) return {1.0f, 0.0f, 0.0f, false, false};
    return {scale(i), zero(g), m_.shifts != nullptr ? half_value(m_.shifts[i]) * unit_ : 0.0f, true, m_.shifts != nullptr};
  }

 private:
  float scale(int64_t i) const {
    if ((m_.flags & BL_DQ) == 0) return half_value(static_cast<const uint16_t*>(m_.scales)[i]) * unit_;
    const float code = static_cast<float>(static_cast<const uint8_t*>(m_.scales)[i]);
    const float added = half_value(m_.step[i / 256]) * unit_ * code;
    return half_value(m_.low[i / 256]) * unit_ + added;
  }

  float zero(int64_t g) const {
    if (m_.zeros == nullptr) return 0.0f;
    const int bits = m_.bits == 3 ? 4 : m_.bits;
    const uint8_t* row = m_.zeros + row_ * ((m_.groups * bits + 7) / 8);
    return static_cast<float>(row[g * bits / 8] >> (g * bits % 8) & ((1 << bits) - 1));
  }

  const bl_matrix& m_;
  const int64_t row_;
  const float unit_;
};

template <int DTYPE>
inline Lanes affine(Lanes level, const Group& group) {
  if (!group.scaled) return level;
  const Lanes scale = rounded_to<DTYPE>(all(group.scale));
  const Lanes value = rounded_to<DTYPE>(multiply(subtract(level, all(group.zero)), scale));
  if (!group.shifted) return value;
  return rounded_to<DTYPE>(add(value, rounded_to<DTYPE>(all(group.shift))));
}

// Sixteen columns at a time; the end of a row goes by way of a copy, so nothing outside it is read or written.
template <int BITS, class SINK>
void dequantize_bits(const bl_matrix& m, const float* table, int64_t row, SINK& sink) {
  constexpr int DTYPE = SINK::dtype;
  const uint8_t* codes = m.codes + row * (m.width * BITS / 8);
  const uint8_t* plane = BITS == 3 ? codes + m.width / 4 : codes;
  constexpr int WIDE = BITS == 3 ? 2 : BITS;              // bits of a code in the first plane
  constexpr int READ = BITS == 1 || BITS == 3 ? 32 : 16;  // codes that a look-up reads: whole dwords of a plane
  const Groups groups(m, row);
  const Lanes bare = BITS <= 4 ? rounded_to<DTYPE>(load(table)) : none();
  for (int64_t begin = 0, g = 0; begin < m.columns; begin += m.group, ++g) {
    const Group group = groups.at(g);
    alignas(64) float levels[16] = {};
    if constexpr (BITS <= 4) store(levels, affine<DTYPE>(bare, group));
    const Table<BITS <= 4 ? BITS : 1> chosen(levels);
    const auto values = [&](const uint8_t* at, const uint8_t* third) __attribute__((always_inline)) {
      if constexpr (BITS <= 4) {
        return look_up<BITS>(at, third, 0, chosen);
      } else if constexpr (BITS == 8) {
        return affine<DTYPE>(subtract(load_bytes(at), all(128.0f)), group);
      } else {
        return affine<DTYPE>(rounded_to<DTYPE>(load_halves(at)), group);
      }
    };
    const int64_t end = begin + m.group < m.columns ? begin + m.group : m.columns;
    for (int64_t j = begin; j < end; j += 16) {
      const int64_t count = end - j < 16 ? end - j : 16;
      if (j + READ <= m.width) {
        const Lanes found = values(codes + j * WIDE / 8, plane + j / 8);
        count == 16 ? sink.put(j, found) : sink.put_some(j, count, found);
        continue;
      }
      uint8_t near[32] = {}, third[4] = {};
      const int64_t left = m.width - j < 16 ? m.width - j : 16;
      std::memcpy(near, codes + j * WIDE / 8, static_cast<size_t>(left * WIDE / 8));
      if (BITS == 3) std::memcpy(third, plane + j / 8, static_cast<size_t>(left / 8));
      sink.put_some(j, count, values(near, third));
    }
  }
}

// Trellis codes have one scale a row or none; a chunk is made whole, and what lies beyond the columns is not put.
template <class SINK>
void dequantize_trellis(const bl_matrix& m, int64_t row, SINK& sink) {
  constexpr int DTYPE = SINK::dtype;
  const int64_t bytes = m.width / 8;
  const Group group = Groups(m, row).at(0);
  alignas(64) int8_t levels[64];
  for (int64_t j = 0; j < m.columns; j += 16) {
    if (j % 64 == 0) trellis_levels(m.bits, m.codes + row * bytes * m.bits, bytes, j / 64, levels);
    const int64_t count = m.columns - j < 16 ? m.columns - j : 16;
    const Lanes level = multiply(load_levels(levels + j % 64), all(LEVEL_UNIT));  // eight bits: exact in every dtype
    const Lanes value = affine<DTYPE>(level, group);
    count == 16 ? sink.put(j, value) : sink.put_some(j, count, value);
  }
}

// Some columns of codes that run down them: sixteen rows at once, whose scales hold for the whole group.
template <int DTYPE>
void columns_to(const ColumnTile& tile) {
  const bl_matrix& m = *tile.matrix;
  const int64_t bytes = plane_bytes(m), group = tile.first / m.group, size = DTYPE == BL_F32 ? 4 : 2;
  const float unit = __builtin_ldexpf(1.0f, *m.exponent);
  const uint16_t* halves = static_cast<const uint16_t*>(m.scales) + group;
  for (int64_t begin = tile.row; begin < tile.row + tile.rows; begin += BLOCK) {
    const int64_t rows = tile.row + tile.rows - begin < BLOCK ? tile.row + tile.rows - begin : BLOCK;
    alignas(64) float scales[BLOCK] = {};
    for (int64_t i = 0; i < rows; ++i) scales[i] = half_value(halves[(begin + i) * m.groups]) * unit;
    for (int64_t i = 0; i < BLOCK; i += 16) store(scales + i, rounded_to<DTYPE>(load(scales + i)));
    for (int64_t j = 0; j < tile.count; ++j) {
      alignas(64) int8_t levels[BLOCK];
      trellis_levels(m.bits, m.codes + (tile.first + j) * bytes * m.bits, bytes, begin / BLOCK, levels);
      const Store<DTYPE> sink{reinterpret_cast<uint8_t*>(tile.out) + j * tile.stride * size};
      for (int64_t i = 0; i < rows; i += 16) {
        const Lanes level = multiply(load_levels(levels + i), all(LEVEL_UNIT));  // eight bits: exact in every dtype
        const Lanes value = rounded_to<DTYPE>(multiply(level, load(scales + i)));
        const int64_t at = begin - tile.row + i;
        rows - i >= 16 ? sink.put(at, value) : sink.put_some(at, rows - i, value);
      }
    }
  }
}

template <class SINK>
void dequantize_to(const bl_matrix& m, const float* levels, int64_t row, SINK& sink) {
  if (m.flags & BL_TRELLIS) return dequantize_trellis(m, row, sink);
  switch (m.bits) {
    case 1: return dequantize_bits<1>(m, levels, row, sink);
    case 2: return dequantize_bits<2>(m, levels, row, sink);
    case 3: return dequantize_bits<3>(m, levels, row, sink);
    case 4: return dequantize_bits<4>(m, levels, row, sink);
    case 8: return dequantize_bits<8>(m, levels, row, sink);
    default: return dequantize_bits<16>(m, levels, row, sink);
  }
}

template <int DTYPE>
void dequantize_as(const DequantizeRow& job) {
  Store<DTYPE> sink{static_cast<uint8_t*>(job.out)};
  dequantize_to(*job.matrix, job.levels, job.row, sink);
}

}  // namespace

void dequantize_row(const DequantizeRow& job) {
  if (job.dtype == BL_F32) return dequantize_as<BL_F32>(job);
  if (job.dtype == BL_BF16) return dequantize_as<BL_BF16>(job);
  dequantize_as<BL_F16>(job);
}

void column_tile(const ColumnTile& tile) {
  if (tile.dtype == BL_F32) return columns_to<BL_F32>(tile);
  if (tile.dtype == BL_BF16) return columns_to<BL_BF16>(tile);
  columns_to<BL_F16>(tile);
}

void residual_row(const ResidualRow& job) {
  Residual sink{job.x, job.out};
  dequantize_to(*job.matrix, job.levels, job.row, sink);
  float squares[16];
  store(squares, sink.squares);
  double total = 0;
  for (const float square : squares) total += static_cast<double>(square);
  *job.square = total;
}

}  // namespace bl::BL_ISA
