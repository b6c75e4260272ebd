// Sixteen 32-bit words of codes, one per row, and tables that are looked up by the low bits of a word.
//
// A table repeats its levels up to the width that the permute reads, so codes above the wanted one need no mask.
// Included only by sources that are compiled once per instruction set; `lanes.hpp` has the floats.
#pragma once

#include "lanes.hpp"

namespace bl::BL_ISA {

#if defined(BL_HAS_avx512)

struct Words {
  __m512i v;
};

inline Words load_words(const uint32_t* p) { return {_mm512_loadu_si512(p)}; }
inline Words right(Words w, int n) { return {_mm512_srli_epi32(w.v, static_cast<unsigned>(n))}; }

// a where the mask has a one, else b
inline Words select(Words mask, Words a, Words b) { return {_mm512_ternarylogic_epi32(mask.v, a.v, b.v, 0xca)}; }
inline Words all_words(uint32_t x) { return {_mm512_set1_epi32(static_cast<int>(x))}; }

template <int BITS>
struct Book {
  __m512 v;
  explicit Book(const float* levels) {
    alignas(64) float repeated[16];
    for (int i = 0; i < 16; ++i) repeated[i] = levels[i & ((1 << BITS) - 1)];
    v = _mm512_load_ps(repeated);
  }
  Lanes find(Words index) const { return {_mm512_permutexvar_ps(index.v, v)}; }
};

// Sixteen sums, chosen by four bits.
inline Lanes find_sum(Words index, const float* sums) { return {_mm512_permutexvar_ps(index.v, _mm512_load_ps(sums))}; }

// Levels in bfloat16; both halves of a word look up at once and give a pair.
template <int BITS>
struct PairBook {
  __m512i v;
  explicit PairBook(const float* levels) {
    alignas(64) uint16_t repeated[32];
    for (int i = 0; i < 32; ++i) repeated[i] = brain_bits(levels[i & ((1 << BITS) - 1)]);
    v = _mm512_load_si512(repeated);
  }
  Words find(Words index) const { return {_mm512_permutexvar_epi16(index.v, v)}; }
};

inline Lanes dot(Lanes sum, Words a, Words b) {
  return {_mm512_dpbf16_ps(sum.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v))};
}

inline void store_words(uint32_t* p, Words w) { _mm512_storeu_si512(p, w.v); }

#elif defined(BL_HAS_avx2)

struct Words {
  __m256i a, b;
};

inline Words load_words(const uint32_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 8))};
}
inline Words right(Words w, int n) { return {_mm256_srli_epi32(w.a, n), _mm256_srli_epi32(w.b, n)}; }
inline __m256i select(__m256i mask, __m256i a, __m256i b) {
  return _mm256_or_si256(_mm256_and_si256(mask, a), _mm256_andnot_si256(mask, b));
}
inline Words select(Words mask, Words a, Words b) { return {select(mask.a, a.a, b.a), select(mask.b, a.b, b.b)}; }
inline Words all_words(uint32_t x) {
  return {_mm256_set1_epi32(static_cast<int>(x)), _mm256_set1_epi32(static_cast<int>(x))};
}

// A permute reads three bits; the fourth chooses between two of them.
inline __m256 find_of_sixteen(__m256i index, __m256 low, __m256 high) {
  const __m256 fourth = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index), fourth);
}

template <int BITS>
struct Book {
  __m256 low, high;
  explicit Book(const float* levels) {
    alignas(32) float repeated[16];
    for (int i = 0; i < 16; ++i) repeated[i] = levels[i & ((1 << BITS) - 1)];
    low = _mm256_load_ps(repeated), high = _mm256_load_ps(repeated + 8);
  }
  Lanes find(Words index) const {
    if constexpr (BITS == 4) return {find_of_sixteen(index.a, low, high), find_of_sixteen(index.b, low, high)};
    return {_mm256_permutevar8x32_ps(low, index.a), _mm256_permutevar8x32_ps(low, index.b)};
  }
};

inline Lanes find_sum(Words index, const float* sums) {
  const __m256 low = _mm256_load_ps(sums), high = _mm256_load_ps(sums + 8);
  return {find_of_sixteen(index.a, low, high), find_of_sixteen(index.b, low, high)};
}

#else

struct Words {
  uint32_t v[16];
};

template <class F>
inline Words each_word(F value) {
  Words out;
  for (int i = 0; i < 16; ++i) out.v[i] = value(i);
  return out;
}

inline Words load_words(const uint32_t* p) { return each_word([=](int i) { return p[i]; }); }
inline Words right(const Words& w, int n) { return each_word([&](int i) { return w.v[i] >> n; }); }
inline Words select(const Words& mask, const Words& a, const Words& b) {
  return each_word([&](int i) { return (mask.v[i] & a.v[i]) | (~mask.v[i] & b.v[i]); });
}
inline Words all_words(uint32_t x) { return each_word([=](int) { return x; }); }

template <int BITS>
struct Book {
  const float* v;
  explicit Book(const float* levels) : v(levels) {}
  Lanes find(const Words& index) const { return each([&](int i) { return v[index.v[i] & ((1u << BITS) - 1)]; }); }
};

inline Lanes find_sum(const Words& index, const float* sums) { return each([&](int i) { return sums[index.v[i] & 15]; }); }

#endif

}  // namespace bl::BL_ISA
