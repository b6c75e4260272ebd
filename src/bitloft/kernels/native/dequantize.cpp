// dequantize: rows of a packed matrix to float32, bfloat16 or float16, all of them or some by number (an embedding).
#include "dequantize.hpp"

#include <algorithm>

#include "errors.hpp"
#include "halves.hpp"
#include "kernels.hpp"
#include "matrix.hpp"
#include "pool.hpp"

namespace bl {
namespace {

constexpr int64_t BATCH = 1 << 15;  // values that a thread takes at once

}  // namespace

int dequantize(const bl_matrix& m, const int64_t* rows, int64_t count, void* out, int64_t out_bytes, int32_t dtype, int threads) {
  if ((m.flags & BL_ARRANGED) != 0) return fail("dequantize reads codes in the order of the file only.");
  if (dtype != BL_F32 && dtype != BL_BF16 && dtype != BL_F16) return fail("dequantize knows no dtype %d.", dtype);
  const int64_t size = dtype == BL_F32 ? 4 : 2;
  if (count < 0 || (rows == nullptr && count != 0 && count != m.rows) || out_bytes != count * m.columns * size)
    return fail("dequantize of %lld rows of %lld columns has %lld bytes of output.", (long long)count, (long long)m.columns,
                (long long)out_bytes);
  for (int64_t i = 0; rows != nullptr && i < count; ++i)
    if (rows[i] < 0 || rows[i] >= m.rows) {
      fail("row %lld of a packed matrix of %lld rows does not exist.", (long long)rows[i], (long long)m.rows);
      return 1;
    }
  const Kernels* table = kernels();
  if (table == nullptr) return -1;
  if (out_bytes == 0) return 0;
  float levels[16] = {};
  if (m.bits <= 4)
    for (int i = 0; i < 1 << m.bits; ++i) levels[i] = m.learned != nullptr ? half_number(m.learned[i]) : m.levels[i];
  const int64_t step = std::max<int64_t>(BATCH / m.columns, 1), batches = (count + step - 1) / step;
  Stage stage;
  run(static_cast<int>(std::min<int64_t>(threads, batches)), [&] {
    stage.share(batches, [&](int64_t batch) {
      for (int64_t i = batch * step; i < std::min(count, (batch + 1) * step); ++i)
        table->dequantize_row({&m, levels, rows == nullptr ? i : rows[i], dtype, static_cast<char*>(out) + i * m.columns * size});
    });
  });
  return 0;
}

}  // namespace bl

extern "C" int bl_dequantize(const bl_matrix* matrix, const int64_t* rows, int64_t count, void* out, int64_t out_bytes,
                         int32_t dtype, int threads) {
  if (int status = bl::check(matrix)) return status;
  return bl::dequantize(*matrix, rows, count, out, out_bytes, dtype, threads);
}
