// Fuzz target: a packed matrix whose header lies. Parts have exactly the bytes that the header says they have; dimensions,
// widths, flags and codes are anything. Every function refuses it with a sentence or stays within those bytes.
//
//   fuzz_matrix [RUNS [SEED]]      a seeded loop, with any compiler
//   fuzz_matrix_libfuzzer          where the compiler is clang (see sanitize.cmake)
#include <climits>

#include "packed.hpp"

namespace {

// Reads the input front to back; zeros once it is used up.
class Input {
 public:
  Input(const uint8_t* data, size_t size) : data_(data), left_(size) {}

  template <class T>
  T take() {
    T out{};
    const size_t here = left_ < sizeof out ? left_ : sizeof out;
    std::memcpy(&out, data_, here);
    data_ += here, left_ -= here;
    return out;
  }

  int64_t below(int64_t n) { return take<uint16_t>() % n; }

  std::unique_ptr<uint8_t[]> fill(int64_t bytes) {
    auto out = Packed::bytes(bytes);
    for (int64_t i = 0; i < bytes; ++i) out[static_cast<size_t>(i)] = take<uint8_t>();
    return out;
  }

 private:
  const uint8_t* data_;
  size_t left_;
};

// A sound matrix, of which a few fields are then changed; parts are allocated as the changed fields say.
struct Lie {
  bl_matrix m;
  std::unique_ptr<uint8_t[]> codes, scales, zeros, shifts, low, step;
  float levels[256];
  uint16_t learned[256];
  int32_t exponent;

  explicit Lie(Input& in) {
    const Kind& kind = kinds()[static_cast<size_t>(in.below(static_cast<int64_t>(kinds().size())))];
    const int64_t rows = in.below(80), columns = in.below(400);
    m = Packed(kind, rows, columns).m;
    for (int64_t changes = in.below(4); changes > 0; --changes) change(in);
    codes = in.fill(m.codes_bytes), m.codes = codes.get();
    scales = in.fill(m.scales_bytes), m.scales = scales.get();
    if (m.zeros != nullptr) zeros = in.fill(m.zeros_bytes), m.zeros = zeros.get();
    if (m.shifts != nullptr) shifts = in.fill(m.shifts_bytes), m.shifts = reinterpret_cast<uint16_t*>(shifts.get());
    low = in.fill(m.range_bytes), step = in.fill(m.range_bytes);
    m.low = reinterpret_cast<uint16_t*>(low.get()), m.step = reinterpret_cast<uint16_t*>(step.get());
    for (float& level : levels) level = in.take<float>();
    for (uint16_t& half : learned) half = in.take<uint16_t>();
    exponent = in.take<int32_t>();
    m.levels = in.below(8) == 0 ? nullptr : levels, m.exponent = in.below(16) == 0 ? nullptr : &exponent;
    if (m.learned != nullptr || in.below(8) == 0) m.learned = learned;
  }

  void change(Input& in) {
    int64_t* const sizes[] = {&m.rows, &m.columns, &m.width, &m.group, &m.groups};
    int64_t* const bytes[] = {&m.codes_bytes, &m.scales_bytes, &m.zeros_bytes, &m.shifts_bytes, &m.range_bytes};
    switch (in.below(6)) {
      case 0: *sizes[in.below(5)] = in.take<int64_t>(); break;
      case 1: *sizes[in.below(5)] += in.below(33) - 16; break;
      case 2: *bytes[in.below(5)] = in.below(5000); break;
      case 3: m.bits = static_cast<int32_t>(in.below(18)); break;
      case 4: m.flags ^= 1 << in.below(6); break;
      default: m.zeros = m.zeros == nullptr ? reinterpret_cast<const uint8_t*>(this) : nullptr; break;
    }
  }
};

constexpr int64_t MOST = 1 << 16;  // values; a matrix that claims more has no codes and is only checked

void use(Input& in) {
  Lie lie(in);
  const bl_matrix& m = lie.m;
  if (bl_check(&m) != 0) {
    CHECK(bl_error()[0] != '\0', "refused without a sentence");
    return;
  }
  if (m.rows > MOST || m.columns > MOST || m.rows * m.columns > MOST) return;
  const int64_t values = m.rows * m.columns;
  std::vector<float> x(static_cast<size_t>(values)), out(static_cast<size_t>(values));
  const int32_t dtype = static_cast<int32_t>(in.below(4));
  const int64_t size = dtype == BL_F32 ? 4 : 2, row[] = {in.take<int64_t>() % (m.rows + 2)};
  double square;
  bl_dequantize(&m, nullptr, m.rows, out.data(), values * size, dtype, 1);
  if (m.rows > 0) bl_dequantize(&m, row, 1, out.data(), m.columns * size, dtype, 1);
  bl_dequantize_columns(&m, 0, m.rows, out.data(), values * size, dtype, 1);
  bl_residual(&m, x.data(), values, out.data(), &square, 1);
  const int64_t rows = in.below(6);
  std::vector<float> input(static_cast<size_t>(rows * m.columns)), product(static_cast<size_t>(rows * m.rows));
  const bl_input activations{input.data(), rows, m.columns, m.columns, BL_F32};
  const bl_product job{&m, nullptr, nullptr, product.data(), m.rows, BL_F32};
  bl_packed_linear(&activations, &job, 1, static_cast<int32_t>(in.below(2)), 1);
  const bl_block block{{m.rows, m.columns, &m, nullptr, 0, 0}, {m.rows, m.columns, &m, nullptr, 0, 0}, 1.0f};
  const bl_blocks own{1, &block};
  const int64_t begin[] = {0, rows};
  const int32_t listed[] = {4, 3, 2, 1, 0};
  const bl_segments segments{1, 1, begin, listed + 5 - rows};
  std::vector<float> deltas(static_cast<size_t>(rows * m.columns));
  const bl_lora lora{m.columns, {0, nullptr}, &own, deltas.data(), m.columns, BL_F32, 0};
  bl_multi_lora(input.data(), BL_F32, rows, m.columns, m.columns, &segments, &lora, 1, 1);
  for (float& v : x) v = static_cast<float>(in.take<int16_t>());
  const float given[2] = {in.take<float>(), in.take<float>()};
  bl_encode(x.data(), values, &m, static_cast<int>(in.below(9)) - 1, in.below(2) != 0 ? given : nullptr, 1);
  std::vector<float> scales(static_cast<size_t>(m.rows));
  std::vector<float> weights(static_cast<size_t>(m.columns), in.take<float>());
  bl_encode_trellis(x.data(), in.below(2) != 0 ? weights.data() : nullptr, m.rows, m.columns, m.bits, lie.codes.get(), m.codes_bytes,
                    in.below(2) != 0 ? scales.data() : nullptr, 1);
  bl_matrix arranged = m;
  bl_arrange(&arranged, lie.codes.get(), in.below(2) != 0 ? lie.scales.get() : nullptr, static_cast<int>(in.below(2)), 1);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input in(data, size);
  use(in);
  return 0;
}

#if !defined(BL_LIBFUZZER)
int main(int count, char** arguments) {
  const long runs = count > 1 ? std::atol(arguments[1]) : 20000;
  const long seed = count > 2 ? std::atol(arguments[2]) : 1;
  CHECK(bl_isa() != nullptr, "no instruction set");
  std::vector<uint8_t> data;
  for (long run = 0; run < runs; ++run) {
    Random random(static_cast<uint64_t>(seed + run));
    data.resize(static_cast<size_t>(64 + random.below(4000)));
    for (uint8_t& byte : data) byte = static_cast<uint8_t>(random.next() >> 33);
    LLVMFuzzerTestOneInput(data.data(), data.size());
  }
  std::printf("%s: %ld headers, none read or wrote a byte too far\n", bl_isa(), runs);
}
#endif
