// Numbers of an input row, in float32, for the AVX-512 kernels that make whole numbers of them.
//
// Included only by sources that are compiled once per instruction set.
#pragma once

#include "bitloft.h"
#include "lanes.hpp"
#include "product.hpp"

#if defined(BL_HAS_avx512)

namespace bl::BL_ISA {

#define BL_INLINE inline __attribute__((always_inline))

constexpr float SMALLEST = 0x1p-100f;  // of what a group is scaled by

BL_INLINE __m512 numbers(const void* x, int64_t at, int32_t dtype) {
  if (dtype == BL_F32) return _mm512_loadu_ps(static_cast<const float*>(x) + at);
  const uint8_t* halves = static_cast<const uint8_t*>(x) + 2 * at;
  return dtype == BL_BF16 ? load_brains(halves).v : load_halves(halves).v;
}

BL_INLINE __m512 some_numbers(const void* x, int64_t at, int64_t count, int32_t dtype) {
  alignas(64) uint8_t copy[64] = {};
  const int64_t size = dtype == BL_F32 ? 4 : 2;
  std::memcpy(copy, static_cast<const char*>(x) + at * size, static_cast<size_t>(count * size));
  return numbers(copy, 0, dtype);
}

// Columns of a piece in float32, zeros behind the last; returns the largest magnitude.
inline float widen(const Preparation& p, int64_t begin, int64_t count, float* to) {
  __m512 most = _mm512_setzero_ps();
  for (int64_t i = 0; i < count; i += 16) {
    const int64_t left = p.columns - begin - i;
    const __m512 x = left >= 16 ? numbers(p.x, begin + i, p.dtype)
                     : left > 0 ? some_numbers(p.x, begin + i, left, p.dtype) : _mm512_setzero_ps();
    _mm512_store_ps(to + i, x);
    most = _mm512_max_ps(most, _mm512_abs_ps(x));
  }
  return _mm512_reduce_max_ps(most);
}

}  // namespace bl::BL_ISA

#endif
