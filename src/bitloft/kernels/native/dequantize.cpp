// dequantize: rows of a packed matrix to float32, bfloat16 or float16, all of them or some by number (an embedding).
#include "dequantize.hpp"

#include <algorithm>
#include <vector>

#include "columns.hpp"
#include "errors.hpp"
#include "halves.hpp"
#include "kernels.hpp"
#include "matrix.hpp"
#include "pool.hpp"

namespace bl {
namespace {

constexpr int64_t BATCH = 1 << 15;  // values that a thread takes at once
constexpr int64_t SPAN = 512;       // rows of a group that it takes where codes run down the columns

// The levels of the codes, sixteen with zeros behind them.
struct Levels {
  float v[16] = {};
  explicit Levels(const bl_matrix& m) {
    for (int i = 0; m.bits <= 4 && !(m.flags & BL_TRELLIS) && i < 1 << m.bits; ++i) v[i] = m.learned != nullptr ? half_number(m.learned[i]) : m.levels[i];
  }
};

template <class F>
void each_row(int64_t count, int64_t columns, int threads, F&& work) {
  const int64_t step = std::max<int64_t>(BATCH / columns, 1), batches = (count + step - 1) / step;
  Stage stage;
  run(static_cast<int>(std::min<int64_t>(threads, batches)), [&] {
    stage.share(batches, [&](int64_t batch) {
      for (int64_t i = batch * step; i < std::min(count, (batch + 1) * step); ++i) work(i);
    });
  });
}

int readable(const bl_matrix* matrix, bool columns) {
  if (int status = check(matrix)) return status;
  if (by_column(*matrix) != columns) return fail("dequantize was asked for the %s of codes that run along the others.", columns ? "columns" : "rows");
  if ((matrix->flags & BL_ARRANGED) != 0) return fail("dequantize reads codes in the order of the file only.");
  return kernels() == nullptr ? -1 : 0;
}

}  // namespace

int dequantize(const bl_matrix& m, const int64_t* rows, int64_t count, void* out, int64_t out_bytes, int32_t dtype,
               int threads) {
  if (dtype != BL_F32 && dtype != BL_BF16 && dtype != BL_F16) return fail("dequantize knows no dtype %d.", dtype);
  const int64_t size = dtype == BL_F32 ? 4 : 2;
  if (count < 0 || (rows == nullptr && count != 0 && count != m.rows) || out_bytes != count * m.columns * size)
    return fail("dequantize of %lld rows of %lld columns has %lld bytes of output.", (long long)count,
                (long long)m.columns, (long long)out_bytes);
  for (int64_t i = 0; rows != nullptr && i < count; ++i)
    if (rows[i] < 0 || rows[i] >= m.rows) {
      fail("row %lld of a packed matrix of %lld rows does not exist.", (long long)rows[i], (long long)m.rows);
      return 1;
    }
  if (out_bytes == 0) return 0;
  const Levels levels(m);
  each_row(count, m.columns, threads, [&](int64_t i) {
    char* to = static_cast<char*>(out) + i * m.columns * size;
    kernels()->dequantize_row({&m, levels.v, rows == nullptr ? i : rows[i], dtype, to});
  });
  return 0;
}

int residual(const bl_matrix& m, const float* x, int64_t values, float* out, double* square, int threads) {
  if (values != m.rows * m.columns)
    return fail("the residual of %lld x %lld has %lld values.", (long long)m.rows, (long long)m.columns, (long long)values);
  *square = 0;
  if (values == 0) return 0;
  const Levels levels(m);
  std::vector<double> squares(static_cast<size_t>(m.rows));
  each_row(m.rows, m.columns, threads, [&](int64_t i) {
    const int64_t at = i * m.columns;
    kernels()->residual_row({&m, levels.v, i, x + at, out == nullptr ? nullptr : out + at, &squares[static_cast<size_t>(i)]});
  });
  for (const double row : squares) *square += row;  // in one order, whoever did which row
  return 0;
}

// A group of some rows at a time.
int dequantize_columns(const bl_matrix& m, int64_t row, int64_t rows, void* out, int64_t out_bytes, int32_t dtype, int threads) {
  if (dtype != BL_F32 && dtype != BL_BF16 && dtype != BL_F16) return fail("dequantize knows no dtype %d.", dtype);
  const int64_t size = dtype == BL_F32 ? 4 : 2;
  if (row < 0 || row % BLOCK != 0 || rows < 0 || rows > m.rows - row || out_bytes != rows * m.columns * size)
    return fail("dequantize of %lld rows from %lld on, of %lld x %lld, has %lld bytes of output.", (long long)rows, (long long)row,
                (long long)m.rows, (long long)m.columns, (long long)out_bytes);
  if (out_bytes == 0) return 0;
  const int64_t spans = (rows + SPAN - 1) / SPAN, groups = (m.columns + m.group - 1) / m.group;
  Stage stage;
  run(out_bytes < 2 * BATCH ? 1 : threads, [&] {
    stage.share(groups * spans, [&](int64_t turn) {
      const int64_t first = turn / spans * m.group, begin = turn % spans * SPAN;
      char* const to = static_cast<char*>(out) + (first * rows + begin) * size;
      kernels()->column_tile({&m, first, std::min(m.group, m.columns - first), row + begin, std::min(SPAN, rows - begin), dtype, to, rows});
    });
  });
  return 0;
}

}  // namespace bl

extern "C" {

int bl_dequantize_columns(const bl_matrix* matrix, int64_t row, int64_t rows, void* out, int64_t out_bytes, int32_t dtype, int threads) {
  if (int status = bl::readable(matrix, true)) return status;
  return bl::dequantize_columns(*matrix, row, rows, out, out_bytes, dtype, threads);
}

int bl_dequantize(const bl_matrix* matrix, const int64_t* rows, int64_t count, void* out, int64_t out_bytes,
                  int32_t dtype, int threads) {
  if (int status = bl::readable(matrix, false)) return status;
  return bl::dequantize(*matrix, rows, count, out, out_bytes, dtype, threads);
}

int bl_residual(const bl_matrix* matrix, const float* x, int64_t values, float* out, double* square, int threads) {
  if (int status = bl::readable(matrix, false)) return status;
  return bl::residual(*matrix, x, values, out, square, threads);
}
}
