// Trellis codes: what a row of bit planes stands for. See docs/format.md; the same numbers are in trellis.py.
//
// A row of n values in K bits is K planes of n bits. With c the first plane, read in a circle, value t has the level
//   LEVELS[subset + 2**SPLIT * p],   bit j of the subset = parity of TAPS[j] & (c[t], c[t-1], ..., c[t-8]; lowest first)
// and p made of the other planes' bits. So neighbours share their choices, which is what a scalar code lacks, and yet
// sixty-four values cost some ten instructions: parities of sliding windows are shifts and xors of whole words.
//
// Included only by sources that are compiled once per instruction set.
#pragma once

#include "lanes.hpp"

namespace bl::BL_ISA {

constexpr int MEMORY = 8;              // earlier bits that a value depends on
constexpr float LEVEL_UNIT = 1 / 64.0f;

template <int K>
struct Trellis;

// Levels as numbers, and as bytes up to the sixty-four that a permute reads.
template <int COUNT>
struct Tables {
  struct Floats {
    float v[COUNT] = {};
    constexpr explicit Floats(const int8_t* levels) {
      for (int i = 0; i < COUNT; ++i) v[i] = static_cast<float>(levels[i]) * LEVEL_UNIT;
    }
  };
  struct Bytes {
    int8_t v[64] = {};
    constexpr explicit Bytes(const int8_t* levels) {
      for (int i = 0; i < 64; ++i) v[i] = levels[i % COUNT];
    }
  };
};

template <>
struct Trellis<1> : Tables<16> {
  static constexpr int SPLIT = 4;
  static constexpr unsigned TAPS[SPLIT] = {0x1a7, 0x086, 0x054, 0x1d7};
  static constexpr double SPREAD = 1.1419;
  static constexpr int8_t LEVELS[16] = {
      -127, -87, -60, -57, -35, -35, -14, -19, 19, 14, 35, 35, 57, 60, 87, 127};
  static constexpr Floats floats() { return Floats(LEVELS); }
  static constexpr Bytes repeated() { return Bytes(LEVELS); }
};

template <>
struct Trellis<2> : Tables<32> {
  static constexpr int SPLIT = 4;
  static constexpr unsigned TAPS[SPLIT] = {0x146, 0x0e4, 0x04a, 0x1df};
  static constexpr double SPREAD = 0.8395;
  static constexpr int8_t LEVELS[32] = {
      -127, -93, -80, -72, -59, -55, -47, -43, -35, -32, -25, -22, -13, -13, -5, -4, 4, 5, 13, 13, 22, 25, 32,
      35, 43, 47, 55, 59, 72, 80, 93, 127};
  static constexpr Floats floats() { return Floats(LEVELS); }
  static constexpr Bytes repeated() { return Bytes(LEVELS); }
};

template <>
struct Trellis<3> : Tables<32> {
  static constexpr int SPLIT = 3;
  static constexpr unsigned TAPS[SPLIT] = {0x0ac, 0x0d6, 0x157};
  static constexpr double SPREAD = 0.7431;
  static constexpr int8_t LEVELS[32] = {
      -127, -96, -78, -66, -57, -51, -44, -38, -33, -28, -24, -19, -15, -10, -6, -2, 2, 6, 10, 15, 19, 24, 28,
      33, 38, 44, 51, 57, 66, 78, 96, 127};
  static constexpr Floats floats() { return Floats(LEVELS); }
  static constexpr Bytes repeated() { return Bytes(LEVELS); }
};

template <>
struct Trellis<4> : Tables<64> {
  static constexpr int SPLIT = 3;
  static constexpr unsigned TAPS[SPLIT] = {0x064, 0x1d6, 0x0ed};
  static constexpr double SPREAD = 0.6512;
  static constexpr int8_t LEVELS[64] = {
      -127, -103, -87, -77, -69, -63, -58, -54, -51, -47, -44, -42, -39, -37, -34, -32, -30, -28, -25, -23,
      -22, -20, -17, -15, -14, -12, -10, -8, -6, -5, -2, -1, 1, 2, 5, 6, 8, 10, 12, 14, 15, 17, 20, 22, 23,
      25, 28, 30, 32, 34, 37, 39, 42, 44, 47, 51, 54, 58, 63, 69, 77, 87, 103, 127};
  static constexpr Floats floats() { return Floats(LEVELS); }
  static constexpr Bytes repeated() { return Bytes(LEVELS); }
};

template <int K>
constexpr int LEVEL_COUNT = 1 << (Trellis<K>::SPLIT + K - 1);

inline uint64_t load64(const uint8_t* p) {
  uint64_t v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// Sixty-four values of a row: the words of its planes, and the eight bits of the first plane before them.
template <int K>
struct Planes {
  uint64_t words[K] = {};
  uint8_t before;

  // Chunk i of a row whose planes have `bytes` bytes each; beyond their end there are zeros.
  inline __attribute__((always_inline)) Planes(const uint8_t* row, int64_t bytes, int64_t i) {
    const uint8_t* at = row + 8 * i;
    before = i > 0 ? at[-1] : row[bytes - 1];
    if (__builtin_expect(8 * i + 8 <= bytes, true)) {
      for (int p = 0; p < K; ++p) words[p] = load64(at + p * bytes);
    } else {
      for (int p = 0; p < K; ++p) std::memcpy(&words[p], at + p * bytes, static_cast<size_t>(bytes - 8 * i));
    }
  }
};

#if defined(BL_HAS_avx512)

// Rows of a matrix over bits: out bit j of a byte is the parity of some bits of the byte that goes in. `fields` 0 is made
// of c[t-7] (lowest) .. c[t], 1 of c[t-8] and what lies above it.
template <int K>
constexpr uint64_t tap_matrix(int field) {
  uint64_t matrix = 0;
  for (int j = 0; j < Trellis<K>::SPLIT; ++j) {
    uint64_t row = 0;
    if (field == 1) row = Trellis<K>::TAPS[j] >> MEMORY & 1;
    else for (int bit = 0; bit < 8; ++bit) row |= static_cast<uint64_t>(Trellis<K>::TAPS[j] >> (7 - bit) & 1) << bit;
    matrix |= row << 8 * (7 - j);
  }
  return matrix;
}

template <int K>
inline __attribute__((always_inline)) __m512i level_indices(const Planes<K>& planes) {
  // every byte of c with the one before it, in a lane of 64 bits; then eight windows of each lane
  const __m128i bytes = _mm_insert_epi8(_mm_slli_si128(_mm_cvtsi64_si128(static_cast<int64_t>(planes.words[0])), 1), planes.before, 0);
  const __m512i pairs = _mm512_set_epi64(0x0807, 0x0706, 0x0605, 0x0504, 0x0403, 0x0302, 0x0201, 0x0100);
  const __m512i lanes = _mm512_permutexvar_epi8(pairs, _mm512_castsi128_si512(bytes));
  const __m512i recent = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x0807060504030201), lanes);
  const __m512i oldest = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x0706050403020100), lanes);
  __m512i index = _mm512_xor_si512(
      _mm512_gf2p8affine_epi64_epi8(recent, _mm512_set1_epi64(static_cast<int64_t>(tap_matrix<K>(0))), 0),
      _mm512_gf2p8affine_epi64_epi8(oldest, _mm512_set1_epi64(static_cast<int64_t>(tap_matrix<K>(1))), 0));
  for (int p = 1; p < K; ++p)
    index = _mm512_mask_add_epi8(index, static_cast<__mmask64>(planes.words[p]), index, _mm512_set1_epi8(static_cast<char>(1 << (Trellis<K>::SPLIT + p - 1))));
  return index;
}

// The levels of a chunk, in units of LEVEL_UNIT.
template <int K>
inline __attribute__((always_inline)) void trellis_levels(const uint8_t* row, int64_t bytes, int64_t i, int8_t* levels) {
  alignas(64) static constexpr auto table = Trellis<K>::repeated();
  const __m512i index = level_indices<K>(Planes<K>(row, bytes, i));
  _mm512_store_si512(levels, _mm512_permutexvar_epi8(index, _mm512_load_si512(table.v)));
}

inline Lanes load_levels(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(p))))};
}

#else

// Byte i of SPREAD[b] is bit i of b.
struct Spread {
  uint64_t of[256] = {};
  constexpr Spread() {
    for (int b = 0; b < 256; ++b)
      for (int i = 0; i < 8; ++i) of[b] |= static_cast<uint64_t>(b >> i & 1) << 8 * i;
  }
};
inline constexpr Spread SPREAD;

template <int K>
inline void level_indices(const Planes<K>& planes, uint8_t* index) {
  constexpr int SPLIT = Trellis<K>::SPLIT;
  uint64_t delayed[MEMORY + 1], bits[SPLIT + K - 1] = {};
  delayed[0] = planes.words[0];
  for (int d = 1; d <= MEMORY; ++d) delayed[d] = planes.words[0] << d | static_cast<uint64_t>(planes.before) >> (MEMORY - d);
  for (int j = 0; j < SPLIT; ++j)
    for (int d = 0; d <= MEMORY; ++d)
      if (Trellis<K>::TAPS[j] >> d & 1) bits[j] ^= delayed[d];
  for (int p = 1; p < K; ++p) bits[SPLIT + p - 1] = planes.words[p];
  for (int byte = 0; byte < 8; ++byte) {
    uint64_t eight = 0;
    for (int j = 0; j < SPLIT + K - 1; ++j) eight |= SPREAD.of[bits[j] >> 8 * byte & 255] << j;
    std::memcpy(index + 8 * byte, &eight, 8);
  }
}

#if defined(BL_HAS_avx2)

template <int K>
inline __m256i thirty_two_levels(__m256i index) {
  const auto part = [&](int at) {
    const __m128i table = _mm_loadu_si128(reinterpret_cast<const __m128i*>(Trellis<K>::LEVELS + at));
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), index);  // reads four bits of an index below 128
  };
  const __m256i fifth = _mm256_slli_epi16(index, 3), sixth = _mm256_slli_epi16(index, 2);
  __m256i found = part(0);
  if constexpr (LEVEL_COUNT<K> >= 32) found = _mm256_blendv_epi8(found, part(16), fifth);
  if constexpr (LEVEL_COUNT<K> == 64) found = _mm256_blendv_epi8(found, _mm256_blendv_epi8(part(32), part(48), fifth), sixth);
  return found;
}

template <int K>
inline void trellis_levels(const uint8_t* row, int64_t bytes, int64_t i, int8_t* levels) {
  alignas(64) uint8_t index[64];
  level_indices<K>(Planes<K>(row, bytes, i), index);
  for (int half = 0; half < 64; half += 32) {
    const __m256i codes = _mm256_load_si256(reinterpret_cast<const __m256i*>(index + half));
    _mm256_store_si256(reinterpret_cast<__m256i*>(levels + half), thirty_two_levels<K>(codes));
  }
}

inline Lanes load_levels(const int8_t* p) {
  const auto eight = [](const int8_t* at) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at))));
  };
  return {eight(p), eight(p + 8)};
}

#else

template <int K>
inline void trellis_levels(const uint8_t* row, int64_t bytes, int64_t i, int8_t* levels) {
  uint8_t index[64];
  level_indices<K>(Planes<K>(row, bytes, i), index);
  for (int t = 0; t < 64; ++t) levels[t] = Trellis<K>::LEVELS[index[t]];
}

inline Lanes load_levels(const int8_t* p) { return each([=](int i) { return static_cast<float>(p[i]); }); }

#endif
#endif

// The same, for a width that is known at run time only.
inline void trellis_levels(int bits, const uint8_t* row, int64_t bytes, int64_t i, int8_t* levels) {
  switch (bits) {
    case 1: return trellis_levels<1>(row, bytes, i, levels);
    case 2: return trellis_levels<2>(row, bytes, i, levels);
    case 3: return trellis_levels<3>(row, bytes, i, levels);
    default: return trellis_levels<4>(row, bytes, i, levels);
  }
}

}  // namespace bl::BL_ISA
