// What choosing codes needs beyond arithmetic on Lanes: comparisons, choices, whole numbers, and sixteen rows read across.
//
// Nothing here rounds differently from one instruction set to another, so codes and scales are the same bytes on all.
#pragma once

#include "lanes.hpp"

namespace bl::BL_ISA {

#if defined(BL_HAS_avx512)

using Mask = __mmask16;

struct Whole {  // sixteen 32-bit integers
  __m512i v;
};

inline Lanes divide(Lanes a, Lanes b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Lanes root(Lanes x) { return {_mm512_sqrt_ps(x.v)}; }
inline Lanes least(Lanes a, Lanes b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Lanes most(Lanes a, Lanes b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Lanes absolute(Lanes x) { return {_mm512_abs_ps(x.v)}; }
inline Lanes rounded(Lanes x) { return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Mask above(Lanes a, Lanes b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ); }
inline bool any_unequal(Lanes a, Lanes b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_NEQ_UQ) != 0; }
inline Lanes choose(Mask which, Lanes yes, Lanes no) { return {_mm512_mask_blend_ps(which, no.v, yes.v)}; }

inline Whole nothing() { return {_mm512_setzero_si512()}; }
inline Whole whole(Lanes x) { return {_mm512_cvtps_epi32(x.v)}; }
inline Whole add_where(Mask which, Whole x, int amount) {
  return {_mm512_mask_add_epi32(x.v, which, x.v, _mm512_set1_epi32(amount))};
}
inline Whole add_all(Whole x, int amount) { return {_mm512_add_epi32(x.v, _mm512_set1_epi32(amount))}; }
inline Whole masked(Whole x, int bits) { return {_mm512_and_si512(x.v, _mm512_set1_epi32(bits))}; }
inline Whole join(Whole a, Whole b) { return {_mm512_or_si512(a.v, b.v)}; }
inline Whole left(Whole x, int by) { return {_mm512_sll_epi32(x.v, _mm_cvtsi32_si128(by))}; }
inline Whole right(Whole x, int by) { return {_mm512_srl_epi32(x.v, _mm_cvtsi32_si128(by))}; }
inline void store(uint32_t* p, Whole x) { _mm512_storeu_si512(p, x.v); }

// A table of sixteen numbers, looked up by the low four bits.
struct Sixteen {
  __m512 v;
  explicit Sixteen(const float* p) : v(_mm512_loadu_ps(p)) {}
};
inline Lanes look_up(const Sixteen& table, Whole index) { return {_mm512_permutexvar_ps(index.v, table.v)}; }

// Sixteen numbers of each of sixteen rows, turned: to[16 * j + i] = rows[i][j].
inline void load_across(const float* const* rows, float* to) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(rows[i]);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      const __m512d x = _mm512_castps_pd(b[i + j]), y = _mm512_castps_pd(b[i + j + 2]);
      a[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(x, y));
      a[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(x, y));
    }
  for (int i = 0; i < 4; ++i) {  // a[4 * q + i]: rows 4q to 4q + 3 of columns i, i + 4, i + 8, i + 12
    const __m512 even = _mm512_shuffle_f32x4(a[i], a[i + 4], 0x88), odd = _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd);
    const __m512 even2 = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0x88);
    const __m512 odd2 = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0xdd);
    _mm512_storeu_ps(to + 16 * i, _mm512_shuffle_f32x4(even, even2, 0x88));
    _mm512_storeu_ps(to + 16 * (i + 8), _mm512_shuffle_f32x4(even, even2, 0xdd));
    _mm512_storeu_ps(to + 16 * (i + 4), _mm512_shuffle_f32x4(odd, odd2, 0x88));
    _mm512_storeu_ps(to + 16 * (i + 12), _mm512_shuffle_f32x4(odd, odd2, 0xdd));
  }
}

#elif defined(BL_HAS_avx2)

struct Mask {
  __m256 a, b;
};

struct Whole {
  __m256i a, b;
};

inline Lanes divide(Lanes x, Lanes y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline Lanes root(Lanes x) { return {_mm256_sqrt_ps(x.a), _mm256_sqrt_ps(x.b)}; }
inline Lanes least(Lanes x, Lanes y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline Lanes most(Lanes x, Lanes y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline Lanes absolute(Lanes x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
inline Lanes rounded(Lanes x) {
  constexpr int EVEN = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.a, EVEN), _mm256_round_ps(x.b, EVEN)};
}
inline Mask above(Lanes x, Lanes y) {
  return {_mm256_cmp_ps(x.a, y.a, _CMP_GT_OQ), _mm256_cmp_ps(x.b, y.b, _CMP_GT_OQ)};
}
inline bool any_unequal(Lanes x, Lanes y) {
  const __m256 a = _mm256_cmp_ps(x.a, y.a, _CMP_NEQ_UQ), b = _mm256_cmp_ps(x.b, y.b, _CMP_NEQ_UQ);
  return _mm256_movemask_ps(_mm256_or_ps(a, b)) != 0;
}
inline Lanes choose(Mask which, Lanes yes, Lanes no) {
  return {_mm256_blendv_ps(no.a, yes.a, which.a), _mm256_blendv_ps(no.b, yes.b, which.b)};
}

inline Whole nothing() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline Whole whole(Lanes x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
inline Whole masked(Whole x, int bits) {
  const __m256i all = _mm256_set1_epi32(bits);
  return {_mm256_and_si256(x.a, all), _mm256_and_si256(x.b, all)};
}
inline Whole add_all(Whole x, int amount) {
  const __m256i all = _mm256_set1_epi32(amount);
  return {_mm256_add_epi32(x.a, all), _mm256_add_epi32(x.b, all)};
}
inline Whole add_where(Mask which, Whole x, int amount) {
  const Whole added = masked({_mm256_castps_si256(which.a), _mm256_castps_si256(which.b)}, amount);
  return {_mm256_add_epi32(x.a, added.a), _mm256_add_epi32(x.b, added.b)};
}
inline Whole join(Whole x, Whole y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
inline Whole left(Whole x, int by) {
  const __m128i count = _mm_cvtsi32_si128(by);
  return {_mm256_sll_epi32(x.a, count), _mm256_sll_epi32(x.b, count)};
}
inline Whole right(Whole x, int by) {
  const __m128i count = _mm_cvtsi32_si128(by);
  return {_mm256_srl_epi32(x.a, count), _mm256_srl_epi32(x.b, count)};
}
inline void store(uint32_t* p, Whole x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.a);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), x.b);
}

struct Sixteen {
  __m256 low, high;
  explicit Sixteen(const float* p) : low(_mm256_loadu_ps(p)), high(_mm256_loadu_ps(p + 8)) {}
};
inline __m256 look_up(const Sixteen& table, __m256i index) {
  return choose<3>(index, _mm256_permutevar8x32_ps(table.low, index), _mm256_permutevar8x32_ps(table.high, index));
}
inline Lanes look_up(const Sixteen& table, Whole index) { return {look_up(table, index.a), look_up(table, index.b)}; }

// Eight numbers of each of eight rows, turned: to[16 * j + i] = rows[i][j].
inline void eight_across(const float* const* rows, int64_t at, float* to) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_ps(rows[i] + at);
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      const __m256d x = _mm256_castps_pd(b[i + j]), y = _mm256_castps_pd(b[i + j + 2]);
      a[i + 2 * j] = _mm256_castpd_ps(_mm256_unpacklo_pd(x, y));
      a[i + 2 * j + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(x, y));
    }
  for (int j = 0; j < 4; ++j) {
    _mm256_storeu_ps(to + 16 * j, _mm256_permute2f128_ps(a[j], a[j + 4], 0x20));
    _mm256_storeu_ps(to + 16 * (j + 4), _mm256_permute2f128_ps(a[j], a[j + 4], 0x31));
  }
}

inline void load_across(const float* const* rows, float* to) {
  for (int half = 0; half < 2; ++half)
    for (int at = 0; at < 16; at += 8) eight_across(rows + 8 * half, at, to + 16 * at + 8 * half);
}

#else

struct Mask {
  bool v[16];
};

struct Whole {
  int32_t v[16];
};

template <class F>
inline Whole each_whole(F value) {
  Whole out;
  for (int i = 0; i < 16; ++i) out.v[i] = value(i);
  return out;
}

inline Lanes divide(const Lanes& a, const Lanes& b) { return each([&](int i) { return a.v[i] / b.v[i]; }); }
inline Lanes root(const Lanes& x) { return each([&](int i) { return __builtin_sqrtf(x.v[i]); }); }
inline Lanes least(const Lanes& a, const Lanes& b) { return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; }); }
inline Lanes most(const Lanes& a, const Lanes& b) { return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
inline Lanes absolute(const Lanes& x) { return each([&](int i) { return __builtin_fabsf(x.v[i]); }); }
// Ties to even without a call: 2**23 more leaves no room for a fraction. Signs are kept for the sake of -0.
inline Lanes rounded(const Lanes& x) {
  return each([&](int i) {
    const float size = __builtin_fabsf(x.v[i]);
    return size < 0x1p23f ? __builtin_copysignf(size + 0x1p23f - 0x1p23f, x.v[i]) : x.v[i];
  });
}
inline Mask above(const Lanes& a, const Lanes& b) {
  Mask out;
  for (int i = 0; i < 16; ++i) out.v[i] = a.v[i] > b.v[i];
  return out;
}
inline bool any_unequal(const Lanes& a, const Lanes& b) {
  bool found = false;
  for (int i = 0; i < 16; ++i) found |= !(a.v[i] == b.v[i]);
  return found;
}
inline Lanes choose(const Mask& which, const Lanes& yes, const Lanes& no) {
  return each([&](int i) { return which.v[i] ? yes.v[i] : no.v[i]; });
}

inline Whole nothing() { return each_whole([](int) { return 0; }); }
inline Whole whole(const Lanes& x) { return each_whole([&](int i) { return static_cast<int32_t>(x.v[i]); }); }
inline Whole add_where(const Mask& which, const Whole& x, int amount) {
  return each_whole([&](int i) { return x.v[i] + (which.v[i] ? amount : 0); });
}
inline Whole add_all(const Whole& x, int amount) { return each_whole([&](int i) { return x.v[i] + amount; }); }
inline Whole masked(const Whole& x, int bits) { return each_whole([&](int i) { return x.v[i] & bits; }); }
inline Whole join(const Whole& a, const Whole& b) { return each_whole([&](int i) { return a.v[i] | b.v[i]; }); }
inline Whole left(const Whole& x, int by) {
  return each_whole([&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(x.v[i]) << by); });
}
inline Whole right(const Whole& x, int by) {
  return each_whole([&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(x.v[i]) >> by); });
}
inline void store(uint32_t* p, const Whole& x) { std::memcpy(p, x.v, sizeof x.v); }

struct Sixteen {
  float v[16];
  explicit Sixteen(const float* p) { std::memcpy(v, p, sizeof v); }
};
inline Lanes look_up(const Sixteen& table, const Whole& index) { return each([&](int i) { return table.v[index.v[i] & 15]; }); }

inline void load_across(const float* const* rows, float* to) {
  for (int i = 0; i < 16; ++i) {
    float row[16];
    std::memcpy(row, static_cast<const void*>(rows[i]), sizeof row);  // codes that are read as words lie at any byte
    for (int j = 0; j < 16; ++j) to[16 * j + i] = row[j];
  }
}

#endif

}  // namespace bl::BL_ISA
