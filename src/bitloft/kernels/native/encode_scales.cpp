// Scales and shifts as they are stored: fp16 in units of a power of two, or 8-bit codes of a range (packed.py).
#include "encode.hpp"
#include "lanes_codes.hpp"

namespace bl::BL_ISA {
namespace {

// x * 2**by in two exact steps, neither of which leaves float's range where the result does not.
struct Power {
  float first, second;
  explicit Power(int by) : first(__builtin_ldexpf(1.0f, by / 2)), second(__builtin_ldexpf(1.0f, by - by / 2)) {}
};

inline Lanes scaled(Lanes x, Power by) { return multiply(multiply(x, all(by.first)), all(by.second)); }

// Up to sixteen numbers, the last one repeated.
inline Lanes load_some(const float* from, int64_t count) {
  if (count >= 16) return load(from);
  float copy[16];
  for (int64_t i = 0; i < 16; ++i) copy[i] = from[i < count ? i : count - 1];
  return load(copy);
}

inline uint16_t half_of(float x, int exponent) {
  uint16_t halves[16];
  store_halves(reinterpret_cast<uint8_t*>(halves), scaled(all(x), Power(-exponent)));
  return halves[0];
}

inline float value_of(uint16_t half, int exponent) { return half_value(half) * __builtin_ldexpf(1.0f, exponent); }

}  // namespace

void encode_halves(const Halves& job) {
  const Power by(-job.exponent);
  for (int64_t i = 0; i < job.count; i += 16) {
    const int64_t here = job.count - i < 16 ? job.count - i : 16;
    uint16_t halves[16];
    store_halves(reinterpret_cast<uint8_t*>(halves), scaled(load_some(job.from + i, here), by));
    std::memcpy(job.to + i, halves, static_cast<size_t>(here) * sizeof *halves);
  }
}

void encode_scale_block(const ScaleBlock& job) {
  float low = job.from[0], high = low;
  for (int64_t i = 1; i < job.count; ++i) {
    low = job.from[i] < low ? job.from[i] : low;
    high = job.from[i] > high ? job.from[i] : high;
  }
  *job.low = half_of(low, job.exponent);
  const float bottom = value_of(*job.low, job.exponent), reach = high - bottom;
  *job.step = half_of((reach > 0 ? reach : 0.0f) / 255.0f, job.exponent);
  const float width = value_of(*job.step, job.exponent);
  if (!(width > 0)) return static_cast<void>(std::memset(job.codes, 0, static_cast<size_t>(job.count)));
  const Lanes divisor = all(width > 1e-38f ? width : 1e-38f);
  for (int64_t i = 0; i < job.count; i += 16) {
    const int64_t here = job.count - i < 16 ? job.count - i : 16;
    const Lanes y = rounded(divide(subtract(load_some(job.from + i, here), all(bottom)), divisor));
    uint32_t codes[16];
    store(codes, whole(least(most(y, none()), all(255.0f))));
    for (int64_t k = 0; k < here; ++k) job.codes[i + k] = static_cast<uint8_t>(codes[k]);
  }
}

}  // namespace bl::BL_ISA
