// Products with codes that run down columns: the input is prepared, and blocks of sixty-four output rows are shared among threads.
//
// A block is computed by one thread from beginning to end, each row of the input by itself: the result depends neither on how many
// threads there are nor on how many rows.
#include "linear_columns.hpp"

#include <cmath>
#include <cstdlib>
#include <cstring>

#include "block.hpp"
#include "columns.hpp"
#include "errors.hpp"
#include "kernels.hpp"
#include "memory.hpp"
#include "pages.hpp"
#include "pool.hpp"

namespace bl {
namespace {

constexpr int64_t WORTH_A_THREAD = 1 << 18;  // products below which waking a second thread costs more
constexpr int64_t AT_ONCE = 8;               // matrices
constexpr int64_t FEW = 16;                  // rows of the input up to which reading codes costs more than the sums of more blocks
constexpr int64_t NEAR = 8;                  // blocks whose bytes of a column lie in one cache line, in the order of the file

thread_local Memory inputs, room;

int64_t size_of(int32_t dtype) { return dtype == BL_F32 ? 4 : 2; }

// One matrix of the call, and where its prepared input lies: that of the first part with the same groups.
struct Part {
  const bl_product* product;
  const bl_matrix* matrix;
  Pieces pieces;
  int64_t blocks, together, turns;  // blocks of a turn
  int64_t same, x, stride;
};

class Call {
 public:
  Call(const Kernels& table, const bl_input& x, int64_t row, int64_t rows, int digits, const bl_product* products, int64_t count,
       int threads)
      : table_(table), x_(x), row_(row), rows_(rows), digits_(digits), count_(count), threads_(threads < 1 ? 1 : threads) {
    for (int64_t i = 0; i < count; ++i) {
      const bl_matrix& m = *products[i].weight;
      Part& part = parts_[i];
      part = {&products[i], &m, {m.columns, m.group}, (m.rows + BLOCK - 1) / BLOCK, 1, 0, 0, 0, 0};
      const int64_t fair = (part.blocks + threads_ - 1) / threads_;
      if (!(m.flags & BL_ARRANGED) && fair > 1 && rows <= FEW) part.together = fair < NEAR ? fair : NEAR;
      part.turns = (part.blocks + part.together - 1) / part.together;
      while (parts_[part.same].pieces.group != m.group) ++part.same;
      turns_ += part.turns;
      work_ += rows * m.rows * m.columns;
      if (part.same != i) {
        part.x = parts_[part.same].x, part.stride = parts_[part.same].stride;
        continue;
      }
      part.stride = (ColumnInput::bytes(part.pieces, digits) + 63) / 64 * 64 + (rows > 1 ? 64 : 0);  // rows a power of two apart would share few cache lines
      part.x = bytes_, bytes_ += rows * part.stride;
    }
  }

  void go() {
    if (turns_ == 0) return;
    const int threads = work_ < 2 * WORTH_A_THREAD ? 1 : threads_;
    char* const shared = rows_ == 1 ? nullptr : static_cast<char*>(inputs.get(bytes_));
    Stage prepared;
    Ranges multiplied(turns_, threads);
    run(threads, [&] {
      // one row is prepared by every thread for itself: that is sooner done than fetched from another's cache
      const int64_t stretch = multiplied.arrive();
      char* const mine = shared != nullptr ? shared : static_cast<char*>(inputs.get(bytes_));
      if (shared == nullptr) prepare(0, mine);
      else prepared.share(rows_, [&](int64_t row) { prepare(row, shared); });
      multiplied.share(stretch, [&](int64_t turn) { take_turn(turn, mine); });
    });
  }

 private:
  void prepare(int64_t row, char* input) const {
    for (int64_t i = 0; i < count_; ++i) {
      const Part& part = parts_[i];
      if (part.same != i) continue;
      table_.prepare_column_input({
          .x = static_cast<const char*>(x_.values) + (row_ + row) * x_.stride * size_of(x_.dtype),
          .dtype = x_.dtype,
          .pieces = part.pieces,
          .digits = digits_,
          .out = input + part.x + row * part.stride,
      });
    }
  }

  void take_turn(int64_t turn, const char* input) const {
    int64_t i = 0;
    while (turn >= parts_[i].turns) turn -= parts_[i++].turns;
    const Part& part = parts_[i];
    const bl_matrix& m = *part.matrix;
    const int64_t first = turn * part.together, blocks = part.blocks - first < part.together ? part.blocks - first : part.together;
    const int64_t row = first * BLOCK;
    const bool in_order = (m.flags & BL_ARRANGED) && m.rows - row >= BLOCK, halves = in_order && std::abs(*m.exponent) < 100;
    const int64_t scales = halves ? 0 : m.groups * BLOCK, sums = rows_ * BLOCK;
    float* const turned = static_cast<float*>(room.get(blocks * (scales + 2 * sums) * 4));
    float* const totals = turned + blocks * scales;
    for (int64_t b = 0; b < blocks; ++b) {
      const Block block = block_of(m, row + b * BLOCK);
      if (!halves) table_.turn_scales(block, in_order, turned + b * scales, nullptr);
      begin(*part.product, block, totals + b * sums);
    }
    table_.column_product({
        .matrix = &m,
        .row = row,
        .blocks = blocks,
        .digits = digits_,
        .inputs = rows_,
        .x = input + part.x,
        .stride = part.stride,
        .scales = halves ? nullptr : turned,
        .halves = static_cast<const uint16_t*>(m.scales) + row * m.groups,
        .unit = halves ? std::ldexp(1.0f, *m.exponent) : 1.0f,
        .in_pairs = in_order,
        .totals = totals,
        .room = totals + blocks * sums,
    });
    const bl_product& p = *part.product;
    for (int64_t b = 0; b < blocks; ++b) {
      const Block block = block_of(m, row + b * BLOCK);
      table_.finish({
          .totals = totals + b * sums,
          .rows = rows_,
          .columns = block.rows,
          .out = static_cast<char*>(p.out) + (row_ * p.stride + block.row) * size_of(p.dtype),
          .stride = p.stride,
          .dtype = p.dtype,
      });
    }
  }

  static Block block_of(const bl_matrix& m, int64_t row) { return {&m, row, m.rows - row < BLOCK ? m.rows - row : BLOCK}; }

  // What totals start from: bias and addend are added before the sum is rounded to the output's dtype.
  void begin(const bl_product& p, const Block& block, float* totals) const {
    for (int64_t r = 0; r < rows_; ++r, totals += BLOCK) {
      std::memset(totals, 0, BLOCK * sizeof *totals);
      if (p.addend != nullptr)
        std::memcpy(totals, p.addend + (row_ + r) * p.weight->rows + block.row, static_cast<size_t>(block.rows) * 4);
      for (int64_t i = 0; p.bias != nullptr && i < block.rows; ++i) totals[i] += p.bias[block.row + i];
    }
  }

  const Kernels& table_;
  const bl_input& x_;
  const int64_t row_, rows_;
  const int digits_;
  const int64_t count_;
  const int threads_;
  Part parts_[AT_ONCE];
  int64_t turns_ = 0, work_ = 0, bytes_ = 0;
};

void arrange_scales(uint16_t* scales, int64_t groups, bool back, uint16_t* copy) {
  std::memcpy(copy, scales, static_cast<size_t>(BLOCK * groups * 2));
  for (int64_t row = 0; row < BLOCK; ++row)
    for (int64_t g = 0; g < groups; ++g) {
      if (back) scales[row * groups + g] = copy[g * BLOCK + paired(row)];
      else scales[g * BLOCK + paired(row)] = copy[row * groups + g];
    }
}

// What is behind the last whole block of every column, to the end of the codes or back.
void move_tails(const bl_matrix& m, const uint8_t* copy, uint8_t* codes, bool back) {
  const int64_t bytes = plane_bytes(m), whole = m.rows / BLOCK * 8, rest = bytes - whole, first = m.columns * whole * m.bits;
  for (int64_t plane = 0; rest > 0 && plane < m.columns * m.bits; ++plane) {
    const int64_t stored = plane * bytes + whole, arranged = first + plane * rest;
    std::memcpy(codes + (back ? stored : arranged), copy + (back ? arranged : stored), static_cast<size_t>(rest));
  }
}

}  // namespace

void multiply_columns(const Kernels& table, const bl_input& x, int64_t row, int64_t rows, bool tame, const bl_product* products, int64_t count,
                      int32_t flags, int threads) {
  const int digits = flags & BL_INT8 ? 1 : !tame ? 0 : x.dtype == BL_BF16 ? 2 : 3;
  for (int64_t first = 0; first < count; first += AT_ONCE)
    Call(table, x, row, rows, digits, products + first, count - first < AT_ONCE ? count - first : AT_ONCE, threads).go();
}

bool can_arrange_columns(const Kernels& table, const bl_matrix& m) { return table.bytes && m.columns % CELL == 0; }

int arrange_columns(const Kernels& table, const bl_matrix& m, uint8_t* codes, uint16_t* scales, bool back, int threads) {
  const int64_t bytes = m.codes_bytes, scale_values = scales != nullptr ? BLOCK * m.groups : 0;
  const std::unique_ptr<uint8_t[]> copy(new (std::nothrow) uint8_t[static_cast<size_t>(bytes)]);
  const std::unique_ptr<uint16_t[]> turned(new (std::nothrow) uint16_t[static_cast<size_t>(scale_values)]);
  if (copy == nullptr || turned == nullptr) return fail("no memory is left for a copy of %lld bytes of codes.", (long long)bytes);
  std::memcpy(copy.get(), codes, static_cast<size_t>(bytes));
  Stage stage;
  run(threads, [&] { stage.share(m.rows / BLOCK, [&](int64_t block) { table.move_columns({&m, block, copy.get(), codes, back}); }); });
  move_tails(m, copy.get(), codes, back);
  for (int64_t row = 0; scales != nullptr && row + BLOCK <= m.rows; row += BLOCK) arrange_scales(scales + row * m.groups, m.groups, back, turned.get());
  if (!back) ask_for_huge_pages(codes, bytes);
  return 0;
}

}  // namespace bl
