// bl_decode: one token for each row through the layers of a decoder of Llama's shape, in one call.
//
// The products are the library's own (bl_packed_linear, bl_multi_lora); what lies between them is glue.cpp. One call for
// the step instead of one for each operation: at 22 layers a step through a framework costs milliseconds before it has
// multiplied anything. Nothing is allocated: the caller brings the memory, and the caches belong to its rows.
#include "errors.hpp"
#include "glue.hpp"
#include "kernels.hpp"
#include "matrix.hpp"
#include "pool.hpp"

namespace bl {
namespace {

constexpr int64_t MOST = 3;  // matrices that share an input
constexpr int64_t WORTH_THREADS = 1 << 18;  // multiplications below which waking a second thread costs more

struct Memory {
  float *normed, *added, *queries, *keys, *values, *gates, *ups, *scores;
};

int64_t longest(const bl_cache* caches, int64_t rows) {
  int64_t most = 0;
  for (int64_t r = 0; r < rows; ++r) most = caches[r].capacity > most ? caches[r].capacity : most;
  return most;
}

int64_t floats_per_row(const bl_decoder& d, int64_t capacity) {
  const int64_t queries = d.heads * d.head_width, keys = d.key_heads * d.head_width;
  return 2 * d.width + queries + 2 * keys + 2 * d.inner + d.key_heads * capacity;
}

Memory divide(const bl_decoder& d, float* at, int64_t rows) {
  const auto take = [&](int64_t width) {
    float* part = at;
    at += rows * width;
    return part;
  };
  const int64_t queries = d.heads * d.head_width, keys = d.key_heads * d.head_width;
  Memory m{};
  m.normed = take(d.width), m.added = take(d.width), m.queries = take(queries);
  m.keys = take(keys), m.values = take(keys), m.gates = take(d.inner), m.ups = take(d.inner);
  m.scores = at;
  return m;
}

int check_products(const bl_products& p, const char* what, int64_t columns, const int64_t* outs, int64_t count) {
  if (p.count != count || p.weights == nullptr)
    return fail("a layer's %s has %lld matrices where %lld are needed.", what, (long long)p.count, (long long)count);
  for (int64_t i = 0; i < count; ++i) {
    const bl_matrix& w = p.weights[i];
    if (w.rows != outs[i] || w.columns != columns)
      return fail("matrix %lld of a layer's %s is %lld x %lld where %lld x %lld is needed.", (long long)i, what,
                  (long long)w.rows, (long long)w.columns, (long long)outs[i], (long long)columns);
  }
  return 0;
}

int check_decoder(const bl_decoder& d) {
  if (d.width % 16 || d.inner % 16 || d.head_width % 16 || d.key_heads <= 0 || d.heads % d.key_heads)
    return fail("a decoder of width %lld, inner width %lld and heads of %lld cannot be run; 16 must divide each.",
                (long long)d.width, (long long)d.inner, (long long)d.head_width);
  const int64_t queries = d.heads * d.head_width, keys = d.key_heads * d.head_width;
  const int64_t attention[] = {queries, keys, keys}, wide[] = {d.width}, gates[] = {d.inner, d.inner};
  for (int64_t i = 0; i < d.count; ++i) {
    const bl_layer& layer = d.layers[i];
    if (check_products(layer.attention, "attention", d.width, attention, 3) ||
        check_products(layer.output, "output", queries, wide, 1) ||
        check_products(layer.gates, "gates", d.width, gates, 2) || check_products(layer.down, "down", d.inner, wide, 1))
      return -1;
  }
  return 0;
}

int check_caches(const bl_decoder& d, const bl_cache* caches, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r) {
    const bl_cache& c = caches[r];
    if (c.length < 0 || c.length >= c.capacity || c.capacity % SLOTS || c.length >= d.positions)
      return fail("row %lld has %lld tokens in a cache of %lld, and %lld positions are known.", (long long)r,
                  (long long)c.length, (long long)c.capacity, (long long)d.positions);
  }
  return 0;
}

class Step {
 public:
  Step(const bl_decoder& decoder, float* hidden, const bl_cache* caches, int64_t rows, const bl_segments* segments,
       float* scratch, int threads)
      : d_(decoder), hidden_(hidden), caches_(caches), rows_(rows), segments_(segments), threads_(threads),
        kernels_(*kernels()), m_(divide(decoder, scratch, rows)), capacity_(longest(caches, rows)) {}

  int run_layers() {
    const float* added = nullptr;
    for (int64_t i = 0; i < d_.count; ++i) {
      const bl_layer& layer = d_.layers[i];
      norm(added, layer.input_norm, m_.normed);
      float* const attention[] = {m_.queries, m_.keys, m_.values};
      if (products(layer.attention, m_.normed, attention)) return -1;
      attend(i);
      if (products(layer.output, m_.queries, &m_.added)) return -1;
      norm(m_.added, layer.inner_norm, m_.normed);
      float* const gates[] = {m_.gates, m_.ups};
      if (products(layer.gates, m_.normed, gates)) return -1;
      each_row(d_.inner, [&](int64_t r) { kernels_.gate(m_.gates + r * d_.inner, m_.ups + r * d_.inner, d_.inner); });
      if (products(layer.down, m_.gates, &m_.added)) return -1;
      added = m_.added;
    }
    norm(added, d_.norm, hidden_);
    return 0;
  }

 private:
  void norm(const float* added, const float* weight, float* out) {
    each_row(d_.width, [&](int64_t r) {
      kernels_.add_and_norm(hidden_ + r * d_.width, added == nullptr ? nullptr : added + r * d_.width, weight,
                            out + r * d_.width, d_.width, d_.eps);
    });
  }

  template <class F>
  void each_row(int64_t width, F&& part) {
    Stage stage;
    run(rows_ * width < WORTH_THREADS / 16 ? 1 : threads_, [&] { stage.share(rows_, part); });
  }

  int products(const bl_products& p, const float* x, float* const* outs) {
    const int64_t columns = p.weights[0].columns;
    bl_product products[MOST];
    bl_lora deltas[MOST];
    for (int64_t i = 0; i < p.count; ++i) {
      const int64_t width = p.weights[i].rows;
      products[i] = {.weight = &p.weights[i], .bias = p.biases[i], .addend = nullptr, .out = outs[i], .stride = width, .dtype = BL_F32};
      if (p.deltas == nullptr) continue;
      deltas[i] = p.deltas[i];
      deltas[i].out = outs[i], deltas[i].out_stride = width;
      deltas[i].out_dtype = BL_F32, deltas[i].accumulate = 1;
    }
    const bl_input input = {.values = x, .rows = rows_, .columns = columns, .stride = columns, .dtype = BL_F32};
    if (bl_packed_linear(&input, products, p.count, d_.flags, threads_)) return -1;
    if (p.deltas == nullptr) return 0;
    return bl_multi_lora(x, BL_F32, rows_, columns, columns, segments_, deltas, p.count, threads_);
  }

  void attend(int64_t layer) {
    int64_t tokens = 0;
    for (int64_t r = 0; r < rows_; ++r) tokens += caches_[r].length + 1;
    const bool alone = tokens * d_.heads * d_.head_width * 2 < WORTH_THREADS;
    const auto work = [&](Stage& stage, auto&& part) {
      stage.share(rows_ * d_.key_heads, [&](int64_t i) { part(attention(layer, i / d_.key_heads, i % d_.key_heads)); });
    };
    Stage keep, attend;  // rows of one text read what rows before them have kept
    run(alone ? 1 : threads_, [&] {
      work(keep, kernels_.keep);
      work(attend, kernels_.attend);
    });
  }

  Attention attention(int64_t layer, int64_t row, int64_t head) const {
    const bl_cache& cache = caches_[row];
    const int64_t w = d_.head_width, group = d_.heads / d_.key_heads, at = row * d_.key_heads + head;
    const int64_t plane = (layer * d_.key_heads + head) * w * cache.capacity;
    return {
        .group = group,
        .width = w,
        .position = cache.length,
        .capacity = cache.capacity,
        .scale = d_.scale,
        .cos = d_.cos + cache.length * w,
        .sin = d_.sin + cache.length * w,
        .queries = m_.queries + at * group * w,
        .key = m_.keys + at * w,
        .value = m_.values + at * w,
        .keys = cache.keys + plane,
        .values = cache.values + plane,
        .scores = m_.scores + at * capacity_,
    };
  }

  const bl_decoder& d_;
  float* hidden_;
  const bl_cache* caches_;
  int64_t rows_;
  const bl_segments* segments_;
  int threads_;
  const Kernels& kernels_;
  Memory m_;
  int64_t capacity_;
};

}  // namespace
}  // namespace bl

extern "C" int64_t bl_decode_floats(const bl_decoder* decoder, const bl_cache* caches, int64_t rows) {
  return rows * bl::floats_per_row(*decoder, bl::longest(caches, rows));
}

extern "C" int bl_decode(const bl_decoder* decoder, float* hidden, const bl_cache* caches, int64_t rows,
                         const bl_segments* segments, float* scratch, int64_t floats, int threads) {
  using namespace bl;
  if (kernels() == nullptr || check_decoder(*decoder) || check_caches(*decoder, caches, rows)) return -1;
  if (floats < bl_decode_floats(decoder, caches, rows))
    return fail("a step of %lld rows needs %lld floats of memory, not %lld.", (long long)rows,
                (long long)bl_decode_floats(decoder, caches, rows), (long long)floats);
  return Step(*decoder, hidden, caches, rows, segments, scratch, threads).run_layers();
}
