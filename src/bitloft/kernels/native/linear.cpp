// bl_packed_linear: checks the call, prepares the input, and shares blocks of sixty-four output rows among threads.
//
// A block is computed by one thread from beginning to end, so the result does not depend on how many there are. Memory
// for a call is kept per thread and only grows: an allocation of this size costs as much as a small product.
#include "linear.hpp"

#include <cmath>
#include <cstdlib>
#include <cstring>

#include "block.hpp"
#include "columns.hpp"
#include "errors.hpp"
#include "kernels.hpp"
#include "linear_columns.hpp"
#include "matrix.hpp"
#include "memory.hpp"
#include "pages.hpp"
#include "pool.hpp"
#include "product.hpp"
#include "three.hpp"

namespace bl {
namespace {

constexpr int64_t ROWS_AT_ONCE = 252;      // rows of the input whose totals stay in the second-level cache: 42 times 6
constexpr int64_t WORTH_A_THREAD = 1 << 18;  // products below which waking a second thread costs more
constexpr int64_t FEW = 4;  // rows of the input that are prepared before; with more, tables of 1 and 2 bits are made where they are used
constexpr int64_t UNREADY = 16;  // rows of bfloat16 up to which tables pay although few blocks share them
constexpr int64_t AT_FIRST = 8192;  // bytes of codes that are fetched while one row is prepared

thread_local Memory inputs, room;

// One matrix of the call, and the input as its kernel wants it.
struct Part {
  const bl_product* product;
  const bl_matrix* matrix;
  Input input;
  int64_t units, groups, group_units, blocks;
  bool arranged, offsets, neighbours;
  float levels[16];
  int same;         // the first part whose prepared input serves this one too
  int64_t x_bytes;  // of one prepared row
  int64_t x, sums, steps;  // where in the prepared input its rows, their sums and their steps begin
  int planes;              // of Input::BYTES
  int64_t pieces;          // of a row: what has a step of its own
  int64_t together;  // blocks at once: two hide the latency of sums at 4 bits, neighbours of 3 bits share tables
  int64_t rows;      // of the input at once, and how many times
  int64_t row_runs;
  int64_t turns;     // runs of blocks, each as many times
};

int64_t size_of(int32_t dtype) { return dtype == BL_F32 ? 4 : 2; }

int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Whether codes and scales are read as they lie; else each turn makes them so.
bool ready(const bl_matrix& m) { return (m.flags & BL_ARRANGED) && scales_arranged(m) && m.zeros == nullptr && m.shifts == nullptr; }

// Bytes of a prepared row of a part.
int64_t prepared_bytes(const Part& part) {
  const int64_t bits = part.matrix->bits, columns = part.units * unit_columns(part.matrix->bits);
  switch (part.input) {
    case Input::QUADS: return columns + part.pieces * 4 + 4;
    case Input::BYTES: return bits == 3 ? columns * 4 : part.units * part.planes * 128;
    case Input::SUMS: return part.units * 512;
    case Input::TABLES: return 0;
    case Input::PAIRS: return columns * 2;
    default: return columns * 4;
  }
}

// How many rows of the input a turn takes.
int64_t rows_of(const Part& part, int64_t rows) {
  return part.input == Input::TABLES && ready(*part.matrix) && rows > TABLED ? TABLED : rows;
}

// How many blocks a turn takes: of neighbours as many as leave every thread a turn, less where each needs much memory.
int64_t run_of(const Part& part, int64_t rows, int threads, const Kernels& table) {
  if (part.neighbours && part.input != Input::QUADS) {
    const int64_t most = rows <= FEW && ready(*part.matrix) ? BESIDE : rows <= 64 ? 4 : 1, fair = part.blocks > 0 && threads > 1 ? (part.blocks + threads - 1) / threads : most;
    return fair < most ? fair : most;
  }
  if (part.input == Input::TABLES) {
    const int64_t most = ready(*part.matrix) ? BESIDE : rows <= 64 ? 8 : 4, share = part.row_runs % threads == 0 ? 1 : threads;
    const int64_t runs = share * ((part.blocks + most * share - 1) / (most * share));  // as long as each other, as many as threads
    return runs > 0 ? (part.blocks + runs - 1) / runs : 1;
  }
  return rows == 1 && table.two_blocks && part.matrix->bits == 4 && part.input != Input::BYTES && part.input != Input::QUADS ? 2 : 1;
}

// Whether rows that fit planes of bytes are multiplied by them: where that is sooner done than by pairs in bfloat16. With 1 and 2
// bits a row then gets the same bits however many there are.
bool by_bytes(const bl_matrix& m, int64_t rows, int32_t dtype, int32_t flags) {
  if (flags & BL_INT8) return false;
  if (m.bits < 3) return dtype != BL_BF16 || rows <= UNREADY || ready(m) || (flags & BL_INVARIANT);
  if (flags & BL_INVARIANT) return false;
  if (m.bits == 3) return rows == 1 || (rows <= FEW && dtype != BL_BF16);
  return rows == 1 && dtype != BL_BF16;
}

// `tame`: the rows of the call fit planes of bytes.
Part part_of(const bl_product& product, int32_t dtype, int64_t rows, int32_t flags, const Kernels& table, bool tame) {
  const bl_matrix& m = *product.weight;
  Part part{};
  part.product = &product, part.matrix = &m;
  part.units = up(m.width, unit_columns(m.bits)) / unit_columns(m.bits);
  part.groups = m.groups > 1 ? m.groups : 1;
  part.group_units = m.groups > 1 ? m.group / unit_columns(m.bits) : part.units;
  part.blocks = up(m.rows, BLOCK) / BLOCK;
  part.arranged = (m.flags & BL_ARRANGED) != 0;
  part.offsets = m.groups > 0 && (m.zeros != nullptr || m.shifts != nullptr);
  part.pieces = part.groups * up(part.group_units * unit_columns(m.bits), PIECE) / PIECE;
  part.neighbours = part.arranged && table.bytes && m.bits == 3;
  part.planes = (dtype == BL_BF16 ? 2 : 3) + (m.bits == 3 ? 1 : 0);
  if (flags & BL_INT8) part.input = Input::QUADS;
  else if (tame && by_bytes(m, rows, dtype, flags)) part.input = rows > FEW ? Input::TABLES : Input::BYTES;
  else if (dtype == BL_BF16 && table.pairs) part.input = Input::PAIRS;
  else if (rows == 1 && m.bits <= 2 && !(flags & BL_INVARIANT)) part.input = Input::SUMS;
  else part.input = Input::SINGLE;
  part.x_bytes = up(prepared_bytes(part), 64) + (rows > 1 ? 64 : 0);  // rows a power of two apart would share few cache lines
  table.read_levels(m, part.levels);
  return part;
}

bool same_input(const Part& a, const Part& b) {
  return a.input == b.input && a.pieces == b.pieces && a.matrix->bits == b.matrix->bits && a.units == b.units && a.groups == b.groups &&
         a.group_units == b.group_units && a.offsets == b.offsets &&
         ((a.input != Input::SUMS && a.input != Input::BYTES && a.input != Input::QUADS) || std::memcmp(a.levels, b.levels, sizeof(float) << a.matrix->bits) == 0);
}

// A call on up to ROWS_AT_ONCE rows of the input.
class Call {
 public:
  Call(const Kernels& table, const bl_input& x, int64_t row, int64_t rows, Part* parts, int64_t count, int threads)
      : table_(table), x_(x), row_(row), rows_(rows), parts_(parts), count_(count), threads_(threads < 1 ? 1 : threads) {
    for (int64_t i = 0; i < count; ++i) {
      Part& part = parts[i];
      part.same = 0;
      while (!same_input(parts[part.same], part)) ++part.same;
      part.rows = rows_of(part, rows);
      part.row_runs = part.rows > 0 ? (rows + part.rows - 1) / part.rows : 0;
      part.together = run_of(part, rows, threads_, table);
      part.turns = runs_of(part) * part.row_runs;
      turns_ += part.turns;
      if (part.same != i) {
        part.x = parts[part.same].x, part.sums = parts[part.same].sums, part.steps = parts[part.same].steps;
        continue;
      }
      part.x = bytes_, bytes_ += rows * part.x_bytes;
      part.sums = bytes_, bytes_ += part.offsets || part.input != Input::TABLES ? up(rows * part.groups * 4, 64) : 0;
      part.steps = bytes_, bytes_ += part.input == Input::BYTES ? up(rows * part.pieces * 4, 64) : 0;
    }
  }

  void go() {
    if (turns_ == 0) return;
    int64_t work = 0;
    for (int64_t i = 0; i < count_; ++i) work += rows_ * parts_[i].matrix->rows * parts_[i].matrix->columns;
    const int threads = work < 2 * WORTH_A_THREAD ? 1 : threads_;
    char* const shared = rows_ == 1 ? nullptr : static_cast<char*>(inputs.get(bytes_));
    Stage prepared;
    Ranges multiplied(turns_, threads);
    run(threads, [&] {
      // One row is prepared by every thread for itself: that is sooner done than fetched from another's cache. Meanwhile the
      // first codes come in.
      const int64_t stretch = multiplied.arrive();
      if (shared == nullptr) fetch(multiplied.first(stretch));
      char* const mine = shared != nullptr ? shared : static_cast<char*>(inputs.get(bytes_));
      if (shared == nullptr) prepare(0, mine);
      else if (bytes_ > 0) prepared.share(rows_, [&](int64_t row) { prepare(row, shared); });
      multiplied.share(stretch, [&](int64_t turn) { take_turn(turn, mine); });
    });
  }

 private:
  // Runs that neighbours are cut into; the last ones of a matrix may be empty.
  static int64_t runs(const Part& part) { return (BESIDE + part.together - 1) / part.together; }

  static int64_t runs_of(const Part& part) {
    if (!part.neighbours) return (part.blocks + part.together - 1) / part.together;
    return (part.blocks + BESIDE - 1) / BESIDE * runs(part);
  }

  // The blocks of a turn: the first and how many. Those that follow each other take other rows of the input.
  static int64_t first_of(const Part& part, int64_t turn) {
    turn /= part.row_runs;
    return part.neighbours ? turn / runs(part) * BESIDE + turn % runs(part) * part.together : turn * part.together;
  }

  static int64_t count_of(const Part& part, int64_t turn) {
    const int64_t first = first_of(part, turn), end = part.neighbours ? (turn / part.row_runs / runs(part) + 1) * BESIDE : part.blocks;
    const int64_t left = (end < part.blocks ? end : part.blocks) - first;
    return left < part.together ? left : part.together;
  }

  void fetch(int64_t turn) const {
    int64_t i = 0;
    while (i < count_ && turn >= parts_[i].turns) turn -= parts_[i++].turns;
    if (i == count_) return;
    const bl_matrix& m = *parts_[i].matrix;
    const int64_t row = first_of(parts_[i], turn) * BLOCK;
    const Neighbours n = parts_[i].neighbours ? neighbours(m, row) : Neighbours{row, 1, 0};
    const int64_t units = parts_[i].group_units < PIECE / 32 ? parts_[i].group_units : PIECE / 32;  // of neighbours: of 3 bits
    const char* codes = reinterpret_cast<const char*>(m.codes) + n.first * (m.width * m.bits / 8) + piece_at(0, units, n.beside, n.place) * 4;
    for (int64_t byte = 0; byte < AT_FIRST; byte += 64) __builtin_prefetch(codes + byte, 0, 2);
  }

  void prepare(int64_t row, char* input) const {
    for (int64_t i = 0; i < count_; ++i)
      if (parts_[i].same == i && (parts_[i].input != Input::TABLES || parts_[i].offsets)) table_.prepare(preparation(parts_[i], row, input));
  }

  Preparation preparation(const Part& part, int64_t row, char* input) const {
    return {
        .input = part.input,
        .bits = part.matrix->bits,
        .dtype = x_.dtype,
        .x = static_cast<const char*>(x_.values) + (row_ + row) * x_.stride * size_of(x_.dtype),
        .columns = x_.columns,
        .units = part.units,
        .levels = part.levels,
        .planes = part.planes,
        .steps = reinterpret_cast<float*>(input + part.steps) + row * part.pieces,
        .out = input + part.x + row * part.x_bytes,
        .sums = part.offsets ? reinterpret_cast<float*>(input + part.sums) + row * part.groups : nullptr,
        .groups = part.groups,
        .group_columns = part.matrix->groups > 1 ? part.matrix->group : x_.columns,
    };
  }

  void take_turn(int64_t turn, char* input) const {
    int64_t i = 0;
    while (turn >= parts_[i].turns) turn -= parts_[i++].turns;
    const Part& part = parts_[i];
    const int64_t row = first_of(part, turn) * BLOCK, count = count_of(part, turn), first = turn % part.row_runs * part.rows;
    if (count <= 0) return;
    const Rows x{first, rows_ - first < part.rows ? rows_ - first : part.rows};
    const bool whole = row + count * BLOCK <= part.matrix->rows;
    if (count == 1 || whole || !part.arranged) return multiply(part, row, count, x, input);
    multiply(part, row, count - 1, x, input);  // the last is the tail, in another order than the others
    multiply(part, row + (count - 1) * BLOCK, 1, x, input);
  }

  // Some rows of the input.
  struct Rows {
    int64_t first, count;
  };

  void multiply(const Part& part, int64_t row, int64_t blocks, Rows x, char* input) const {
    const bl_matrix& m = *part.matrix;
    const int64_t rows = m.rows - row < blocks * BLOCK ? m.rows - row : blocks * BLOCK;
    const bool in_order = part.arranged && rows == blocks * BLOCK;
    const bool halves = in_order && scales_arranged(m) && std::abs(*m.exponent) < 100;
    const Neighbours n = in_order && part.neighbours ? neighbours(m, row) : Neighbours{row, 1, 0};
    const int64_t words = in_order ? 0 : part.units * unit_words(m.bits) * BLOCK;
    const int64_t scales = halves && !part.offsets ? 0 : part.groups * BLOCK;
    const int64_t floats = blocks * (words + 2 * scales + x.count * BLOCK) + PIECE * BLOCK + 16;
    float* at = static_cast<float*>(room.get(floats * 4));
    uint32_t* gathered = reinterpret_cast<uint32_t*>(at);
    float *turned = at + blocks * words, *offsets = turned + blocks * scales, *totals = offsets + blocks * scales;
    const int64_t scale_bytes = m.groups == 0 || (m.flags & BL_TENSOR) ? 0 : m.flags & BL_DQ ? 1 : 2;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t left = rows - b * BLOCK;
      const Block where{&m, row + b * BLOCK, left < BLOCK ? left : BLOCK};
      if (!in_order) table_.gather(where, gathered + b * words);
      if (!halves || part.offsets)
        table_.turn_scales(where, in_order, turned + b * scales, part.offsets ? offsets + b * scales : nullptr);
      begin(part, where, x, totals + b * x.count * BLOCK);
    }
    const Preparation given = preparation(part, x.first, input);
    table_.product({
        .bits = m.bits,
        .input = part.input,
        .rows = x.count,
        .blocks = blocks,
        .groups = part.groups,
        .group_units = part.group_units,
        .codes = in_order ? reinterpret_cast<const uint32_t*>(m.codes + n.first * (m.width * m.bits / 8)) : gathered,
        .beside = n.beside,
        .place = n.place,
        .planes = part.planes,
        .steps = reinterpret_cast<const float*>(input + part.steps) + x.first * part.pieces,
        .levels = part.levels,
        .scales = halves ? nullptr : turned,
        .halves = static_cast<const uint16_t*>(m.scales) + n.first * m.groups,
        .unit = halves ? std::ldexp(1.0f, *m.exponent) : 1.0f,
        .offsets = part.offsets ? offsets : nullptr,
        .x = input + part.x + x.first * part.x_bytes,
        .x_stride = part.x_bytes / 4,
        .given = &given,
        .given_stride = x_.stride * size_of(x_.dtype),
        .sums = reinterpret_cast<const float*>(input + part.sums) + x.first * part.groups,
        .totals = totals,
        .next = static_cast<const char*>(m.scales) + (row + rows) * scale_bytes * m.groups,
        .next_bytes = blocks * BLOCK * scale_bytes,
        .tile = totals + blocks * x.count * BLOCK,
    });
    const bl_product& p = *part.product;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t begin = row + b * BLOCK, left = m.rows - begin;
      table_.finish({
          .totals = totals + b * x.count * BLOCK,
          .rows = x.count,
          .columns = left < BLOCK ? left : BLOCK,
          .out = static_cast<char*>(p.out) + ((row_ + x.first) * p.stride + begin) * size_of(p.dtype),
          .stride = p.stride,
          .dtype = p.dtype,
      });
    }
  }

  // What totals start from: bias and addend are added before the sum is rounded to the output's dtype.
  void begin(const Part& part, const Block& where, Rows x, float* totals) const {
    const bl_product& p = *part.product;
    for (int64_t row = 0; row < x.count; ++row) {
      float* to = totals + row * BLOCK;
      std::memset(to, 0, BLOCK * sizeof *to);
      if (p.addend != nullptr)
        std::memcpy(to, p.addend + (row_ + x.first + row) * part.matrix->rows + where.row, static_cast<size_t>(where.rows) * 4);
      if (p.bias != nullptr)
        for (int64_t i = 0; i < where.rows; ++i) to[i] += p.bias[where.row + i];
    }
  }

  const Kernels& table_;
  const bl_input& x_;
  const int64_t row_, rows_;
  Part* parts_;
  const int64_t count_;
  const int threads_;
  int64_t turns_ = 0, bytes_ = 0;
};

// Rows of the input that follow each other and all fit planes of bytes, or all do not: which they are is decided row by row.
struct Stretch {
  int64_t rows;
  bool tame;
};

Stretch stretch_of(const Kernels& table, const bl_input& x, int64_t row, bool wanted) {
  const auto tame = [&](int64_t i) {
    return wanted && table.tame(static_cast<const char*>(x.values) + i * x.stride * size_of(x.dtype), x.columns, x.dtype);
  };
  Stretch found{1, tame(row)};
  while (found.rows < ROWS_AT_ONCE && row + found.rows < x.rows && tame(row + found.rows) == found.tame) ++found.rows;
  return found;
}

bool known(int32_t dtype) { return dtype == BL_F32 || dtype == BL_BF16 || dtype == BL_F16; }

bool has_another_order(const Kernels& table, const bl_matrix& m) {
  return by_column(m) ? can_arrange_columns(table, m) : can_arrange(m) && multiplies(m);
}

int check_call(const Kernels& table, const bl_input& x, const bl_product* products, int64_t count) {
  if (!known(x.dtype) || x.rows < 0 || x.columns < 0 || (x.rows > 1 && x.stride < x.columns) ||
      (x.values == nullptr && x.rows * x.columns > 0))
    return fail("packed_linear has no input of %lld x %lld values.", (long long)x.rows, (long long)x.columns);
  for (int64_t i = 0; i < count; ++i) {
    const bl_product& p = products[i];
    if (check(p.weight)) return -1;
    if (p.weight->columns != x.columns)
      return fail("the input has %lld columns, the weight needs %lld.", (long long)x.columns, (long long)p.weight->columns);
    if (!multiplies(*p.weight)) return fail("codes of %d bits in groups of %lld are not multiplied here.", p.weight->bits, (long long)p.weight->group);
    if ((p.weight->flags & BL_ARRANGED) && !has_another_order(table, *p.weight))
      return fail("codes of %d bits in rows of %lld are said to be arranged; they have no other order.", p.weight->bits, (long long)p.weight->width);
    if (!known(p.dtype) || (x.rows > 1 && p.stride < p.weight->rows) || (p.out == nullptr && x.rows * p.weight->rows > 0))
      return fail("packed_linear has no output of %lld x %lld values.", (long long)x.rows, (long long)p.weight->rows);
  }
  return 0;
}

void multiply_by_rows(const Kernels& table, const bl_input& x, const bl_product* products, int64_t count, int32_t flags, int threads) {
  constexpr int64_t AT_ONCE = 8;  // matrices
  for (int64_t first = 0; first < count; first += AT_ONCE) {
    Part parts[AT_ONCE];
    const int64_t some = count - first < AT_ONCE ? count - first : AT_ONCE;
    bool wanted = false;  // by any of them: looking at every value of the input is not free
    for (int64_t i = 0; i < some; ++i) wanted = wanted || by_bytes(*products[first + i].weight, x.rows, x.dtype, flags);
    wanted = wanted && table.bytes;
    for (int64_t row = 0; row < x.rows;) {
      const Stretch stretch = stretch_of(table, x, row, wanted);
      for (int64_t i = 0; i < some; ++i) parts[i] = part_of(products[first + i], x.dtype, x.rows, flags, table, stretch.tame);
      Call(table, x, row, stretch.rows, parts, some, threads).go();
      row += stretch.rows;
    }
  }
}

void multiply_by_columns(const Kernels& table, const bl_input& x, const bl_product* products, int64_t count, int32_t flags, int threads) {
  for (int64_t row = 0; row < x.rows;) {
    const Stretch stretch = stretch_of(table, x, row, table.bytes && !(flags & BL_INT8));
    multiply_columns(table, x, row, stretch.rows, stretch.tame, products, count, flags, threads);
    row += stretch.rows;
  }
}

}  // namespace

bool multiplies(const bl_matrix& m) {
  if (by_column(m)) return true;
  return m.bits <= 4 && !(m.flags & BL_TRELLIS) && (m.groups <= 1 || m.group % unit_columns(m.bits) == 0);
}

}  // namespace bl

extern "C" {

int bl_packed_linear(const bl_input* x, const bl_product* products, int64_t count, int32_t flags, int threads) {
  const bl::Kernels* table = bl::kernels();
  if (table == nullptr || bl::check_call(*table, *x, products, count)) return -1;
  if ((flags & BL_INT8) && !table->bytes) return bl::fail("products in 8 bits need AVX-512, this processor runs %s.", table->name);
  for (int64_t first = 0, some; first < count; first += some) {
    const bool columns = bl::by_column(*products[first].weight);
    some = 1;
    while (first + some < count && bl::by_column(*products[first + some].weight) == columns) ++some;
    if (columns) bl::multiply_by_columns(*table, *x, products + first, some, flags, threads);
    else bl::multiply_by_rows(*table, *x, products + first, some, flags, threads);
  }
  return 0;
}

int bl_packed_linear_one(const void* x, int32_t dtype, int64_t rows, const bl_matrix* weight, const float* bias,
                         const float* addend, void* out, int32_t flags, int threads) {
  if (bl::check(weight)) return -1;
  const bl_input input{x, rows, weight->columns, weight->columns, dtype};
  const bl_product product{weight, bias, addend, out, weight->rows, flags & BL_WIDE ? BL_F32 : dtype};
  return bl_packed_linear(&input, &product, 1, flags, threads);
}

int bl_multiplies(const bl_matrix* matrix) { return bl::check(matrix) == 0 && bl::multiplies(*matrix); }

int bl_arrange(bl_matrix* matrix, uint8_t* codes, void* scales, int back, int threads) {
  const bl::Kernels* table = bl::kernels();
  if (table == nullptr || bl::check(matrix)) return -1;
  const bl_matrix& m = *matrix;
  if (!bl::has_another_order(*table, m)) return bl::fail("codes of %d bits in rows of %lld have no other order.", m.bits, (long long)m.width);
  if (scales != nullptr && m.scales_bytes != m.rows * m.groups * 2)
    return bl::fail("scales that are no fp16 number per group have no other order.");
  if (bl::by_column(m)) return bl::arrange_columns(*table, m, codes, static_cast<uint16_t*>(scales), back != 0, threads);
  const int64_t blocks = m.rows / bl::BLOCK, beside = table->bytes && m.bits == 3 ? bl::BESIDE : 1;
  bl::Stage stage;
  bl::run(threads, [&] {
    stage.share((blocks + beside - 1) / beside, [&](int64_t i) {
      const int64_t first = i * beside, count = blocks - first < beside ? blocks - first : beside;
      table->arrange({&m, first * bl::BLOCK, count * bl::BLOCK}, codes, static_cast<uint16_t*>(scales), back != 0);
    });
  });
  if (!back) bl::ask_for_huge_pages(codes, m.codes_bytes);
  return 0;
}
}
