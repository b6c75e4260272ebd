// A few rows of input, one by one, and codes of 3 bits: two neighbouring codes, six bits, choose one of sixty-four sums of two products.
//
// As in product_bytes.cpp the sums are whole numbers, multiples of a step of their piece, but a register looks up one sum for
// each of sixty-four rows: an index takes no mask (a permute of bytes reads six bits), and one byte of three words makes four of
// them. The four results of a column of bytes are added before they are widened, so a digit has six bits: four digits, a sign and
// 23 bits, for float32 and float16 input, three for bfloat16. Sums of bytes go to words: of all bytes as they are, which
// wraps, and of the odd ones, from which the even ones follow.
#include <math.h>

#include "input_row.hpp"
#include "kernels.hpp"
#include "three.hpp"

namespace bl::BL_ISA {

#if defined(BL_HAS_avx512)

namespace {

constexpr int VECTORS = BLOCK / 16;
constexpr int TURNS = 4;         // of a unit: one for each byte of its words, eight columns
constexpr int64_t TABLE = 256;   // bytes of a digit of a turn: four sums of two columns, of sixty-four each
constexpr int DIGIT = 6;

// The first of the two columns whose codes are in byte `k` of word `w`.
constexpr int pair_column(int w, int k) { return 4 * w + 2 * (k % 2) + 16 * (k / 2); }

// Digits of sixty-four whole numbers, each 64 bytes of a plane.
struct Digits {
  __m512i low, high;  // which bytes of two registers are digits 0 and 1, and 2 and 3
  const __m512i places = _mm512_set1_epi64(0x322c'2620'120c'0600), six = _mm512_set1_epi8(63);

  Digits() {
    alignas(64) uint8_t first[64], second[64];
    for (int i = 0; i < 64; ++i) {
      const int number = i % 32 < 16 ? i % 16 * 4 : 64 + i % 16 * 4;  // of the first register or the second
      first[i] = static_cast<uint8_t>(number + i / 32);
      second[i] = static_cast<uint8_t>(number + 2 + i / 32);
    }
    low = _mm512_load_si512(first), high = _mm512_load_si512(second);
  }

  template <int PLANES>
  BL_INLINE void store(const __m512i* numbers, uint8_t* to) const {
    __m512i digits[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) digits[i] = _mm512_and_si512(six, _mm512_multishift_epi64_epi8(places, numbers[i]));
    two(digits, low, to, to + TABLE);
    two(digits, high, to + 2 * TABLE, PLANES == 4 ? to + 3 * TABLE : nullptr);
  }

 private:
  BL_INLINE static void two(const __m512i* digits, __m512i which, uint8_t* first, uint8_t* second) {
    const __m512i a = _mm512_permutex2var_epi8(digits[0], which, digits[1]), b = _mm512_permutex2var_epi8(digits[2], which, digits[3]);
    _mm512_store_si512(first, _mm512_shuffle_i64x2(a, b, 0x44));
    if (second != nullptr) _mm512_store_si512(second, _mm512_shuffle_i64x2(a, b, 0xee));
  }
};

// The largest magnitude of a sum of two neighbouring columns, signs being free.
float largest_pair(const float* x, int64_t count) {
  __m512 most = _mm512_setzero_ps();
  for (int64_t i = 0; i < count; i += 16) {
    const __m512 size = _mm512_abs_ps(_mm512_load_ps(x + i));
    most = _mm512_max_ps(most, _mm512_add_ps(size, _mm512_permute_ps(size, 0xb1)));
  }
  return _mm512_reduce_max_ps(most);
}

// Tables of a piece, [turn][digit][four pairs of columns][64].
template <int PLANES>
class Tables {
 public:
  explicit Tables(const float* levels) {
    for (int c = 0; c < 8; ++c) largest_ = fabsf(levels[c]) > largest_ ? fabsf(levels[c]) : largest_;
    for (int i = 0; i < 64; ++i) first_[i % 16] = levels[i % 8], second_[i / 16][i % 16] = levels[i / 8];
  }

  // Returns what 1 stands for.
  float make(const float* x, int64_t count, uint8_t* to) const {
    constexpr float TOP = PLANES == 4 ? 8388000.0f : 131000.0f;  // beside a sign: 2^23 or 2^17
    const float most = largest_pair(x, count) * largest_, scale = most > SMALLEST ? TOP / most : TOP / SMALLEST;
    const __m512 factor = _mm512_set1_ps(scale), first = _mm512_mul_ps(_mm512_load_ps(first_), factor);
    const __m512i bias = _mm512_set1_epi32(1 << (DIGIT * PLANES - 1));
    __m512 second[4];
    for (int i = 0; i < 4; ++i) second[i] = _mm512_mul_ps(_mm512_load_ps(second_[i]), factor);
    for (const float* unit = x; unit < x + count; unit += unit_columns(3))
      for (int k = 0; k < TURNS; ++k, to += PLANES * TABLE)
#pragma GCC unroll 4
        for (int w = 0; w < 4; ++w) {
          const float* pair = unit + pair_column(w, k);
          const __m512 product = _mm512_mul_ps(_mm512_set1_ps(pair[0]), first), next = _mm512_set1_ps(pair[1]);
          __m512i sums[4];
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) sums[i] = _mm512_add_epi32(bias, _mm512_cvtps_epi32(_mm512_fmadd_ps(next, second[i], product)));
          digits_.store<PLANES>(sums, to + 64 * w);
        }
    return 1 / scale;
  }

 private:
  const Digits digits_;
  alignas(64) float first_[16], second_[4][16];
  float largest_ = 0;
};

// Sums of digits over a piece, for the even and the odd bytes of a line.
template <int PLANES>
struct Sums {
  __m512i all[PLANES], odd[PLANES];

  // Starts below zero by what makes digits positive, `count` times.
  BL_INLINE explicit Sums(int64_t count) {
#pragma GCC unroll 4
    for (int k = 0; k < PLANES; ++k) all[k] = odd[k] = _mm512_setzero_si512();
    const int bias = static_cast<int>(-count) * (1 << (DIGIT - 1));
    all[PLANES - 1] = _mm512_set1_epi16(static_cast<short>(bias * 257));
    odd[PLANES - 1] = _mm512_set1_epi16(static_cast<short>(bias));
  }

  // Eight columns: three lines of codes.
  BL_INLINE void add(const uint8_t* lines, const uint8_t* table) {
    const __m512i a = _mm512_loadu_si512(lines), b = _mm512_loadu_si512(lines + 64), c = _mm512_loadu_si512(lines + 128);
    const __m512i both = _mm512_ternarylogic_epi32(_mm512_set1_epi8(0x0c), _mm512_srli_epi16(b, 4), _mm512_srli_epi16(a, 6), 0xca);
    const __m512i d = _mm512_ternarylogic_epi32(_mm512_set1_epi8(0x30), _mm512_srli_epi16(c, 2), both, 0xca);
#pragma GCC unroll 4
    for (int k = 0; k < PLANES; ++k, table += TABLE) {
      const __m512i first = _mm512_add_epi8(look_up(a, table), look_up(b, table + 64));
      const __m512i sum = _mm512_add_epi8(first, _mm512_add_epi8(look_up(c, table + 128), look_up(d, table + 192)));
      all[k] = _mm512_add_epi16(all[k], sum);
      odd[k] = _mm512_add_epi16(odd[k], _mm512_srli_epi16(sum, 8));
    }
  }

  // Whole numbers of sixteen rows each, in order.
  BL_INLINE void totals(__m512i* to) {
    const __m512i zero = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int k = 0; k < PLANES; ++k) all[k] = _mm512_sub_epi16(all[k], _mm512_slli_epi16(odd[k], 8));
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const __m512i* s = h == 0 ? all : odd;
      const __m512i last = PLANES == 4 ? s[PLANES - 1] : zero;
      to[2 * h] = join(_mm512_unpacklo_epi16(s[0], s[1]), _mm512_unpacklo_epi16(s[2], last));
      to[2 * h + 1] = join(_mm512_unpackhi_epi16(s[0], s[1]), _mm512_unpackhi_epi16(s[2], last));
    }
  }

 private:
  BL_INLINE static __m512i look_up(__m512i index, const uint8_t* table) { return _mm512_permutexvar_epi8(index, _mm512_load_si512(table)); }

  BL_INLINE static __m512i join(__m512i low, __m512i high) {
    const __m512i weights = _mm512_set1_epi32(64 << 16 | 1);
    return _mm512_add_epi32(_mm512_madd_epi16(low, weights), _mm512_slli_epi32(_mm512_madd_epi16(high, weights), 2 * DIGIT));
  }
};

// One row of input and one piece of a run of blocks; `fetch`: the pieces later on, too.
template <int PLANES>
void multiply_piece(const Product& p, int64_t row, int64_t group, int64_t unit, int64_t units, const uint8_t* table, float step, bool fetch) {
  const __m512 factor = _mm512_set1_ps(step * p.unit);
  for (int64_t block = 0; block < p.blocks; ++block) {
    const uint8_t* lines = reinterpret_cast<const uint8_t*>(p.codes + piece_at(unit, units, p.beside, p.place + block));
    const int64_t jump = fetch ? later(p, block) : 0, scales = p.scale_at(group, block);
    const char* next = reinterpret_cast<const char*>(lines) + jump * units * unit_words(3) * BLOCK * 4;
    Sums<PLANES> sums(units * TURNS * 4);
    for (int64_t i = 0; i < units * TURNS; ++i) {
#pragma GCC unroll 3
      for (int line = 0; line < 3; ++line) _mm_prefetch(next + (3 * i + line) * 64, _MM_HINT_T1);
      sums.add(lines + 3 * 64 * i, table + i * PLANES * TABLE);
    }
    __m512i found[VECTORS];
    sums.totals(found);
    if (p.scales == nullptr)
      for (int64_t half = 0; half < BLOCK; half += 32) _mm_prefetch(reinterpret_cast<const char*>(p.halves + scales + jump * BLOCK + half), _MM_HINT_T1);
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) {
      const __m512 scale = p.scales != nullptr ? _mm512_loadu_ps(p.scales + scales + v * 16)
                                               : load_halves(reinterpret_cast<const uint8_t*>(p.halves + scales + v * 16)).v;
      float* total = p.totals + (block * p.rows + row) * BLOCK + v * 16;
      _mm512_storeu_ps(total, _mm512_fmadd_ps(_mm512_cvtepi32_ps(found[v]), _mm512_mul_ps(scale, factor), _mm512_loadu_ps(total)));
    }
  }
}

template <int PLANES>
void multiply_sixes(const Product& p) {
  constexpr int64_t most = PIECE / unit_columns(3);
  const Tables<PLANES> tables(p.levels);
  alignas(64) uint8_t table[most * TURNS * PLANES * TABLE];
  for (int64_t group = 0; group < p.groups; ++group)
    for (int64_t left = p.group_units; left > 0; left -= most) {
      const int64_t unit = (group + 1) * p.group_units - left, units = left < most ? left : most;
      for (int64_t row = 0; row < p.rows; ++row) {
        const float* x = static_cast<const float*>(p.x) + row * p.x_stride + unit * unit_columns(3);
        multiply_piece<PLANES>(p, row, group, unit, units, table, tables.make(x, units * unit_columns(3), table), row == 0);
      }
    }
}

}  // namespace

// The row in float32: making tables of it is left to who uses them, so that they stay in the first-level cache.
void prepare_threes(const Preparation& p) {
  float* to = static_cast<float*>(p.out);
  for (int64_t begin = 0; begin < p.units * unit_columns(3); begin += unit_columns(3)) widen(p, begin, unit_columns(3), to + begin);
}

void by_sixes(const Product& p) { return p.planes == 3 ? multiply_sixes<3>(p) : multiply_sixes<4>(p); }

#else  // other sets have no permute of sixty-four bytes; linear.cpp does not ask them

void prepare_threes(const Preparation&) {}
void by_sixes(const Product&) {}

#endif

}  // namespace bl::BL_ISA
