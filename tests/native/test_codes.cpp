// encode, dequantize and residual on every family and odd size: they agree with each other and stay within their memory.
#include "packed.hpp"

namespace {

const int64_t SIZES[][2] = {{1, 1}, {3, 7}, {17, 127}, {5, 576}, {2, 1000}, {40, 64}, {0, 9}, {4, 0}, {300, 72}};

// Rows from the last whole sixty-four on, of codes that run down columns, in every dtype.
void tail_of(const Packed& packed, const std::vector<float>& values) {
  const int64_t from = packed.m.rows / 64 * 64, rows = packed.m.rows - from, columns = packed.m.columns;
  std::vector<float> tail(static_cast<size_t>(rows * columns));
  CHECK(bl_dequantize_columns(&packed.m, from, rows, tail.data(), rows * columns * 4, BL_F32, 1) == 0, "a tail");
  for (int64_t i = 0; i < columns; ++i)
    for (int64_t o = 0; o < rows; ++o)
      CHECK(tail[static_cast<size_t>(i * rows + o)] == values[static_cast<size_t>((from + o) * columns + i)], "row %lld", (long long)(from + o));
  for (const int32_t dtype : {BL_BF16, BL_F16}) {
    std::vector<uint16_t> narrow(tail.size());
    CHECK(bl_dequantize_columns(&packed.m, from, rows, narrow.data(), rows * columns * 2, dtype, 2) == 0, "a tail");
  }
  CHECK(bl_dequantize(&packed.m, nullptr, packed.m.rows, tail.data(), packed.m.rows * columns * 4, BL_F32, 1) == -1, "rows of columns");
}

void round_trip(const Kind& kind, int64_t rows, int64_t columns) {
  Random random(static_cast<uint64_t>(rows * 1000 + columns));
  std::vector<float> x(static_cast<size_t>(rows * columns));
  for (float& v : x) v = random.value();
  Packed packed(kind, rows, columns), again(kind, rows, columns);
  packed.encode(x), again.encode(x, 3);
  CHECK(std::memcmp(packed.codes.get(), again.codes.get(), static_cast<size_t>(packed.m.codes_bytes)) == 0, "%s", kind.name);
  CHECK(std::memcmp(packed.scales.get(), again.scales.get(), static_cast<size_t>(packed.m.scales_bytes)) == 0, "%s", kind.name);
  const std::vector<float> values = packed.decoded();
  double error = 0, size = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    CHECK(std::isfinite(values[i]), "%s: value %zu", kind.name, i);
    error += static_cast<double>(x[i] - values[i]) * static_cast<double>(x[i] - values[i]);
    size += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  }
  const bool short_walk = kind.trellis && (kind.columns ? rows : columns) < 32;  // all ends: finite, and no more is promised
  CHECK(short_walk || error <= size * (kind.bits == 1 ? 0.6 : 0.35) + 1e-12, "%s: error %g of %g", kind.name, error, size);
  if (kind.columns) return tail_of(packed, values);
  double square = -1;
  std::vector<float> rest(x.size());
  CHECK(bl_residual(&packed.m, x.data(), rows * columns, rest.data(), &square, 2) == 0, "%s", kind.name);
  CHECK(std::fabs(square - error) <= 1e-4 * error + 1e-12, "%s: %g, not %g", kind.name, square, error);
  for (size_t i = 0; i < x.size(); ++i) CHECK(rest[i] == x[i] - values[i], "%s: rest %zu", kind.name, i);
  for (const int32_t dtype : {BL_BF16, BL_F16}) {
    std::vector<uint16_t> narrow(x.size());
    CHECK(bl_dequantize(&packed.m, nullptr, rows, narrow.data(), rows * columns * 2, dtype, 2) == 0, "%s", kind.name);
  }
  if (rows == 0) return;
  const int64_t picked[] = {rows - 1, 0};
  std::vector<float> some(static_cast<size_t>(2 * columns));
  CHECK(bl_dequantize(&packed.m, picked, 2, some.data(), 2 * columns * 4, BL_F32, 1) == 0, "%s", kind.name);
  for (size_t j = 0; j < static_cast<size_t>(columns); ++j)
    CHECK(some[j] == values[static_cast<size_t>((rows - 1) * columns) + j], "%s: row %zu", kind.name, j);
}

void refusals() {
  Random random(1);
  Packed packed(kinds()[0], 4, 64);
  packed.encode(random);
  float out[256];
  double square;
  const int64_t wrong[] = {4}, negative[] = {-1};
  CHECK(bl_dequantize(&packed.m, wrong, 1, out, 256, BL_F32, 1) == 1, "a row too many");
  CHECK(bl_dequantize(&packed.m, negative, 1, out, 256, BL_F32, 1) == 1, "a negative row");
  CHECK(bl_dequantize(&packed.m, nullptr, 4, out, 1000, BL_F32, 1) == -1, "too little output");
  CHECK(bl_residual(&packed.m, out, 255, out, &square, 1) == -1, "too few values");
  CHECK(bl_encode(out, 255, &packed.m, BL_LARGEST, nullptr, 1) == -1, "too few values");
  out[255] = NAN;
  CHECK(bl_encode(out, 256, &packed.m, BL_LARGEST, nullptr, 1) == 1, "NaN");
  out[255] = 0;
  CHECK(bl_encode_trellis(out, nullptr, 4, 64, 2, packed.codes.get(), 63, nullptr, 1) == -1, "a byte too few");
  CHECK(bl_encode_trellis(out, nullptr, 4, 64, 5, packed.codes.get(), 160, nullptr, 1) == -1, "five bits");
  packed.m.codes_bytes -= 1;
  CHECK(bl_check(&packed.m) == -1 && bl_error()[0] != '\0', "a byte too few");
}

}  // namespace

void test_codes() {
  for (const Kind& kind : kinds())
    for (const auto& [rows, columns] : SIZES) round_trip(kind, rows, columns);
  refusals();
}
