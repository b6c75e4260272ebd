// Some outputs of a product with a plain float32 matrix, for all rows: see dense.hpp.
//
// Every number is a sum of its own, sixteen strands over the columns and then across them, so a row gets the same bits
// whatever lies beside it. A few rows times a few outputs share what they load; the first rows that use some outputs fetch
// the outputs behind them.
//
// Compiled once per instruction set.
#include "dense.hpp"
#include "kernels.hpp"
#include "lanes.hpp"

namespace bl::BL_ISA {
namespace {

#if defined(BL_HAS_avx512)
constexpr int ROWS = 4, OUTPUTS = 6;  // sums that fit the registers beside what they are made of
#elif defined(BL_HAS_avx2)
constexpr int ROWS = 2, OUTPUTS = 2;
#else
constexpr int ROWS = 1, OUTPUTS = 1;
#endif

template <int R, int O, bool FETCH>
void multiply(const Dense& d, int64_t row, int64_t output) {
  const float *x = d.x + row * d.columns, *weight = d.weight + output * d.columns;
  Lanes sums[R][O];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 6
    for (int o = 0; o < O; ++o) sums[r][o] = none();
  for (int64_t i = 0; i < d.columns; i += DENSE_LANES) {
    Lanes values[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) values[r] = load(x + r * d.columns + i);
#pragma GCC unroll 6
    for (int o = 0; o < O; ++o) {
      const float* at = weight + o * d.columns + i;
      if constexpr (FETCH) __builtin_prefetch(at + O * d.columns, 0, 2);
      const Lanes number = load(at);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sums[r][o] = fma(values[r], number, sums[r][o]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 6
    for (int o = 0; o < O; ++o) d.out[(row + r) * d.outputs + output + o] = sum(sums[r][o]);
}

template <int O, bool FETCH>
void multiply_some(int64_t count, const Dense& d, int64_t row, int64_t output) {
  if constexpr (ROWS > 3)
    if (count == 4) return multiply<4, O, FETCH>(d, row, output);
  if constexpr (ROWS > 2)
    if (count == 3) return multiply<3, O, FETCH>(d, row, output);
  if constexpr (ROWS > 1)
    if (count == 2) return multiply<2, O, FETCH>(d, row, output);
  multiply<1, O, FETCH>(d, row, output);
}

template <int O>
void all_rows(const Dense& d, int64_t output) {
  for (int64_t row = 0; row < d.rows; row += ROWS) {
    const int64_t left = d.rows - row, count = left < ROWS ? left : ROWS;
    if (row == 0) multiply_some<O, true>(count, d, row, output);
    else multiply_some<O, false>(count, d, row, output);
  }
}

}  // namespace

void dense_rows(const Dense& d) {
  int64_t output = d.first;
  const int64_t end = d.first + d.count;
  for (; output + OUTPUTS <= end; output += OUTPUTS) all_rows<OUTPUTS>(d, output);
  for (; output < end; ++output) all_rows<1>(d, output);
}

}  // namespace bl::BL_ISA
