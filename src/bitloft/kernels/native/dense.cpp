// bl_dense_linear: checks the call and shares the outputs out among threads.
#include "dense.hpp"

#include "errors.hpp"
#include "kernels.hpp"
#include "pool.hpp"

namespace bl {
namespace {

constexpr int64_t WORTH_THREADS = 1 << 18;  // multiplications below which waking a second thread costs more
constexpr int64_t AT_ONCE = 1 << 15;        // values of the matrix that a thread takes at a time

}  // namespace
}  // namespace bl

extern "C" int bl_dense_linear(const float* x, int64_t rows, int64_t columns, const float* weight, int64_t outputs,
                               float* out, int threads) {
  using namespace bl;
  const Kernels* table = kernels();
  if (table == nullptr) return -1;
  if (rows < 0 || columns <= 0 || outputs < 0 || columns % DENSE_LANES != 0 ||
      (rows * outputs > 0 && (x == nullptr || weight == nullptr || out == nullptr)))
    return fail("a plain product of %lld rows of %lld columns with %lld outputs cannot be run; %lld must divide the columns.",
                (long long)rows, (long long)columns, (long long)outputs, (long long)DENSE_LANES);
  // a multiple of the outputs that kernels take at once, so that few are left over
  const int64_t some = 12 * (AT_ONCE / (12 * columns) > 0 ? AT_ONCE / (12 * columns) : 1), parts = (outputs + some - 1) / some;
  Stage stage;
  run(rows * columns * outputs < WORTH_THREADS || parts < 2 ? 1 : threads, [&] {
    stage.share(parts, [&](int64_t part) {
      const int64_t first = part * some, left = outputs - first;
      table->dense_rows({x, weight, out, rows, columns, outputs, first, left < some ? left : some});
    });
  });
  return 0;
}
