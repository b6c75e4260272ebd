// bl_encode_trellis: rows to trellis codes, each by whichever thread takes it.
#include <cstdlib>
#include <memory>
#include <new>

#include "encode_trellis.hpp"
#include "errors.hpp"
#include "kernels.hpp"
#include "pool.hpp"

namespace bl {
namespace {

// What one thread needs for a row, whatever it is.
class Memory {
 public:
  explicit Memory(int64_t width) {
    const int64_t most = width > 2 * TAIL ? width : 2 * TAIL;
    work_.reset(new (std::nothrow) float[static_cast<size_t>(3 * width + 16)]);
    decisions_.reset(new (std::nothrow) uint16_t[static_cast<size_t>(DECISIONS * most)]);
    spare_.reset(new (std::nothrow) uint8_t[static_cast<size_t>(width / 2)]);
  }
  bool made() const { return work_ != nullptr && decisions_ != nullptr && spare_ != nullptr; }
  float* work() const { return work_.get(); }
  uint16_t* decisions() const { return decisions_.get(); }
  uint8_t* spare() const { return spare_.get(); }

 private:
  std::unique_ptr<float[]> work_;
  std::unique_ptr<uint16_t[]> decisions_;
  std::unique_ptr<uint8_t[]> spare_;
};

}  // namespace
}  // namespace bl

extern "C" int bl_encode_trellis(const float* x, const float* weights, int64_t rows, int64_t columns, int32_t bits,
                                 uint8_t* codes, int64_t codes_bytes, float* scales, int threads) {
  using namespace bl;
  const Kernels* table = kernels();
  if (table == nullptr) return -1;
  const int64_t width = (columns + 7) / 8 * 8;
  if (rows < 0 || columns < 0 || columns > int64_t{1} << 31 || bits < 1 || bits > 4 ||
      rows > (int64_t{1} << 40) || codes_bytes != rows * (width / 8 * bits))
    return fail("%lld x %lld values in trellis codes of %d bits do not take %lld bytes.", (long long)rows,
                (long long)columns, bits, (long long)codes_bytes);
  if (rows * columns == 0) return 0;
  if (x == nullptr || codes == nullptr) return fail("trellis codes lack their values or their memory.");
  std::atomic<bool> finite{true}, short_of_memory{false};
  Stage stage;
  run(rows > 1 ? threads : 1, [&] {
    const Memory memory(width);
    if (!memory.made()) short_of_memory = true;
    stage.share(rows, [&](int64_t r) {
      if (!memory.made()) return;
      TrellisRow row{x + r * columns, weights, columns, width, bits, scales != nullptr, codes + r * (width / 8 * bits), memory.spare(),
                     0, true, memory.work(), memory.decisions()};
      table->encode_trellis(row);
      if (scales != nullptr) scales[r] = row.scale;
      if (!row.finite) finite = false;
    });
  });
  if (short_of_memory) return fail("no memory is left for a row of %lld values.", (long long)columns);
  return finite ? 0 : 1;
}
