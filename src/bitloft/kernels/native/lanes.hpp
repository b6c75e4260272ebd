// Sixteen float lanes: one AVX-512 register, two AVX2 registers, or a plain array.
//
// Included only by sources that are compiled once per instruction set. Sixteen neighbouring codes are looked up at once
// in a register of levels, in the order of the row: the bytes come straight from a file and are never permuted. The
// permutes read only the low bits of an index, so a table that repeats its levels saves the mask that would clear the
// codes above.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(BL_HAS_avx2) || defined(BL_HAS_avx512)
#include <immintrin.h>
#endif

namespace bl::BL_ISA {

inline uint16_t load16(const uint8_t* p) {
  uint16_t v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline uint32_t load32(const uint8_t* p) {
  uint32_t v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

#if defined(BL_HAS_avx512)

constexpr int TILE_ROWS = 4;  // rows that share the look-ups
constexpr int CHAINS = 4;     // sums of a row that run beside each other, to hide the latency of an addition

struct Lanes {
  __m512 v;
};

inline Lanes none() { return {_mm512_setzero_ps()}; }
inline Lanes all(float x) { return {_mm512_set1_ps(x)}; }
inline Lanes load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, Lanes x) { _mm512_storeu_ps(p, x.v); }
inline Lanes add(Lanes a, Lanes b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Lanes subtract(Lanes a, Lanes b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Lanes multiply(Lanes a, Lanes b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Lanes fma(Lanes a, Lanes b, Lanes c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline float sum(Lanes x) { return _mm512_reduce_add_ps(x.v); }
inline float half_value(uint16_t half) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(half))); }

inline Lanes load_bytes(const uint8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}

inline Lanes load_halves(const uint8_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}

inline Lanes load_brains(const uint8_t* p) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16))};
}

inline void store_halves(uint8_t* p, Lanes x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT));
}

template <int BITS>
struct Table {
  __m512 values;

  explicit Table(const float* levels) {
    alignas(64) float repeated[16];
    for (int i = 0; i < 16; ++i) repeated[i] = levels[i & ((1 << BITS) - 1)];
    values = _mm512_load_ps(repeated);
  }

  Table minus(Lanes zero) const { return Table(_mm512_sub_ps(values, zero.v)); }
  Table times(Lanes scale) const { return Table(_mm512_mul_ps(values, scale.v)); }

 private:
  explicit Table(__m512 values) : values(values) {}
};

inline __m512i every(const uint8_t* dword) { return _mm512_set1_epi32(static_cast<int>(load32(dword))); }
inline __m512i shift(__m512i codes, __m512i by) { return _mm512_srlv_epi32(codes, by); }

// The values of sixteen codes: those of number 16 * j and on, of the chunk at `codes`; 3 bits: two bits each there, the
// third at `plane`.
template <int BITS>
inline __attribute__((always_inline)) Lanes look_up(const uint8_t* codes, const uint8_t* plane, int j, const Table<BITS>& table) {
  const __m512i ones = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i half = _mm512_set1_epi32(j % 2 * 16);  // one bit each: a dword serves two pieces
  __m512i index;
  if constexpr (BITS == 1) index = shift(every(codes + j / 2 * 4), _mm512_add_epi32(ones, half));
  if constexpr (BITS == 2 || BITS == 3) index = shift(every(codes + 4 * j), _mm512_slli_epi32(ones, 1));
  if constexpr (BITS == 3) {
    const __m512i two = _mm512_set1_epi32(2), low = _mm512_set1_epi32(3);
    const __m512i third = _mm512_rorv_epi32(every(plane + j / 2 * 4), _mm512_sub_epi32(_mm512_add_epi32(ones, half), two));
    index = _mm512_ternarylogic_epi32(low, index, third, 0xca);  // low ? index : third, bit by bit
  }
  if constexpr (BITS == 4) {
    const __m512i both = _mm512_mask_set1_epi32(every(codes + 8 * j), 0xff00, static_cast<int>(load32(codes + 8 * j + 4)));
    index = shift(both, _mm512_slli_epi32(_mm512_and_si512(ones, _mm512_set1_epi32(7)), 2));
  }
  return {_mm512_permutexvar_ps(index, table.values)};
}

#elif defined(BL_HAS_avx2)

constexpr int TILE_ROWS = 2;
constexpr int CHAINS = 2;

struct Lanes {
  __m256 a, b;
};

inline Lanes none() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Lanes all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Lanes load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, Lanes x) { _mm256_storeu_ps(p, x.a), _mm256_storeu_ps(p + 8, x.b); }
inline Lanes add(Lanes x, Lanes y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline Lanes subtract(Lanes x, Lanes y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline Lanes multiply(Lanes x, Lanes y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline Lanes fma(Lanes x, Lanes y, Lanes z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }

inline float sum(Lanes x) {
  const __m256 eight = _mm256_add_ps(x.a, x.b);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

inline float half_value(uint16_t half) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(half))); }

inline __m256i eight_bytes(const uint8_t* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}

inline __m256 eight_brains(const uint8_t* p) {
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

inline Lanes load_bytes(const uint8_t* p) {
  return {_mm256_cvtepi32_ps(eight_bytes(p)), _mm256_cvtepi32_ps(eight_bytes(p + 8))};
}

inline Lanes load_halves(const uint8_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16)))};
}

inline Lanes load_brains(const uint8_t* p) { return {eight_brains(p), eight_brains(p + 16)}; }

inline void store_halves(uint8_t* p, Lanes x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 16), _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT));
}

template <int BITS>
struct Table {
  __m256 low, high;

  explicit Table(const float* levels) {
    if constexpr (BITS == 1) low = _mm256_set1_ps(levels[0]), high = _mm256_set1_ps(levels[1]);
    if constexpr (BITS == 2) low = high = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(levels));
    if constexpr (BITS == 3) {
      low = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(levels));
      high = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(levels + 4));
    }
    if constexpr (BITS == 4) low = _mm256_loadu_ps(levels), high = _mm256_loadu_ps(levels + 8);
  }

  Table minus(Lanes zero) const { return Table(_mm256_sub_ps(low, zero.a), _mm256_sub_ps(high, zero.a)); }
  Table times(Lanes scale) const { return Table(_mm256_mul_ps(low, scale.a), _mm256_mul_ps(high, scale.a)); }

 private:
  Table(__m256 low, __m256 high) : low(low), high(high) {}
};

// `high` where bit `bit` of the index is set, else `low`; a blend reads the topmost bit of a lane.
template <int BIT>
inline __m256 choose(__m256i index, __m256 low, __m256 high) {
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 31 - BIT)));
}

template <int BITS>
inline __m256 eight(uint32_t codes, uint32_t plane, const Table<BITS>& table) {
  const __m256i by_ones = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  if constexpr (BITS == 1) {
    const __m256i index = _mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(codes)), by_ones);
    return choose<0>(index, table.low, table.high);
  } else if constexpr (BITS == 4) {
    const __m256i shifts = _mm256_slli_epi32(by_ones, 2);
    const __m256i index = _mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(codes)), shifts);
    return choose<3>(index, _mm256_permutevar8x32_ps(table.low, index), _mm256_permutevar8x32_ps(table.high, index));
  } else {
    const __m256i shifts = _mm256_slli_epi32(by_ones, 1);
    const __m256i index = _mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(codes)), shifts);
    const __m256 low = _mm256_permutevar8x32_ps(table.low, index);
    if constexpr (BITS == 2) return low;
    const __m256i third = _mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(plane)), by_ones);
    return choose<0>(third, low, _mm256_permutevar8x32_ps(table.high, index));
  }
}

template <int BITS>
inline Lanes look_up(const uint8_t* codes, const uint8_t* plane, int j, const Table<BITS>& table) {
  const uint32_t third = BITS == 3 ? load16(plane + 2 * j) : 0;
  codes += 2 * (BITS == 3 ? 2 : BITS) * j;
  if constexpr (BITS == 4) return {eight<4>(load32(codes), 0, table), eight<4>(load32(codes + 4), 0, table)};
  const uint32_t bits = BITS == 1 ? load16(codes) : load32(codes);
  return {eight<BITS>(bits, third, table), eight<BITS>(bits >> (BITS == 1 ? 8 : 16), third >> 8, table)};
}

#else

constexpr int TILE_ROWS = 4;
constexpr int CHAINS = 1;

struct Lanes {
  float v[16];
};

template <class F>
inline Lanes each(F value) {
  Lanes out;
  for (int i = 0; i < 16; ++i) out.v[i] = value(i);
  return out;
}

inline float widen(uint32_t bits) {
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

inline uint32_t bits_of(float x) {
  uint32_t out;
  std::memcpy(&out, &x, sizeof out);
  return out;
}

// fp16 to float: the exponent is moved by a multiplication, which gets subnormals right; infinity and NaN apart.
inline float half_value(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16, rest = half & 0x7fffu;
  const float magnitude = rest < 0x7c00u ? widen(rest << 13) * 0x1p112f : widen(0x7f800000u | (rest & 0x3ffu) << 13);
  return widen(bits_of(magnitude) | sign);
}

// float to fp16, ties to even: adding a power of two makes the hardware round at the right bit.
inline uint16_t half_bits(float x) {
  const uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x38800000u) return static_cast<uint16_t>(sign | (bits_of(widen(magnitude) + 0.5f) - 0x3f000000u));
  return static_cast<uint16_t>(sign | (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13);
}

inline Lanes none() { return each([](int) { return 0.0f; }); }
inline Lanes all(float x) { return each([=](int) { return x; }); }
inline Lanes load(const float* p) { return each([=](int i) { return p[i]; }); }
inline void store(float* p, const Lanes& x) { std::memcpy(p, x.v, sizeof x.v); }
inline Lanes add(const Lanes& a, const Lanes& b) { return each([&](int i) { return a.v[i] + b.v[i]; }); }
inline Lanes subtract(const Lanes& a, const Lanes& b) { return each([&](int i) { return a.v[i] - b.v[i]; }); }
inline Lanes multiply(const Lanes& a, const Lanes& b) { return each([&](int i) { return a.v[i] * b.v[i]; }); }
inline Lanes fma(const Lanes& a, const Lanes& b, const Lanes& c) { return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; }); }
inline Lanes load_bytes(const uint8_t* p) { return each([=](int i) { return static_cast<float>(p[i]); }); }
inline Lanes load_halves(const uint8_t* p) { return each([=](int i) { return half_value(load16(p + 2 * i)); }); }
inline Lanes load_brains(const uint8_t* p) { return each([=](int i) { return widen(static_cast<uint32_t>(load16(p + 2 * i)) << 16); }); }

inline void store_halves(uint8_t* p, const Lanes& x) {
  for (int i = 0; i < 16; ++i) {
    const uint16_t half = half_bits(x.v[i]);
    std::memcpy(p + 2 * i, &half, sizeof half);
  }
}

inline float sum(Lanes x) {
  for (int half = 8; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) x.v[i] += x.v[i + half];
  return x.v[0];
}

template <int BITS>
struct Table {
  float v[1 << BITS];

  explicit Table(const float* levels) { std::memcpy(v, levels, sizeof v); }

  Table minus(const Lanes& zero) const { return each([&](float level) { return level - zero.v[0]; }); }
  Table times(const Lanes& scale) const { return each([&](float level) { return level * scale.v[0]; }); }

 private:
  template <class F>
  Table each(F value) const {
    Table out(*this);
    for (float& level : out.v) level = value(level);
    return out;
  }
};

template <int BITS>
inline Lanes look_up(const uint8_t* codes, const uint8_t* plane, int j, const Table<BITS>& table) {
  codes += 2 * (BITS == 3 ? 2 : BITS) * j, plane += 2 * j;
  if constexpr (BITS == 3)
    return each([&](int i) { return table.v[(codes[i / 4] >> 2 * (i % 4) & 3) | (plane[i / 8] >> i % 8 & 1) << 2]; });
  constexpr int PER_BYTE = 8 / BITS;
  return each([&](int i) { return table.v[codes[i / PER_BYTE] >> BITS * (i % PER_BYTE) & ((1 << BITS) - 1)]; });
}

#endif

// bfloat16, ties to even; a NaN stays one.
inline uint16_t brain_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

#if defined(BL_HAS_avx512)

// Sixteen numbers that bfloat16 has: their upper halves.
inline void store_exact_brains(uint8_t* p, Lanes x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(x.v), 16)));
}

inline void store_brains(uint8_t* p, Lanes x) {
  const __m512i bits = _mm512_castps_si512(x.v), last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(last, _mm512_set1_epi32(0x7fff)));
  const __mmask16 no_number = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  const __m512i rounded = _mm512_mask_or_epi32(up, no_number, bits, _mm512_set1_epi32(0x400000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}

#elif defined(BL_HAS_avx2)

inline void store_upper_halves(uint8_t* p, __m256i a, __m256i b) {
  const __m256i packed = _mm256_packus_epi32(_mm256_srli_epi32(a, 16), _mm256_srli_epi32(b, 16));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}

inline void store_exact_brains(uint8_t* p, Lanes x) { store_upper_halves(p, _mm256_castps_si256(x.a), _mm256_castps_si256(x.b)); }

inline __m256i rounded_brains(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x), last = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(last, _mm256_set1_epi32(0x7fff)));
  const __m256i no_number = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(up, _mm256_or_si256(bits, _mm256_set1_epi32(0x400000)), no_number);
}

inline void store_brains(uint8_t* p, Lanes x) { store_upper_halves(p, rounded_brains(x.a), rounded_brains(x.b)); }

#else

inline void store_brains(uint8_t* p, const Lanes& x) {
  float values[16];
  store(values, x);
  uint16_t rounded[16];
  for (int i = 0; i < 16; ++i) rounded[i] = brain_bits(values[i]);
  std::memcpy(p, rounded, sizeof rounded);
}

inline void store_exact_brains(uint8_t* p, const Lanes& x) { store_brains(p, x); }

#endif

}  // namespace bl::BL_ISA
