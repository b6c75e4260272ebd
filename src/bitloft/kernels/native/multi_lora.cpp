// bl_multi_lora: checks the call, cuts its segments into tiles of a few rows, and shares them among threads. What all rows
// take (the start of a base) is computed first, in tiles that heed no segments: one look-up then serves four rows, where each
// row of a batch of many adapters is a segment of its own.
//
// A tile is the unit of work and nothing is shared between two of them, so the result depends neither on the number of
// threads nor on who else is in the batch.
#include <cstdlib>
#include <memory>
#include <new>

#include "errors.hpp"
#include "kernels.hpp"
#include "lora.hpp"
#include "matrix.hpp"
#include "pool.hpp"

namespace bl {
namespace {

constexpr int64_t WORTH_A_THREAD = 1 << 17;  // products of a call below which waking a second thread costs more

int64_t size_of(int32_t dtype) { return dtype == BL_F32 ? 4 : 2; }

bool known(int32_t dtype) { return dtype == BL_F32 || dtype == BL_BF16 || dtype == BL_F16; }

// 0, or -1 after fail(): `factor` is what a block needs for `columns` values.
int check_factor(const bl_factor& factor, int64_t rows, int64_t columns) {
  if (factor.rows != rows || factor.columns != columns || rows < 0)
    return fail("a factor has %lld x %lld values where %lld x %lld are needed.", (long long)factor.rows,
                (long long)factor.columns, (long long)rows, (long long)columns);
  if (factor.packed == nullptr) {
    if (!known(factor.dtype) || factor.plain_bytes != rows * columns * size_of(factor.dtype) ||
        (factor.plain_bytes > 0 && factor.plain == nullptr))
      return fail("a plain factor of %lld x %lld values has %lld bytes.", (long long)rows, (long long)columns,
                  (long long)factor.plain_bytes);
    return 0;
  }
  if (check(factor.packed)) return -1;
  if (factor.packed->rows != rows || factor.packed->columns != columns)
    return fail("a packed factor has %lld x %lld values where %lld x %lld are needed.", (long long)factor.packed->rows,
                (long long)factor.packed->columns, (long long)rows, (long long)columns);
  if (factor.packed->flags & BL_COLUMNS) return fail("a factor's codes run down its columns; only rows can be read.");
  if (factor.packed->flags & BL_ARRANGED) return fail("a factor's codes are arranged; only row order can be read.");
  return 0;
}

int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

struct Cost {
  int64_t components = 0;  // the most in one block
  int64_t products = 0;    // per row
};

int check_blocks(const bl_blocks& blocks, int64_t columns, int64_t out_columns, Cost& cost) {
  if (blocks.count < 0 || (blocks.count > 0 && blocks.block == nullptr))
    return fail("the blocks of an adapter are missing.");
  for (int64_t b = 0; b < blocks.count; ++b) {
    const bl_block& block = blocks.block[b];
    if (check_factor(block.a, block.a.rows, columns) || check_factor(block.bt, block.a.rows, out_columns)) return -1;
    cost.components = larger(cost.components, block.a.rows);
    cost.products += block.a.rows * (columns + out_columns);
  }
  return 0;
}

int check_segments(const bl_segments* segments, int64_t rows) {
  if (segments == nullptr || segments->count < 0 || segments->repeat < 1 || segments->begin == nullptr)
    return fail("the segments of a call are missing.");
  const bl_segments& s = *segments;
  if (rows % s.repeat != 0)
    return fail("%lld rows are no multiple of %lld tokens.", (long long)rows, (long long)s.repeat);
  if (s.begin[0] != 0) return fail("the first segment begins at %lld.", (long long)s.begin[0]);
  for (int64_t i = 0; i < s.count; ++i)
    if (s.begin[i + 1] < s.begin[i]) return fail("segment %lld ends before it begins.", (long long)i);
  const int64_t listed = s.begin[s.count], batch = rows / s.repeat;
  if (listed > batch || (listed > 0 && s.rows == nullptr))
    return fail("segments list %lld rows of a batch of %lld.", (long long)listed, (long long)batch);
  const std::unique_ptr<char[]> seen(new (std::nothrow) char[static_cast<size_t>(batch) + 1]());
  if (!seen) return fail("no memory is left for a batch of %lld rows.", (long long)batch);
  for (int64_t i = 0; i < listed; ++i) {
    if (s.rows[i] < 0 || s.rows[i] >= batch || seen[static_cast<size_t>(s.rows[i])]++)
      return fail("a segment lists row %d of a batch of %lld, or lists it twice.", s.rows[i], (long long)batch);
  }
  return 0;
}

// The tiles of all segments, numbered through.
class Tiles {
 public:
  explicit Tiles(const bl_segments& segments)
      : segments_(segments), first_(new (std::nothrow) int64_t[static_cast<size_t>(segments.count) + 1]) {
    if (!first_) return;
    first_[0] = 0;
    for (int64_t s = 0; s < segments.count; ++s) first_[s + 1] = first_[s] + (rows_of(s) + LORA_ROWS - 1) / LORA_ROWS;
  }

  bool made() const { return first_ != nullptr; }
  int64_t count() const { return first_[segments_.count]; }
  int64_t rows_of(int64_t s) const { return (segments_.begin[s + 1] - segments_.begin[s]) * segments_.repeat; }

  int64_t segment_of(int64_t tile) const {
    int64_t low = 0, high = segments_.count;  // first_[low] <= tile < first_[high]
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (first_[middle] <= tile ? low : high) = middle;
    }
    return low;
  }

  // Numbers of the tile's rows in x; returns how many.
  int rows(int64_t tile, int64_t s, int64_t* numbers) const {
    const int64_t begin = (tile - first_[s]) * LORA_ROWS;
    int count = 0;
    for (int64_t i = begin; i < rows_of(s) && count < LORA_ROWS; ++i) {
      const int64_t batch_row = segments_.rows[segments_.begin[s] + i / segments_.repeat];
      numbers[count++] = batch_row * segments_.repeat + i % segments_.repeat;
    }
    return count;
  }

 private:
  const bl_segments& segments_;
  std::unique_ptr<int64_t[]> first_;
};

// Buffers of one thread, kept from call to call.
float* buffer(size_t floats) {
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<float, Free> held;
  thread_local size_t size = 0;
  if (size < floats) {
    const size_t bytes = (floats * sizeof(float) + 63) / 64 * 64;
    held.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
    size = held ? floats : 0;
  }
  return held.get();
}

// A call after its checks: what a thread needs to compute any tile of any matrix.
struct Call {
  const void* x;
  int32_t dtype;
  int64_t columns, stride;
  const bl_segments* segments;
  const bl_lora* matrices;
  int64_t count;
  Cost most;       // components of any block; products of the whole call
  int64_t widest;  // output

  int64_t wide_x() const { return padded(columns) * LORA_ROWS; }
  int64_t wide_out() const { return padded(widest) * LORA_ROWS; }
  size_t floats() const {
    return static_cast<size_t>(wide_x() + wide_out() + most.components * (2 * LORA_ROWS + 1));
  }

  // Whether what all rows take is added apart: sums in float32 can wait in the output.
  static bool apart(const bl_lora& matrix) { return matrix.shared.count > 0 && matrix.out_dtype == BL_F32; }

  int64_t listed() const { return segments->begin[segments->count] * segments->repeat; }

  void shared_tile(const Kernels& table, int64_t number, const bl_lora& matrix, float* memory) const {
    if (!apart(matrix)) return;
    const int64_t first = number * LORA_ROWS, left = listed() - first;
    int64_t rows[LORA_ROWS];
    const int count = static_cast<int>(left < LORA_ROWS ? left : LORA_ROWS);
    for (int i = 0; i < count; ++i)
      rows[i] = segments->rows[(first + i) / segments->repeat] * segments->repeat + (first + i) % segments->repeat;
    LoraTile piece = described(matrix, rows, count, memory);
    piece.shared = &matrix.shared, piece.accumulate = matrix.accumulate != 0;
    table.lora_tile(piece);
  }

  void tile(const Kernels& table, const Tiles& tiles, int64_t number, const bl_lora& matrix, float* memory) const {
    const int64_t s = tiles.segment_of(number);
    if (apart(matrix) && matrix.own[s].count == 0) return;
    int64_t rows[LORA_ROWS];
    const int count = tiles.rows(number, s, rows);
    LoraTile piece = described(matrix, rows, count, memory);
    piece.shared = apart(matrix) ? nullptr : &matrix.shared, piece.own = &matrix.own[s];
    piece.accumulate = matrix.accumulate != 0 || apart(matrix);
    table.lora_tile(piece);
  }

 private:
  LoraTile described(const bl_lora& matrix, const int64_t* rows, int count, float* memory) const {
    LoraTile piece{};
    piece.rows = count;
    for (int r = 0; r < piece.rows; ++r) {
      piece.x[r] = static_cast<const char*>(x) + rows[r] * stride * size_of(dtype);
      piece.out[r] = static_cast<char*>(matrix.out) + rows[r] * matrix.out_stride * size_of(matrix.out_dtype);
    }
    piece.x_dtype = dtype, piece.out_dtype = matrix.out_dtype;
    piece.columns = columns, piece.out_columns = matrix.columns;
    piece.wide_x = memory, piece.wide_out = memory + wide_x(), piece.products = memory + wide_x() + wide_out();
    return piece;
  }
};

// 0, or -1 after fail(); learns what the matrix needs.
int check_matrix(Call& call, const bl_lora& matrix, const Tiles& tiles, int64_t rows) {
  if (matrix.columns < 0 || matrix.out_stride < matrix.columns || !known(matrix.out_dtype) ||
      (rows * matrix.columns > 0 && matrix.out == nullptr) || (call.segments->count > 0 && matrix.own == nullptr))
    return fail("an output of multi_lora has rows of %lld values, %lld apart.", (long long)matrix.columns,
                (long long)matrix.out_stride);
  Cost shared;
  if (check_blocks(matrix.shared, call.columns, matrix.columns, shared)) return -1;
  call.most.components = larger(call.most.components, shared.components);
  for (int64_t s = 0; s < call.segments->count; ++s) {
    Cost own;
    if (check_blocks(matrix.own[s], call.columns, matrix.columns, own)) return -1;
    call.most.components = larger(call.most.components, own.components);
    call.most.products += tiles.rows_of(s) * (shared.products + own.products);
  }
  call.widest = larger(call.widest, matrix.columns);
  return 0;
}

}  // namespace
}  // namespace bl

extern "C" int bl_multi_lora(const void* x, int32_t dtype, int64_t rows, int64_t columns, int64_t stride,
                             const bl_segments* segments, const bl_lora* matrices, int64_t count, int threads) {
  using namespace bl;
  const Kernels* table = kernels();
  if (table == nullptr) return -1;
  if (rows < 0 || columns < 0 || stride < columns || !known(dtype) || (rows * columns > 0 && x == nullptr))
    return fail("the input of multi_lora has %lld rows of %lld values, %lld apart.", (long long)rows,
                (long long)columns, (long long)stride);
  if (check_segments(segments, rows)) return -1;
  if (count < 0 || (count > 0 && matrices == nullptr)) return fail("the matrices of multi_lora are missing.");
  const Tiles tiles(*segments);
  if (!tiles.made()) return fail("no memory is left for %lld segments.", (long long)segments->count);
  Call call{x, dtype, columns, stride, segments, matrices, count, {}, 0};
  for (int64_t m = 0; m < count; ++m)
    if (check_matrix(call, matrices[m], tiles, rows)) return -1;
  bool apart = false;
  for (int64_t m = 0; m < count; ++m) apart = apart || Call::apart(matrices[m]);
  const int64_t pieces = tiles.count() * count, first = apart ? (call.listed() + LORA_ROWS - 1) / LORA_ROWS * count : 0;
  std::atomic<bool> short_of_memory{false};
  Stage shared, stage;
  run(call.most.products < WORTH_A_THREAD || pieces < 2 ? 1 : threads, [&] {
    float* const memory = buffer(call.floats());
    if (memory == nullptr) short_of_memory = true;
    shared.share(first, [&](int64_t i) {
      if (memory != nullptr) call.shared_tile(*table, i / count, matrices[i % count], memory);
    });
    stage.share(pieces, [&](int64_t i) {
      if (memory != nullptr) call.tile(*table, tiles, i / count, matrices[i % count], memory);
    });
  });
  return short_of_memory ? fail("no memory is left for a row of %lld values.", (long long)columns) : 0;
}
