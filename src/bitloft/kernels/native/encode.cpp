// encode: which sixteen groups form a tile, who codes it, and where its bytes go. The arithmetic is in encode_groups.cpp.
//
// Four steps, each shared out among the threads: codes, scales and shifts of all groups in float; the exponent that the
// largest of them sets; scales and shifts as they are stored; and with double quantization the codes once more, for the
// scales as they are stored.
#include "encode.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "errors.hpp"
#include "halves.hpp"
#include "kernels.hpp"
#include "matrix.hpp"
#include "pool.hpp"

namespace bl {
namespace {

constexpr int64_t BATCH = 1 << 15;    // values that a thread takes at once
constexpr int64_t FREE_SPAN = 64;     // values of a tile's group where no scale is computed per group
constexpr int64_t SCALE_BLOCK = 256;  // formats.DQ_BLOCK
constexpr int SCALE_TOP = 14;         // packed.SCALE_TOP

struct FreeLater {
  void operator()(void* p) const { std::free(p); }
};

template <class T>
std::unique_ptr<T[], FreeLater> aligned(int64_t count) {
  const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
  return std::unique_ptr<T[], FreeLater>(static_cast<T*>(std::aligned_alloc(64, std::max<size_t>(bytes, 64))));
}

// Groups of one size: `per_row` of them in each row from column `begin`, `span` values apart.
struct Stretch {
  int64_t begin, per_row, span, count, size;  // count: values of a group that are not padding
};

class Encoder {
 public:
  Encoder(const float* x, const bl_matrix& m, int rule, const float* given)
      : x_(x), m_(m), rule_(rule), given_(given), groups_(m.groups > 0 && given == nullptr ? m.rows * m.groups : 0) {
    const int64_t span = groups_ > 0 ? m.group : std::min(FREE_SPAN, m.width), whole = m.columns / span;
    if (whole > 0) stretches_.push_back({0, whole, span, span, span});
    if (whole * span < m.width) {
      const int64_t begin = whole * span;
      stretches_.push_back({begin, 1, span, m.columns - begin, m.width - begin});
    }
    levels_ = m.levels;
    if (m.learned != nullptr) {
      for (int i = 0; i < 1 << m.bits; ++i) learned_[i] = half_number(m.learned[i]);
      levels_ = learned_;
    }
    scales_.resize(static_cast<size_t>(groups_));
    if (m.shifts != nullptr && given == nullptr) shifts_.resize(static_cast<size_t>(groups_));
    if (m.zeros != nullptr) zeros_.resize(static_cast<size_t>(groups_));
  }

  // False where a value is NaN or infinite.
  bool run(int threads) {
    code(threads, rule_);
    if (!finite_) return false;
    if (groups_ == 0) return true;
    set_exponent();
    store_numbers(threads);
    store_zeros();
    const bool first_codes_stay = rule_ == BL_LARGEST && m_.bits < 8;  // QLoRA codes before it quantizes scales
    if ((m_.flags & BL_DQ) != 0 && !first_codes_stay) {
      read_back();
      code(threads, BL_GIVEN);
    }
    return true;
  }

 private:
  // Codes all groups by `rule`; scales, shifts and zeros are written, or read if they are given.
  void code(int threads, int rule) {
    std::vector<Stage> stages(stretches_.size());
    bl::run(threads, [&] {
      int64_t most = 0;
      for (const Stretch& s : stretches_) most = std::max(most, s.size);
      const auto work = aligned<float>(work_of(most));
      const auto words = aligned<uint32_t>(16 * most);
      for (size_t i = 0; i < stretches_.size(); ++i) {
        const Stretch& s = stretches_[i];
        const int64_t total = m_.rows * s.per_row, tiles = std::max<int64_t>(BATCH / (16 * s.size), 1), step = 16 * tiles;
        stages[i].share((total + step - 1) / step, [&](int64_t batch) {
          const int64_t end = std::min(total, (batch + 1) * step);
          for (int64_t first = batch * step; first < end; first += 16)
            code_tile(s, rule, first, std::min<int64_t>(end - first, 16), work.get(), words.get());
        });
      }
    });
  }

  void code_tile(const Stretch& s, int rule, int64_t first, int64_t lanes, float* work, uint32_t* words) {
    float scales[16], shifts[16], zeros[16];
    GroupTile tile{};
    for (int64_t i = 0; i < 16; ++i) {
      const int64_t group = first + std::min(i, lanes - 1), row = group / s.per_row;
      tile.rows[i] = x_ + row * m_.columns + s.begin + (group % s.per_row) * s.span;
      const size_t number = number_of(s, group);
      scales[i] = given_ != nullptr ? given_[0] : scales_.empty() ? 1.0f : scales_[number];
      shifts[i] = given_ != nullptr ? given_[1] : shifts_.empty() ? 0.0f : shifts_[number];
      zeros[i] = zeros_.empty() ? 0.0f : zeros_[number];
    }
    tile.count = s.count, tile.size = s.size, tile.rule = rule, tile.bits = m_.bits;
    tile.uniform = rule_ == BL_RANGE || rule_ == BL_RANGE_SEARCHED;
    tile.shifted = m_.shifts != nullptr, tile.zeroed = m_.zeros != nullptr;
    if (given_ != nullptr) tile.rule = BL_GIVEN;
    tile.levels = levels_, tile.scales = scales, tile.shifts = shifts, tile.zeros = zeros;
    tile.work = work, tile.words = words;
    kernels()->encode_groups(tile);
    if (!tile.finite) return finite_.store(false, std::memory_order_relaxed);
    for (int64_t i = 0; i < lanes; ++i) {
      const size_t number = number_of(s, first + i);
      if (!scales_.empty()) scales_[number] = scales[i];
      if (!shifts_.empty()) shifts_[number] = shifts[i];
      if (!zeros_.empty()) zeros_[number] = zeros[i];
      write_codes(s, first + i, words + i);
    }
  }

  size_t number_of(const Stretch& s, int64_t group) const {
    if (groups_ == 0) return 0;
    return static_cast<size_t>(group / s.per_row * m_.groups + s.begin / m_.group + group % s.per_row);
  }

  // The words of one lane, sixteen apart, to the bytes of its codes.
  void write_codes(const Stretch& s, int64_t group, const uint32_t* words) {
    const int64_t row = group / s.per_row, column = s.begin + (group % s.per_row) * s.span;
    uint8_t* codes = const_cast<uint8_t*>(m_.codes) + row * (m_.width * m_.bits / 8);
    uint8_t* plane = codes + m_.width / 4 + column / 8;
    const int64_t count = m_.bits == 8 ? s.size / 4 : s.size / 8;
    switch (m_.bits) {
      case 1: return spread<1>(codes + column / 8, words, count);
      case 2: return spread<2>(codes + column / 4, words, count);
      case 3:
        spread<2>(codes + column / 4, words, count);
        for (int64_t j = 0; j < count; ++j) plane[j] = static_cast<uint8_t>(words[16 * j] >> 16);
        return;
      case 4: return spread<4>(codes + column / 2, words, count);
      default: return spread<4>(codes + column, words, count);
    }
  }

  template <int BYTES>  // of each word, its low ones
  static void spread(uint8_t* to, const uint32_t* words, int64_t count) {
    for (int64_t j = 0; j < count; ++j) std::memcpy(to + BYTES * j, words + 16 * j, BYTES);
  }

  void set_exponent() {
    float top = 0;
    for (const float s : scales_) top = std::max(top, std::fabs(s));
    for (const float s : shifts_) top = std::max(top, std::fabs(s));
    int exponent = 0;
    if (top > 0) {
      std::frexp(top, &exponent);
      exponent -= 1 + SCALE_TOP;
    }
    *const_cast<int32_t*>(m_.exponent) = exponent;
  }

  void store_numbers(int threads) {
    const int64_t step = 16 * SCALE_BLOCK;
    Stage stage;
    bl::run(groups_ > 4 * step ? threads : 1, [&] {
      stage.share((groups_ + step - 1) / step, [&](int64_t i) { store_some(i * step, std::min(step, groups_ - i * step)); });
    });
  }

  void store_some(int64_t begin, int64_t count) {
    const int32_t exponent = *m_.exponent;
    const float* scales = scales_.data() + begin;
    if (!shifts_.empty()) kernels()->encode_halves({shifts_.data() + begin, count, exponent, writable(m_.shifts) + begin});
    if ((m_.flags & BL_DQ) == 0) {
      auto* halves = static_cast<uint16_t*>(const_cast<void*>(m_.scales));
      return kernels()->encode_halves({scales, count, exponent, halves + begin});
    }
    auto* codes = static_cast<uint8_t*>(const_cast<void*>(m_.scales)) + begin;
    for (int64_t i = 0; i < count; i += SCALE_BLOCK) {
      const int64_t block = (begin + i) / SCALE_BLOCK;
      kernels()->encode_scale_block({scales + i, std::min(SCALE_BLOCK, count - i), exponent, codes + i,
                                     writable(m_.low) + block, writable(m_.step) + block});
    }
  }

  // A row's zero points squeezed together, padded to whole bytes.
  void store_zeros() {
    if (zeros_.empty()) return;
    const int64_t bits = zero_bits(m_), bytes = (m_.groups * bits + 7) / 8;
    auto* zeros = const_cast<uint8_t*>(m_.zeros);
    std::memset(zeros, 0, static_cast<size_t>(m_.zeros_bytes));
    for (int64_t row = 0; row < m_.rows; ++row)
      for (int64_t g = 0; g < m_.groups; ++g) {
        const auto zero = static_cast<unsigned>(zeros_[static_cast<size_t>(row * m_.groups + g)]);
        zeros[row * bytes + g * bits / 8] |= static_cast<uint8_t>(zero << (g * bits % 8));
      }
  }

  // Scales and shifts become what was stored.
  void read_back() {
    const float unit = std::ldexp(1.0f, *m_.exponent);
    const auto value = [&](uint16_t half) { return half_number(half) * unit; };
    const auto* codes = static_cast<const uint8_t*>(m_.scales);
    for (int64_t i = 0; i < groups_; ++i) {
      const int64_t block = i / SCALE_BLOCK;
      const float added = value(m_.step[block]) * static_cast<float>(codes[i]);
      scales_[static_cast<size_t>(i)] = value(m_.low[block]) + added;
    }
    for (size_t i = 0; i < shifts_.size(); ++i) shifts_[i] = value(m_.shifts[i]);
  }

  static uint16_t* writable(const uint16_t* part) { return const_cast<uint16_t*>(part); }

  const float* x_;
  const bl_matrix& m_;
  const int rule_;
  const float* given_;
  const int64_t groups_;
  const float* levels_;
  float learned_[16];
  std::vector<Stretch> stretches_;
  std::vector<float> scales_, shifts_, zeros_;
  std::atomic<bool> finite_{true};
};

int refuse(const bl_matrix& m, int rule, const float* given, int64_t values) {
  if ((m.flags & (BL_HALF | BL_ARRANGED | BL_TRELLIS)) != 0 || m.bits == 16)
    return fail("encode writes codes in the order of the file, and no half precision or trellis.");
  if (rule < BL_GIVEN || rule > BL_RANGE_SEARCHED) return fail("encode has no rule %d for scales.", rule);
  const bool uniform = rule == BL_RANGE || rule == BL_RANGE_SEARCHED, levels = !uniform;
  if (uniform && (m.bits < 2 || m.bits > 4)) return fail("encode has no even grid of %d bits.", m.bits);
  if ((rule == BL_GIVEN) != (m.groups == 0)) return fail("rule %d for scales, of which %lld are stored.", rule, (long long)m.groups);
  if (m.learned != nullptr && (m.bits < 2 || m.bits > 4)) return fail("no levels of %d bits are learned.", m.bits);
  if (levels && m.bits < 8 && m.levels == nullptr && m.learned == nullptr) return fail("encode lacks the levels of its codes.");
  if (((m.flags & BL_TENSOR) != 0) != (given != nullptr))
    return fail("one range for a tensor is given, and no other scale is.");
  if ((m.zeros != nullptr && (!uniform || m.shifts != nullptr)) || (rule == BL_RANGE_SEARCHED && m.zeros == nullptr))
    return fail("integer zero points belong to an even grid without shifts.");
  if (rule == BL_SPLIT && m.bits != 2) return fail("a split of magnitudes needs codes of 2 bits.");
  if (rule == BL_SEARCH && (m.bits < 2 || m.bits > 4)) return fail("no scale is searched for codes of %d bits.", m.bits);
  if (values != m.rows * m.columns)
    return fail("encode has %lld values for %lld x %lld.", (long long)values, (long long)m.rows, (long long)m.columns);
  return 0;
}

}  // namespace
}  // namespace bl

extern "C" int bl_encode(const float* x, int64_t values, const bl_matrix* out, int rule, const float* given, int threads) {
  if (int status = bl::check(out)) return status;
  if (values == 0 && out->rows * out->columns == 0) return 0;
  if (int status = bl::refuse(*out, rule, given, values)) return status;
  if (bl::kernels() == nullptr) return -1;
  return bl::Encoder(x, *out, rule, given).run(threads) ? 0 : 1;
}
