// Codes of a row by the cheapest walk through its trellis: kernels/trellis.py, sixteen states at once.
//
// A state is the last eight bits of the first plane, the newest lowest. From either of two states that differ in their
// oldest bit, a new bit leads to the same state, so a step keeps the better of two walks for each of 256 states (Viterbi).
// Subsets are linear in the bits of a window: sixteen neighbouring windows have the subsets of the first sixteen, all
// changed by the same bits, and a step looks costs up once for each such change.
//
// Every number is one that each machine rounds alike: no fused multiply-add, sums of scales left to right in double.
//
// Compiled once per instruction set.
#include "encode_trellis.hpp"

#include <math.h>

#include "lanes_codes.hpp"
#include "trellis.hpp"

namespace bl::BL_ISA {
namespace {

constexpr float FAR = 1e30f;          // the cost of a state that no walk may begin in
constexpr float CLIMB = 1.2f;         // from a scale to the next larger one that is tried
constexpr int CLIMBS = 4;
constexpr double HEAVY = 3.4;         // the kurtosis above which they are; 3 is a normal distribution's
constexpr int64_t NORMALIZE = 64;     // steps after which the least cost is taken off all

#if defined(BL_HAS_avx512)

inline uint16_t bits_of(Mask m) { return m; }

// a0 b0 a1 b1 ...
inline void store_in_turns(float* to, Lanes a, Lanes b) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  _mm512_store_ps(to, _mm512_permutex2var_ps(a.v, low, b.v));
  _mm512_store_ps(to + 16, _mm512_permutex2var_ps(a.v, high, b.v));
}

inline Whole load_whole(const int32_t* p) { return {_mm512_load_si512(p)}; }

#elif defined(BL_HAS_avx2)

inline uint16_t bits_of(Mask m) {
  return static_cast<uint16_t>(_mm256_movemask_ps(m.a) | _mm256_movemask_ps(m.b) << 8);
}

inline void store_in_turns(float* to, Lanes a, Lanes b) {
  const auto eight = [](float* at, __m256 x, __m256 y) {
    const __m256 low = _mm256_unpacklo_ps(x, y), high = _mm256_unpackhi_ps(x, y);
    _mm256_store_ps(at, _mm256_permute2f128_ps(low, high, 0x20));
    _mm256_store_ps(at + 8, _mm256_permute2f128_ps(low, high, 0x31));
  };
  eight(to, a.a, b.a), eight(to + 16, a.b, b.b);
}

inline Whole load_whole(const int32_t* p) {
  return {_mm256_load_si256(reinterpret_cast<const __m256i*>(p)), _mm256_load_si256(reinterpret_cast<const __m256i*>(p + 8))};
}

#else

inline uint16_t bits_of(const Mask& m) {
  uint16_t bits = 0;
  for (int i = 0; i < 16; ++i) bits = static_cast<uint16_t>(bits | m.v[i] << i);
  return bits;
}

inline void store_in_turns(float* to, const Lanes& a, const Lanes& b) {
  for (int i = 0; i < 16; ++i) to[2 * i] = a.v[i], to[2 * i + 1] = b.v[i];
}

inline Whole load_whole(const int32_t* p) {
  Whole out;
  std::memcpy(out.v, p, sizeof out.v);
  return out;
}

#endif

constexpr int parity(unsigned x) { return __builtin_popcount(x) & 1; }

template <int K>
constexpr int subset_of(unsigned window) {
  int found = 0;
  for (int j = 0; j < Trellis<K>::SPLIT; ++j) found |= parity(Trellis<K>::TAPS[j] & window) << j;
  return found;
}

// What a step reads: subsets of all windows, and for each change of the first sixteen their subsets as indices.
template <int K>
struct Subsets {
  static constexpr int COUNT = 1 << Trellis<K>::SPLIT;
  uint8_t of[2 * STATES] = {};
  alignas(64) int32_t changed[COUNT][16] = {};
  uint8_t change[STATES / 32][4] = {};  // by block of sixteen states, old bit, new bit

  constexpr Subsets() {
    for (unsigned w = 0; w < 2 * STATES; ++w) of[w] = static_cast<uint8_t>(subset_of<K>(w));
    for (int c = 0; c < COUNT; ++c)
      for (unsigned i = 0; i < 16; ++i) changed[c][i] = subset_of<K>(2 * i) ^ c;
    for (unsigned q = 0; q < STATES / 32; ++q)
      for (unsigned b = 0; b < 4; ++b) change[q][b] = static_cast<uint8_t>(subset_of<K>(32 * q | (b & 1) | (b >> 1) << 8));
  }
};

template <int K>
class Walk {
 public:
  Walk(const float* z, const float* weights, uint16_t* decisions) : z_(z), weights_(weights), decisions_(decisions) {}

  // Walk over the values first, first + 1, ... (a circle of `width`), from any state or from one.
  void go(int64_t first, int64_t count, int64_t width, int start) {
    for (int64_t s = 0; s < STATES; s += 16) store(cost_ + s, all(start < 0 ? 0.0f : FAR));
    if (start >= 0) cost_[start] = 0;
    for (int64_t t = 0, at = first; t < count; ++t, at = at + 1 == width ? 0 : at + 1) {
      step(z_[at], weights_[at], decisions_ + t * DECISIONS);
      if (t % NORMALIZE == NORMALIZE - 1) normalize();
    }
  }

  int cheapest() const {
    int best = 0;
    for (int s = 1; s < STATES; ++s)
      if (cost_[s] < cost_[best]) best = s;
    return best;
  }

  // The state before value t, of a walk that is in `state` after it.
  int before(int state, int64_t t) const {
    const int block = state >> 5, lane = state >> 1 & 15;
    const int oldest = decisions_[t * DECISIONS + 2 * block + (state & 1)] >> lane & 1;
    return state >> 1 | oldest << (MEMORY - 1);
  }

 private:
  static constexpr Subsets<K> subsets{};

  // Least squared distance to the levels of each subset, repeated up to sixteen.
  static Lanes distances(float z) {
    alignas(64) static constexpr auto levels = Trellis<K>::floats();
    Lanes best = squared(z, levels.v);
    for (int i = 16; i < LEVEL_COUNT<K>; i += 16) best = least(best, squared(z, levels.v + i));
    if constexpr (Subsets<K>::COUNT == 8) {
      alignas(64) float numbers[16], other[16];
      store(numbers, best);
      std::memcpy(other, numbers + 8, 32), std::memcpy(other + 8, numbers, 32);
      best = least(best, load(other));
    }
    return best;
  }

  static Lanes squared(float z, const float* levels) {
    const Lanes e = subtract(all(z), load(levels));
    return multiply(e, e);
  }

  void step(float z, float weight, uint16_t* decided) {
    alignas(64) float costs[Subsets<K>::COUNT][16], numbers[16];
    store(numbers, multiply(distances(z), all(weight)));
    const Sixteen table(numbers);
    for (int c = 0; c < Subsets<K>::COUNT; ++c) store(costs[c], look_up(table, load_whole(subsets.changed[c])));
    for (int q = 0; q < STATES / 32; ++q) {
      const uint8_t* change = subsets.change[q];
      const Lanes a = load(cost_ + 16 * q), b = load(cost_ + 16 * q + STATES / 2);
      const Lanes a0 = add(a, load(costs[change[0]])), a1 = add(a, load(costs[change[1]]));
      const Lanes b0 = add(b, load(costs[change[2]])), b1 = add(b, load(costs[change[3]]));
      const Mask first = above(a0, b0), second = above(a1, b1);
      store_in_turns(next_ + 32 * q, choose(first, b0, a0), choose(second, b1, a1));
      decided[2 * q] = bits_of(first), decided[2 * q + 1] = bits_of(second);
    }
    float* const done = cost_;
    cost_ = next_, next_ = done;
  }

  void normalize() {
    Lanes low = load(cost_);
    for (int64_t s = 16; s < STATES; s += 16) low = least(low, load(cost_ + s));
    alignas(64) float numbers[16];
    store(numbers, low);
    for (int i = 1; i < 16; ++i)
      if (numbers[i] < numbers[0]) numbers[0] = numbers[i];
    for (int64_t s = 0; s < STATES; s += 16) store(cost_ + s, subtract(load(cost_ + s), all(numbers[0])));
  }

  const float *z_, *weights_;
  uint16_t* decisions_;
  alignas(64) float memory_[2][STATES];
  float *cost_ = memory_[0], *next_ = memory_[1];
};

// The row's values in the order of its codes: what it is made of, weights, and the levels that were chosen.
struct Values {
  float *z, *weights, *levels;
};

template <int K>
void choose_codes(const TrellisRow& row, const Values& v) {
  const int64_t n = row.width;
  Walk<K> walk(v.z, v.weights, row.decisions);
  walk.go((n - TAIL % n) % n, 2 * TAIL, n, -1);
  int state = walk.cheapest();
  for (int64_t t = 2 * TAIL - 1; t >= TAIL; --t) state = walk.before(state, t);
  walk.go(0, n, n, state);
  for (int64_t byte = 0; byte < n / 8 * K; ++byte) row.codes[byte] = 0;
  for (int64_t t = n - 1; t >= 0; --t) {
    row.codes[t / 8] = static_cast<uint8_t>(row.codes[t / 8] | (state & 1) << t % 8);
    state = walk.before(state, t);
  }
}

// The rest of a code: of its subset, the level that is nearest.
template <int K>
void choose_levels(const TrellisRow& row, const Values& v) {
  constexpr int SPLIT = Trellis<K>::SPLIT;
  constexpr auto levels = Trellis<K>::floats();
  const int64_t n = row.width, bytes = n / 8;
  const auto bit = [&](int64_t t) { return row.codes[t / 8] >> t % 8 & 1; };
  int window = 0;
  for (int64_t t = n - MEMORY; t < n; ++t) window = window << 1 | bit(t);
  for (int64_t t = 0; t < n; ++t) {
    window = (window << 1 | bit(t)) & (2 * STATES - 1);
    const int subset = subset_of<K>(static_cast<unsigned>(window));
    int best = 0;
    float least_found = 0;
    for (int p = 0; p < 1 << (K - 1); ++p) {
      const float e = v.z[t] - levels.v[subset + (p << SPLIT)], squared = e * e;
      if (p == 0 || squared < least_found) best = p, least_found = squared;
    }
    for (int p = 1; p < K; ++p) {
      uint8_t& byte = row.codes[p * bytes + t / 8];
      byte = static_cast<uint8_t>(byte | (best >> (p - 1) & 1) << t % 8);
    }
    v.levels[t] = levels.v[subset + (best << SPLIT)];
  }
}

// How well codes fit a row: the scale of least error, and what it takes off the row's square.
struct Fit {
  float scale;
  double gain;
};

template <int K>
Fit coded(const TrellisRow& row, const Values& v, float scale) {
  const float inverse = scale > 1e-30f ? 1.0f / scale : 0.0f;
  for (int64_t t = 0; t < row.width; ++t) v.z[t] = t < row.columns ? row.x[t] * inverse : 0.0f;
  choose_codes<K>(row, v);
  choose_levels<K>(row, v);
  double inner = 0, norm = 0;
  for (int64_t t = 0; t < row.columns; ++t) {
    const double level = static_cast<double>(v.levels[t]), w = static_cast<double>(v.weights[t]);
    inner += w * static_cast<double>(row.x[t]) * level;
    norm += w * level * level;
  }
  if (!(inner > 0)) return {0.0f, 0.0};
  return {static_cast<float>(inner / norm), inner * inner / norm};
}

// A row with a scale of its own. Where its tails are heavy, larger scales are tried as long as they gain.
template <int K>
void encode_scaled(TrellisRow& row, const Values& v, double square, double fourth, double mass) {
  const size_t bytes = static_cast<size_t>(row.width / 8 * K);
  float start = mass > 0 ? static_cast<float>(sqrt(square / mass) / Trellis<K>::SPREAD) : 0.0f;
  Fit best = coded<K>(row, v, start);
  for (int climb = 0; climb < CLIMBS && fourth * mass > HEAVY * square * square; ++climb) {
    std::memcpy(row.spare, row.codes, bytes);
    start *= CLIMB;
    const Fit found = coded<K>(row, v, start);
    if (!(found.gain > best.gain)) {
      std::memcpy(row.codes, row.spare, bytes);
      break;
    }
    best = found;
  }
  row.scale = best.scale;
}

template <int K>
void encode_row(TrellisRow& row) {
  const int64_t n = row.width;
  const Values v{row.work, row.work + n, row.work + 2 * n};
  double square = 0, fourth = 0, mass = 0;
  float poison = 0;
  for (int64_t t = 0; t < n; ++t) {
    const bool there = t < row.columns;
    v.weights[t] = !there ? 0.0f : row.weights != nullptr ? row.weights[t] : 1.0f;
    const double x = there ? static_cast<double>(row.x[t]) : 0.0, w = static_cast<double>(v.weights[t]);
    if (there) poison += row.x[t] * 0.0f + v.weights[t] * 0.0f;
    square += w * x * x;
    fourth += w * x * x * x * x;
    mass += w;
  }
  row.finite = poison == 0.0f;
  row.scale = 1.0f;
  if (!row.finite) return;
  if (row.scaled) {
    encode_scaled<K>(row, v, square, fourth, mass);
  } else {
    coded<K>(row, v, 1.0f);
  }
}

}  // namespace

void encode_trellis(TrellisRow& row) {
  switch (row.bits) {
    case 1: return encode_row<1>(row);
    case 2: return encode_row<2>(row);
    case 3: return encode_row<3>(row);
    default: return encode_row<4>(row);
  }
}

}  // namespace bl::BL_ISA
