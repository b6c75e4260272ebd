// Codes of 3 bits in memory: where the blocks of an arranged matrix lie, and how AVX-512 reads their words.
//
// AVX-512 keeps the four bytes of a word apart: a unit of sixty-four rows is twelve lines of sixty-four bytes, [byte][word][row],
// so that a byte of all rows is one register of six-bit numbers, which a permute of bytes looks up (product_sixes.cpp). The
// row r = 16 v + 4 l + t is byte 16 l + 8 (v % 2) + 2 t + v / 2 of a line: what unpacking a line to words leaves in order. Up to
// BESIDE blocks lie beside each other, piece by piece ([piece][block][units]): tables of a piece then stay in the first-level
// cache while all of them are read, in one stream.
#pragma once

#include "bitloft.h"
#include "product.hpp"

#if defined(BL_HAS_avx512)
#include <immintrin.h>
#endif

namespace bl {

constexpr int64_t BESIDE = 32;

// Where an arranged block of a matrix lies among those beside it.
struct Neighbours {
  int64_t first;   // row of the first of them
  int64_t beside;  // how many they are
  int64_t place;   // which of them this is
};

inline Neighbours neighbours(const bl_matrix& m, int64_t row) {
  const int64_t block = row / BLOCK, first = block / BESIDE * BESIDE, left = m.rows / BLOCK - first;
  return {first * BLOCK, left < BESIDE ? left : BESIDE, block - first};
}

// The words of one piece of a block: `unit` is the first of its `units`.
inline int64_t piece_at(int64_t unit, int64_t units, int64_t beside, int64_t place) {
  return (unit * beside + place * units) * unit_words(3) * BLOCK;
}

// How many pieces ahead of the one of `block` to fetch from: what follows a run of blocks is the same run of the next piece.
inline int64_t later(const Product& p, int64_t block) {
  constexpr int64_t AHEAD = 16;  // 24 KB of groups of 64; half as many do, a quarter cost a tenth
  const int64_t then = block + AHEAD;
  return then + then / p.blocks * (p.beside - p.blocks) - block;
}

}  // namespace bl

#if defined(BL_HAS_avx512)

namespace bl::BL_ISA {

constexpr int64_t WORDS_OUT = 4;  // what three words become: the fourth has the bits 6 and 7 of their bytes

// Lines of a unit to words, [4][64].
inline __attribute__((always_inline)) void write_words(const uint32_t* lines, uint32_t* words) {
  const __m512i low = _mm512_set1_epi16(0x00ff), second = _mm512_set1_epi8(0x0c), third = _mm512_set1_epi8(0x30);
  __m512i found[4][WORDS_OUT];
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    const uint32_t* at = lines + k * 3 * 16;
    const __m512i a = _mm512_loadu_si512(at), b = _mm512_loadu_si512(at + 16), c = _mm512_loadu_si512(at + 32);
    const __m512i both = _mm512_ternarylogic_epi32(second, _mm512_srli_epi16(b, 4), _mm512_srli_epi16(a, 6), 0xca);
    found[k][0] = a, found[k][1] = b, found[k][2] = c;
    found[k][3] = _mm512_ternarylogic_epi32(third, _mm512_srli_epi16(c, 2), both, 0xca);
  }
#pragma GCC unroll 4
  for (int w = 0; w < WORDS_OUT; ++w, words += BLOCK) {
    __m512i even[2], odd[2];  // rows, of bytes 0 and 1, then 2 and 3
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const __m512i a = found[2 * h][w], b = found[2 * h + 1][w];
      even[h] = _mm512_ternarylogic_epi32(low, a, _mm512_slli_epi16(b, 8), 0xca);
      odd[h] = _mm512_ternarylogic_epi32(low, _mm512_srli_epi16(a, 8), b, 0xca);
    }
    _mm512_store_si512(words, _mm512_unpacklo_epi16(even[0], even[1]));
    _mm512_store_si512(words + 16, _mm512_unpackhi_epi16(even[0], even[1]));
    _mm512_store_si512(words + 32, _mm512_unpacklo_epi16(odd[0], odd[1]));
    _mm512_store_si512(words + 48, _mm512_unpackhi_epi16(odd[0], odd[1]));
  }
}

// Words of a unit, [3][64], to lines, in place.
inline void write_lines(uint32_t* unit) {
  const __m512i low = _mm512_set1_epi16(0x00ff), half = _mm512_set1_epi32(0xffff);
  __m512i lines[4][3];
  for (int w = 0; w < 3; ++w)
    for (int h = 0; h < 2; ++h) {  // bytes 0 and 1, then 2 and 3
      __m512i rows[2];             // even, odd
      for (int o = 0; o < 2; ++o) {
        __m512i a = _mm512_loadu_si512(unit + w * BLOCK + 32 * o), b = _mm512_loadu_si512(unit + w * BLOCK + 32 * o + 16);
        if (h == 1) a = _mm512_srli_epi32(a, 16), b = _mm512_srli_epi32(b, 16);
        rows[o] = _mm512_packus_epi32(_mm512_and_si512(a, half), _mm512_and_si512(b, half));
      }
      lines[2 * h][w] = _mm512_ternarylogic_epi32(low, rows[0], _mm512_slli_epi16(rows[1], 8), 0xca);
      lines[2 * h + 1][w] = _mm512_ternarylogic_epi32(low, _mm512_srli_epi16(rows[0], 8), rows[1], 0xca);
    }
  for (int k = 0; k < 4; ++k)
    for (int w = 0; w < 3; ++w) _mm512_storeu_si512(unit + (k * 3 + w) * 16, lines[k][w]);
}

}  // namespace bl::BL_ISA

#endif
