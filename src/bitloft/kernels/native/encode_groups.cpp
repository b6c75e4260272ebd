// Codes, scales, shifts and zero points of sixteen groups at once: kernels/search.py, one group in each lane.
//
// With a group in a lane every sum runs left to right within its lane, so nothing depends on how wide a register is, and
// no step needs a sum across lanes. Each sum is eight running sums (value j goes to number j % 8), whose halves are then
// added: the order that search.py fixes. The alternative, a group along a register, needs eight shuffles per sum, and
// another order of additions for each width.
#include "encode.hpp"

#include "lanes_codes.hpp"

namespace bl::BL_ISA {
namespace {

struct Pair {
  Lanes a, b;
};

inline Lanes folded(Lanes* sums) {
  for (int half = 4; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) sums[i] = add(sums[i], sums[i + half]);
  return sums[0];
}

template <class F>
inline Pair two_sums(int64_t count, F terms) {
  Lanes a[8], b[8];
  for (int i = 0; i < 8; ++i) a[i] = b[i] = none();
  const auto step = [&](int64_t j, int i) __attribute__((always_inline)) {
    const Pair term = terms(j);
    a[i] = add(a[i], term.a);
    b[i] = add(b[i], term.b);
  };
  int64_t j = 0;
  for (; j + 8 <= count; j += 8)
    for (int i = 0; i < 8; ++i) step(j + i, i);
  for (int i = 0; j < count; ++j, ++i) step(j, i);
  return {folded(a), folded(b)};
}

template <class F>
inline Lanes sum_of(int64_t count, F term) {
  Lanes sums[8];
  for (int i = 0; i < 8; ++i) sums[i] = none();
  int64_t j = 0;
  for (; j + 8 <= count; j += 8)
    for (int i = 0; i < 8; ++i) sums[i] = add(sums[i], term(j + i));
  for (int i = 0; j < count; ++j, ++i) sums[i] = add(sums[i], term(j));
  return folded(sums);
}

// The values of a tile, one group in each lane, zeros behind them up to `size`.
struct Values {
  float* work;
  int64_t count, size;

  Lanes operator[](int64_t j) const { return load(work + 16 * j); }
  void set(int64_t j, Lanes x) const { store(work + 16 * j, x); }
  float* spare() const { return work + 16 * (size + 16); }
};

Values gather(GroupTile& tile) {
  const Values x{tile.work, tile.count, tile.size};
  for (int64_t j = 0; j < tile.size; j += 16) {
    const float* from[16];
    alignas(64) float copy[16][16];
    const int64_t here = tile.count - j < 16 ? tile.count - j : 16;
    if (here < 16) std::memset(copy, 0, sizeof copy);
    for (int i = 0; i < 16; ++i) {
      from[i] = tile.rows[i] + j;
      if (here == 16) continue;
      if (here > 0) std::memcpy(copy[i], from[i], static_cast<size_t>(here) * sizeof(float));
      from[i] = copy[i];
    }
    load_across(from, tile.work + 16 * j);
  }
  Lanes poison[2] = {none(), none()};  // NaN from the first NaN or infinity on: x * 0 is 0 for all others
  for (int64_t j = 0; j < tile.size; j += 8)
    for (int i = 0; i < 8; ++i) poison[i % 2] = fma(x[j + i], none(), poison[i % 2]);
  tile.finite = !any_unequal(add(poison[0], poison[1]), none());
  return x;
}

// Least and greatest value; adding 0 turns -0 into 0, whichever of the two came first.
Pair ends(const Values& x) {
  Lanes low = x[0], high = low;
  for (int64_t j = 1; j < x.count; ++j) low = least(low, x[j]), high = most(high, x[j]);
  return {add(low, none()), add(high, none())};
}

Lanes largest(const Values& x) {
  Lanes found[2] = {none(), none()};
  for (int64_t j = 0; j < x.size; j += 8)
    for (int i = 0; i < 8; ++i) found[i % 2] = most(found[i % 2], absolute(x[j + i]));
  return most(found[0], found[1]);
}

Lanes mean(const Values& x, bool of_magnitudes) {
  const Lanes total = sum_of(x.count, [&](int64_t j) { return of_magnitudes ? absolute(x[j]) : x[j]; });
  return divide(total, all(static_cast<float>(x.count)));
}

void shift_by(const Values& x, Lanes shift) {
  for (int64_t j = 0; j < x.count; ++j) x.set(j, subtract(x[j], shift));
}

// `scale` where it is above 0, else 1: nothing is divided by 0, and a group of zeros takes the level nearest to 0.
Lanes safe(Lanes scale) { return choose(above(scale, none()), scale, all(1.0f)); }

// Batcher's merge exchange (Knuth, volume 3, 5.2.2, algorithm M): a fixed network, so sixteen groups sort in step.
void sort_descending(float* x, int64_t count) {
  for (int64_t p = 1; p < count; p *= 2)
    for (int64_t k = p; k >= 1; k /= 2)
      for (int64_t j = k % p; j + k < count; j += 2 * k) {
        const int64_t run = count - j - k < k ? count - j - k : k;
        for (int64_t i = j; i < j + run; ++i) {
          if ((i ^ (i + k)) >= 2 * p) continue;  // of two merged runs, not of one
          const Lanes a = load(x + 16 * i), b = load(x + 16 * (i + k));
          store(x + 16 * i, most(a, b));
          store(x + 16 * (i + k), least(a, b));
        }
      }
}

// The best scale over every split of the magnitudes into the low level a and the high level b.
Lanes split_scale(const Values& x, const float* levels) {
  float* sorted = x.spare();
  for (int64_t j = 0; j < x.count; ++j) store(sorted + 16 * j, absolute(x[j]));
  sort_descending(sorted, x.count);
  Lanes total = none();
  for (int64_t j = 0; j < x.count; ++j) total = add(total, load(sorted + 16 * j));
  const float a = levels[2], b = levels[3], gap = b - a, count = static_cast<float>(x.count);
  const Lanes base = multiply(all(a), total);
  Lanes high = none(), best = none(), best_above = none(), best_below = all(1.0f);
  for (int64_t k = 0; k <= x.count; ++k) {
    const float many = static_cast<float>(k), below = a * a * (count - many) + b * b * many;
    const Lanes above_line = add(base, multiply(all(gap), high));
    const Lanes gain = multiply(multiply(above_line, above_line), all(1.0f / below));
    const Mask better = above(gain, best);
    best = choose(better, gain, best);
    best_above = choose(better, above_line, best_above);
    best_below = choose(better, all(below), best_below);
    if (k < x.count) high = add(high, load(sorted + 16 * k));
  }
  return divide(best_above, best_below);
}

// The boundaries between levels, infinite where there are fewer than sixteen.
struct Bounds {
  alignas(64) float middle[16];
  explicit Bounds(const float* levels, int count) {
    for (int i = 0; i < 16; ++i) middle[i] = i + 1 < count ? (levels[i + 1] + levels[i]) / 2 : __builtin_inff();
  }
};

// Codes of a few values divided by their scale: the number of boundaries below each, by bisection.
template <int BITS>
inline Whole bisect(const Sixteen& bounds, const Bounds& plain, Lanes y) {
  constexpr int HALF = 1 << (BITS - 1);
  Whole code = add_where(above(y, all(plain.middle[HALF - 1])), nothing(), HALF);
  for (int step = HALF / 2; step > 0; step /= 2) {
    const Whole index = add_all(code, step - 1);
    code = add_where(above(y, look_up(bounds, index)), code, step);
  }
  return code;
}

// Codes by counting, for few levels: x against scale * boundary, so that nothing is divided.
template <int BITS>
struct Counter {
  Lanes line[(1 << BITS) - 1];

  Counter(const Bounds& bounds, Lanes scale) {
    for (int i = 0; i < (1 << BITS) - 1; ++i) line[i] = multiply(scale, all(bounds.middle[i]));
  }

  Whole code(Lanes x) const {
    Whole found = nothing();
    for (const Lanes& l : line) found = add_where(above(x, l), found, 1);
    return found;
  }

  Lanes level(Lanes x, const float* levels) const {
    Lanes found = all(levels[0]);
    for (int i = 0; i < (1 << BITS) - 1; ++i) found = choose(above(x, line[i]), all(levels[i + 1]), found);
    return found;
  }
};

// Sums of level * x and level**2 when the groups are coded with `scale`.
template <int BITS>
Pair fit(const Values& x, const Bounds& bounds, const float* levels, Lanes scale) {
  if constexpr (BITS <= 2) {
    const Counter<BITS> counter(bounds, scale);
    return two_sums(x.count, [&](int64_t j) __attribute__((always_inline)) {
      const Lanes value = x[j], level = counter.level(value, levels);
      return Pair{multiply(level, value), multiply(level, level)};
    });
  } else {
    alignas(64) float padded[16] = {};
    std::memcpy(padded, levels, sizeof(float) << BITS);
    const Sixteen table(padded), middle(bounds.middle);
    const Lanes inverse = divide(all(1.0f), scale);
    return two_sums(x.count, [&](int64_t j) __attribute__((always_inline)) {
      const Lanes value = x[j], level = look_up(table, bisect<BITS>(middle, bounds, multiply(value, inverse)));
      return Pair{multiply(level, value), multiply(level, level)};
    });
  }
}

// Candidate scales as parts of the root mean square, and of the scale at which the largest value is not clipped.
constexpr float PARTS[] = {0.82f, 0.88f, 0.94f, 1.0f, 1.06f, 1.12f, 1.18f}, EDGES[] = {0.6f, 0.7f, 0.8f, 0.9f, 1.0f};

template <int BITS>
Lanes searched_scale(const Values& x, const float* levels) {
  const Bounds bounds(levels, 1 << BITS);
  const Lanes square = sum_of(x.count, [&](int64_t j) { return multiply(x[j], x[j]); });
  const Lanes spread = root(divide(square, all(static_cast<float>(x.count))));
  const Lanes edge = divide(largest(x), all(levels[(1 << BITS) - 1]));
  Lanes best = none(), best_gain = none();
  const auto try_scale = [&](Lanes scale) {
    const Pair sums = fit<BITS>(x, bounds, levels, most(scale, all(1e-30f)));
    const Lanes below = most(sums.b, all(1e-30f)), gain = divide(multiply(sums.a, sums.a), below);
    const Mask better = above(gain, best_gain);
    best = choose(better, divide(sums.a, below), best);
    best_gain = choose(better, gain, best_gain);
  };
  for (const float part : PARTS) try_scale(multiply(spread, all(part)));
  for (const float part : EDGES) try_scale(multiply(edge, all(part)));
  return best;
}

struct Grid {
  Lanes scale, zero;
};

// round(x / scale) + zero, within 0 and top, as a float
inline Lanes on_grid(Lanes x, const Grid& grid, Lanes top) {
  return least(most(add(rounded(divide(x, grid.scale)), grid.zero), none()), top);
}

// The grid between two ends, which include zero, with an integer zero point.
Grid grid_between(Lanes low, Lanes high, Lanes top) {
  const Lanes scale = divide(subtract(high, low), top);
  const Lanes zero = rounded(divide(subtract(none(), low), safe(scale)));
  return {scale, least(most(zero, none()), top)};
}

Pair ends_with_zero(const Values& x) {
  const Pair found = ends(x);
  return {least(found.a, none()), most(found.b, none())};
}

// Parts of the range that are tried at each end.
constexpr float SHRINKS[] = {1.0f, 0.85f, 0.7f, 0.55f, 0.4f, 0.25f};

struct Fitted {
  Grid grid;    // codes are chosen on it
  Lanes scale;  // and stored with this one, of least squared error
};

Fitted searched_range(const Values& x, Lanes top) {
  const Pair range = ends_with_zero(x);
  Fitted best{{none(), none()}, none()};
  Lanes best_gain = all(-1.0f);
  for (const float low : SHRINKS)
    for (const float high : SHRINKS) {
      const Grid grid = grid_between(multiply(range.a, all(low)), multiply(range.b, all(high)), top);
      const Grid divisible{safe(grid.scale), grid.zero};
      const Pair sums = two_sums(x.count, [&](int64_t j) __attribute__((always_inline)) {
        const Lanes value = subtract(on_grid(x[j], divisible, top), grid.zero);
        return Pair{multiply(value, x[j]), multiply(value, value)};
      });
      const Lanes inner = most(sums.a, none()), norm = most(sums.b, all(1.0f));
      const Lanes gain = divide(multiply(inner, inner), norm);
      const Mask better = above(gain, best_gain);
      best.grid.scale = choose(better, grid.scale, best.grid.scale);
      best.grid.zero = choose(better, grid.zero, best.grid.zero);
      best.scale = choose(better, divide(inner, norm), best.scale);
      best_gain = choose(better, gain, best_gain);
    }
  return best;
}

// Eight codes of each lane into one word (four of 8 bits), zeros for padding.
template <int BITS, class F>
void write_words(const GroupTile& tile, F code) {
  constexpr int PER_WORD = BITS == 8 ? 4 : 8;
  for (int64_t j = 0; j < tile.size; j += PER_WORD) {
    Whole word = nothing();
    const int here = tile.count - j < PER_WORD ? static_cast<int>(tile.count - j) : PER_WORD;
    for (int i = 0; i < here; ++i) {
      const Whole found = code(j + i);
      if constexpr (BITS == 3) {
        word = join(word, join(left(masked(found, 3), 2 * i), left(right(found, 2), 16 + i)));
      } else {
        word = join(word, left(found, BITS * i));
      }
    }
    store(tile.words + 16 * (j / PER_WORD), word);
  }
}

template <int BITS>
void write_levels(const GroupTile& tile, const Values& x, Lanes scale) {
  if constexpr (BITS == 8) {  // levels -128 to 127: the nearest is a rounding, a tie the lower one
    write_words<8>(tile, [&](int64_t j) __attribute__((always_inline)) {
      const Lanes y = divide(x[j], scale), near = rounded(y);
      const Lanes code = subtract(near, choose(above(all(0.5f), subtract(near, y)), none(), all(1.0f)));
      return whole(least(most(add(code, all(128.0f)), none()), all(255.0f)));
    });
  } else {
    const Bounds bounds(tile.levels, 1 << BITS);
    if constexpr (BITS <= 2) {
      const Counter<BITS> counter(bounds, scale);
      write_words<BITS>(tile, [&](int64_t j) __attribute__((always_inline)) { return counter.code(x[j]); });
    } else {
      const Sixteen middle(bounds.middle);
      write_words<BITS>(tile, [&](int64_t j) __attribute__((always_inline)) {
        return bisect<BITS>(middle, bounds, divide(x[j], scale));
      });
    }
  }
}

template <int BITS>
void write_grid(const GroupTile& tile, const Values& x, const Grid& grid) {
  const Lanes top = all(static_cast<float>((1 << BITS) - 1));
  const Grid divisible{safe(grid.scale), grid.zero};
  write_words<BITS>(tile, [&](int64_t j) __attribute__((always_inline)) { return whole(on_grid(x[j], divisible, top)); });
}

// Uniform codes: the range of the group, whole or searched, with a shift or an integer zero point.
template <int BITS>
void encode_range(const GroupTile& tile, const Values& x) {
  const Lanes top = all(static_cast<float>((1 << BITS) - 1));
  Fitted found{{load(tile.scales), tile.zeroed ? load(tile.zeros) : none()}, load(tile.scales)};
  if (tile.rule == BL_GIVEN) {
    if (tile.shifted) shift_by(x, load(tile.shifts));
  } else if (tile.shifted) {
    const Pair range = ends(x);
    store(tile.shifts, range.a);
    shift_by(x, range.a);
    found.scale = found.grid.scale = divide(subtract(range.b, range.a), top);
  } else if (tile.rule == BL_RANGE_SEARCHED) {
    found = searched_range(x, top);
  } else {
    const Pair range = ends_with_zero(x);
    found.grid = grid_between(range.a, range.b, top);
    found.scale = found.grid.scale;
  }
  store(tile.scales, found.scale);
  if (tile.zeroed) store(tile.zeros, found.grid.zero);
  write_grid<BITS>(tile, x, found.grid);
}

template <int BITS>
Lanes scale_by_rule(const GroupTile& tile, const Values& x) {
  switch (tile.rule) {
    case BL_LARGEST: return BITS == 8 ? divide(largest(x), all(127.0f)) : largest(x);
    case BL_MEAN: return mean(x, true);
    case BL_SPLIT: return split_scale(x, tile.levels);
    case BL_SEARCH:
      if constexpr (BITS != 8) return searched_scale<BITS>(x, tile.levels);
      return none();
    default: return load(tile.scales);
  }
}

// Codes of a level table.
template <int BITS>
void encode_levels(const GroupTile& tile, const Values& x) {
  if (tile.shifted) {
    if (tile.rule != BL_GIVEN) {
      const Pair range = ends(x);
      const bool middle = tile.rule == BL_LARGEST && BITS != 8;
      store(tile.shifts, middle ? divide(add(range.a, range.b), all(2.0f)) : mean(x, false));
    }
    shift_by(x, load(tile.shifts));
  }
  const Lanes scale = scale_by_rule<BITS>(tile, x);
  store(tile.scales, scale);
  write_levels<BITS>(tile, x, safe(scale));
}

template <int BITS>
void encode_tile(GroupTile& tile) {
  const Values x = gather(tile);
  if (!tile.finite) return;  // NaN has no nearest level
  if constexpr (BITS != 1 && BITS != 8) {
    if (tile.uniform) return encode_range<BITS>(tile, x);
  }
  encode_levels<BITS>(tile, x);
}

}  // namespace

void encode_groups(GroupTile& tile) {
  switch (tile.bits) {
    case 1: return encode_tile<1>(tile);
    case 2: return encode_tile<2>(tile);
    case 3: return encode_tile<3>(tile);
    case 4: return encode_tile<4>(tile);
    default: return encode_tile<8>(tile);
  }
}

}  // namespace bl::BL_ISA
