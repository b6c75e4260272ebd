// Packed matrices for the C++ tests: parts in allocations of exactly their size, so that a sanitizer sees one byte too far.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "../../src/bitloft/kernels/native/bitloft.h"

#define CHECK(condition, ...)                                            \
  do {                                                                   \
    if (!(condition)) {                                                  \
      std::printf("%s:%d: %s failed: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                          \
      std::printf(" (%s)\n", bl_error());                                \
      std::exit(1);                                                      \
    }                                                                    \
  } while (false)

// xorshift64*: the same numbers on every machine.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}
  uint64_t next() {
    state_ ^= state_ >> 12, state_ ^= state_ << 25, state_ ^= state_ >> 27;
    return state_ * 0x2545f4914f6cdd1du;
  }
  int64_t below(int64_t n) { return static_cast<int64_t>(next() >> 1) % n; }
  float value() { return static_cast<float>(static_cast<int64_t>(next() >> 40) - (1 << 23)) * 0x1p-23f; }  // -1 to 1

 private:
  uint64_t state_;
};

struct Kind {
  const char* name;
  int bits;
  int64_t group;  // 0: a row, -1: none, -2: the tensor
  bool dq, shift;
  int rule;
  bool zeros, learned;
  bool trellis = false, columns = false;
};

// The families of formats.py, with each suffix somewhere.
inline const std::vector<Kind>& kinds() {
  static const std::vector<Kind> all = {
      {"nf4:64", 4, 64, false, false, BL_LARGEST, false, false},
      {"nf3:8", 3, 8, false, false, BL_LARGEST, false, false},
      {"nf4:64+dq", 4, 64, true, false, BL_LARGEST, false, false},
      {"lm2:64", 2, 64, false, false, BL_SPLIT, false, false},
      {"lm2:row", 2, 0, false, false, BL_SPLIT, false, false},
      {"lm2:unit", 2, -1, false, false, BL_GIVEN, false, false},
      {"lm3:unit", 3, -1, false, false, BL_GIVEN, false, false},
      {"lm3:64", 3, 64, false, false, BL_SEARCH, false, false},
      {"lm4:40+dq+shift", 4, 40, true, true, BL_SEARCH, false, false},
      {"book3:row", 3, 0, false, false, BL_SEARCH, false, true},
      {"sign:128", 1, 128, false, false, BL_MEAN, false, false},
      {"sign:8+shift", 1, 8, false, true, BL_MEAN, false, false},
      {"int8:row", 8, 0, false, false, BL_LARGEST, false, false},
      {"int8:64+dq+shift", 8, 64, true, true, BL_LARGEST, false, false},
      {"uniform2:64", 2, 64, false, false, BL_RANGE, true, false},
      {"uniform3:8", 3, 8, false, false, BL_RANGE_SEARCHED, true, false},
      {"uniform4:64+dq+shift", 4, 64, true, true, BL_RANGE, false, false},
      {"uniform2:tensor", 2, -2, false, true, BL_RANGE, false, false},
      {"trellis1:row", 1, 0, false, false, BL_GIVEN, false, false, true},
      {"trellis2:unit", 2, -1, false, false, BL_GIVEN, false, false, true},
      {"trellis3:row", 3, 0, false, false, BL_GIVEN, false, false, true},
      {"trellis4:row", 4, 0, false, false, BL_GIVEN, false, false, true},
      {"trellis1:8", 1, 8, false, false, BL_GIVEN, false, false, true, true},
      {"trellis2:64", 2, 64, false, false, BL_GIVEN, false, false, true, true},
      {"trellis3:320", 3, 320, false, false, BL_GIVEN, false, false, true, true},
      {"trellis4:64", 4, 64, false, false, BL_GIVEN, false, false, true, true},
  };
  return all;
}

struct Packed {
  bl_matrix m{};
  int rule;
  std::unique_ptr<uint8_t[]> codes, scales, zeros, shifts, low, step;
  std::unique_ptr<uint16_t[]> learned;
  std::unique_ptr<float[]> levels;
  std::unique_ptr<int32_t> exponent;

  static std::unique_ptr<uint8_t[]> bytes(int64_t count) { return std::make_unique<uint8_t[]>(static_cast<size_t>(count)); }

  Packed(const Kind& kind, int64_t rows, int64_t columns) : rule(kind.rule), exponent(new int32_t{-14}) {
    const int64_t unit = kind.group > 0 ? kind.group : 8, width = (columns + unit - 1) / unit * unit;
    const int64_t groups = kind.group == -1 ? 0 : kind.group > 0 ? width / kind.group : columns > 0 ? 1 : 0;
    const bool whole = kind.group == -2;
    const int64_t scaled = (whole ? (rows > 0 ? 1 : 0) : rows) * groups;
    m.rows = rows, m.columns = columns, m.width = width, m.group = kind.group > 0 ? kind.group : width, m.groups = groups;
    m.bits = kind.bits, m.flags = (kind.dq ? BL_DQ : 0) | (whole ? BL_TENSOR : 0) | (kind.trellis ? BL_TRELLIS : 0) | (kind.columns ? BL_COLUMNS : 0);
    m.codes_bytes = kind.columns ? columns * ((rows + 7) / 8 * kind.bits) : rows * (width * kind.bits / 8);
    codes = bytes(m.codes_bytes), m.codes = codes.get();
    m.scales_bytes = scaled * (kind.dq ? 1 : 2);
    scales = bytes(m.scales_bytes), m.scales = scales.get();
    if (kind.zeros) {
      m.zeros_bytes = rows * ((groups * (kind.bits == 3 ? 4 : kind.bits) + 7) / 8);
      zeros = bytes(m.zeros_bytes), m.zeros = zeros.get();
    }
    if (kind.shift) {
      m.shifts_bytes = scaled * 2;
      shifts = bytes(m.shifts_bytes), m.shifts = reinterpret_cast<const uint16_t*>(shifts.get());
    }
    if (kind.dq) {
      m.range_bytes = (scaled + 255) / 256 * 2;
      low = bytes(m.range_bytes), m.low = reinterpret_cast<const uint16_t*>(low.get());
      step = bytes(m.range_bytes), m.step = reinterpret_cast<const uint16_t*>(step.get());
    }
    const int count = 1 << kind.bits;
    levels.reset(new float[static_cast<size_t>(count)]);
    for (int i = 0; i < count; ++i)
      levels[static_cast<size_t>(i)] = static_cast<float>(2 * i + 1 - count) / static_cast<float>(count - 1);
    if (kind.zeros || kind.rule == BL_RANGE)
      for (int i = 0; i < count; ++i) levels[static_cast<size_t>(i)] = static_cast<float>(i);
    if (kind.bits == 8)
      for (int i = 0; i < count; ++i) levels[static_cast<size_t>(i)] = static_cast<float>(i - 128);
    m.levels = kind.trellis ? nullptr : levels.get();
    if (kind.learned) {
      learned.reset(new uint16_t[static_cast<size_t>(count)]);
      for (int i = 0; i < count; ++i)  // -1, -6/7, ... are not halves; powers of two are
        learned[static_cast<size_t>(i)] = static_cast<uint16_t>(i < count / 2 ? 0xbc00 - 0x400 * i : 0x3c00 - 0x400 * (count - 1 - i));
      m.learned = learned.get();
    }
    m.exponent = exponent.get();
  }

  // Fill from random values; one range is given as the caller of the library does.
  void encode(Random& random, int threads = 1) {
    std::vector<float> x(static_cast<size_t>(m.rows * m.columns));
    for (float& v : x) v = random.value();
    encode(x, threads);
  }

  void encode(const std::vector<float>& x, int threads = 1) {
    if (m.flags & BL_COLUMNS) return walk_columns(x, threads);
    if (m.flags & BL_TRELLIS) return walk(x, threads);
    const bool whole = (m.flags & BL_TENSOR) != 0;
    const float given[2] = {0.5f, -0.75f};
    if (whole && m.rows > 0 && m.columns > 0) {
      *exponent = 0;
      const uint16_t scale = 0x3800, shift = 0xba00;  // the same in fp16
      std::memcpy(scales.get(), &scale, 2), std::memcpy(shifts.get(), &shift, 2);
    }
    const int status = bl_encode(x.data(), m.rows * m.columns, &m, rule, whole ? given : nullptr, threads);
    CHECK(status == 0, "encode %lld x %lld, %d bits", (long long)m.rows, (long long)m.columns, m.bits);
  }

  // Trellis codes; the caller of the library rounds their scales.
  void walk(const std::vector<float>& x, int threads) {
    std::vector<float> found(static_cast<size_t>(m.rows));
    const int status = bl_encode_trellis(x.data(), nullptr, m.rows, m.columns, m.bits, codes.get(), m.codes_bytes,
                                         m.groups > 0 ? found.data() : nullptr, threads);
    CHECK(status == 0, "encode %lld x %lld, trellis of %d bits", (long long)m.rows, (long long)m.columns, m.bits);
    *exponent = 0;
    for (int64_t row = 0; m.groups > 0 && row < m.rows; ++row) {
      const uint16_t half = half_of(found[static_cast<size_t>(row)]);
      std::memcpy(scales.get() + 2 * row, &half, 2);
    }
  }

  // Codes of the columns as they are, under scales of 1/2.
  void walk_columns(const std::vector<float>& x, int threads) {
    std::vector<float> turned(x.size());
    for (int64_t o = 0; o < m.rows; ++o)
      for (int64_t i = 0; i < m.columns; ++i) turned[static_cast<size_t>(i * m.rows + o)] = 2 * x[static_cast<size_t>(o * m.columns + i)];
    CHECK(bl_encode_trellis(turned.data(), nullptr, m.columns, m.rows, m.bits, codes.get(), m.codes_bytes, nullptr, threads) == 0, "columns");
    const uint16_t half = 0x3800;
    for (int64_t i = 0; i < m.rows * m.groups; ++i) std::memcpy(scales.get() + 2 * i, &half, 2);
    *exponent = 0;
  }

  // fp16 of a number between 2^-14 and 2, cut off; 0 below.
  static uint16_t half_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return x < 0x1p-14f ? 0 : static_cast<uint16_t>((bits - 0x38000000u) >> 13);
  }

  std::vector<float> decoded() const {
    std::vector<float> out(static_cast<size_t>(m.rows * m.columns));
    if (m.flags & BL_COLUMNS) {
      std::vector<float> turned(out.size());
      CHECK(bl_dequantize_columns(&m, 0, m.rows, turned.data(), static_cast<int64_t>(out.size()) * 4, BL_F32, 2) == 0, "dequantize");
      for (int64_t o = 0; o < m.rows; ++o)
        for (int64_t i = 0; i < m.columns; ++i) out[static_cast<size_t>(o * m.columns + i)] = turned[static_cast<size_t>(i * m.rows + o)];
      return out;
    }
    CHECK(bl_dequantize(&m, nullptr, m.rows, out.data(), static_cast<int64_t>(out.size()) * 4, BL_F32, 1) == 0, "dequantize");
    return out;
  }
};
