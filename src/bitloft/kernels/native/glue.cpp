// What lies between the products of a decoder layer: see glue.hpp. Compiled once per instruction set.
//
// Keys are cached as [width, slots], so that sixty-four scores are sums of multiples of rows: no sum across lanes, and a
// score does not depend on how many slots there are.
#include "glue.hpp"

#include "lanes.hpp"

namespace bl::BL_ISA {
namespace {

// e**x to about one unit in the last place, as straight-line code that the compiler turns into lanes (Cephes' expf).
inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2**23: the sum is rounded to an integer
  const float n = shifted - 12582912.0f;
  const float f = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * f * f + f + 1.0f;
  const int32_t power = __builtin_bit_cast(int32_t, shifted) - 0x4B400000 + 127;
  return p * __builtin_bit_cast(float, power << 23);
}

// x turned by its position: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin), the halves of a head being x1 and x2.
void turn(float* x, const float* cos, const float* sin, int64_t width) {
  const int64_t half = width / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float first = x[i], second = x[half + i];
    x[i] = first * cos[i] - second * sin[i];
    x[half + i] = second * cos[half + i] + first * sin[half + i];
  }
}

// scores[slot] = sum_i query[i] * keys[i, slot], sixty-four slots at a time.
void score(const Attention& a, const float* query, int64_t slots) {
  for (int64_t s = 0; s < slots; s += SLOTS) {
    Lanes sums[SLOTS / 16] = {none(), none(), none(), none()};
    for (int64_t i = 0; i < a.width; ++i) {
      const Lanes q = all(query[i] * a.scale);
      for (int64_t j = 0; j < SLOTS / 16; ++j) sums[j] = fma(q, load(a.keys + i * a.capacity + s + 16 * j), sums[j]);
    }
    for (int64_t j = 0; j < SLOTS / 16; ++j) store(a.scores + s + 16 * j, sums[j]);
  }
}

// scores[slot] = e**(score - largest) for the first `count` slots; returns their sum. In sixteen strands, so that the
// compiler may use lanes; slots that are not there yet count nothing.
float weigh(float* scores, int64_t count, int64_t slots) {
  for (int64_t s = count; s < slots; ++s) scores[s] = -3.0e38f;
  float top[16], total[16];
  for (int j = 0; j < 16; ++j) top[j] = -3.0e38f, total[j] = 0.0f;
  for (int64_t s = 0; s < slots; s += 16)
    for (int j = 0; j < 16; ++j) top[j] = scores[s + j] > top[j] ? scores[s + j] : top[j];
  float largest = top[0];
  for (int j = 1; j < 16; ++j) largest = top[j] > largest ? top[j] : largest;
  for (int64_t s = 0; s < slots; ++s) scores[s] = exponential(scores[s] - largest);
  for (int64_t s = count; s < slots; ++s) scores[s] = 0.0f;
  for (int64_t s = 0; s < slots; s += 16)
    for (int j = 0; j < 16; ++j) total[j] += scores[s + j];
  float sum = 0.0f;
  for (int j = 0; j < 16; ++j) sum += total[j];
  return sum;
}

// out[i] = sum_slot weight[slot] * values[slot, i] / total
void mix(const Attention& a, float* out, int64_t count, float total) {
  const Lanes share = all(1.0f / total);
  for (int64_t i = 0; i < a.width; i += 16) {
    Lanes sum = none();
    for (int64_t s = 0; s < count; ++s) sum = fma(all(a.scores[s]), load(a.values + s * a.width + i), sum);
    store(out + i, fma(sum, share, none()));
  }
}

}  // namespace

// Writes the row's key and value to the cache.
void keep(const Attention& a) {
  turn(a.key, a.cos, a.sin, a.width);
  for (int64_t i = 0; i < a.width; ++i) {
    a.keys[i * a.capacity + a.position] = a.key[i];
    a.values[a.position * a.width + i] = a.value[i];
  }
}

void attend(const Attention& a) {
  const int64_t count = a.position + 1, slots = (count + SLOTS - 1) / SLOTS * SLOTS;
  for (int64_t h = 0; h < a.group; ++h) {
    float* query = a.queries + h * a.width;
    turn(query, a.cos, a.sin, a.width);
    score(a, query, slots);
    mix(a, query, count, weigh(a.scores, count, slots));
  }
}

// x += added (unless that is null); y = weight * x / sqrt(mean(x**2) + eps)
void add_and_norm(float* x, const float* added, const float* weight, float* y, int64_t width, float eps) {
  Lanes squares = none();
  for (int64_t i = 0; i < width; i += 16) {
    Lanes v = load(x + i);
    if (added != nullptr) {
      v = add(v, load(added + i));
      store(x + i, v);
    }
    squares = fma(v, v, squares);
  }
  const float scale = 1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(width) + eps);
  for (int64_t i = 0; i < width; ++i) y[i] = weight[i] * (x[i] * scale);
}

// gate = gate * sigmoid(gate) * up
void gate(float* __restrict gate, const float* __restrict up, int64_t width) {
  for (int64_t i = 0; i < width; ++i) gate[i] = gate[i] / (1.0f + exponential(-gate[i])) * up[i];
}

}  // namespace bl::BL_ISA
