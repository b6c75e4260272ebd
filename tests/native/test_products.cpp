// packed_linear, arrange and multi_lora against sums over dequantized rows, at odd sizes, within their memory.
#include "packed.hpp"

namespace {

std::vector<float> random_values(Random& random, int64_t count) {
  std::vector<float> out(static_cast<size_t>(count));
  for (float& v : out) v = random.value();
  return out;
}

// out[r, o] = sum_i x[r, i] * w[o, i]
std::vector<double> product(const std::vector<float>& x, const std::vector<float>& w, int64_t rows, int64_t out, int64_t in) {
  std::vector<double> y(static_cast<size_t>(rows * out));
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t o = 0; o < out; ++o)
      for (int64_t i = 0; i < in; ++i)
        y[static_cast<size_t>(r * out + o)] +=
            static_cast<double>(x[static_cast<size_t>(r * in + i)]) * static_cast<double>(w[static_cast<size_t>(o * in + i)]);
  return y;
}

void near(const std::vector<float>& found, const std::vector<double>& exact, double slack, const char* name) {
  for (size_t i = 0; i < exact.size(); ++i)
    CHECK(std::fabs(static_cast<double>(found[i]) - exact[i]) <= slack, "%s: %g, not %g", name, static_cast<double>(found[i]), exact[i]);
}

void linear(const Kind& kind, int64_t rows, int64_t out, int64_t in) {
  Random random(static_cast<uint64_t>(rows + out * 100 + in));
  Packed weight(kind, out, in);
  weight.encode(random);
  if (bl_multiplies(&weight.m) != 1) return;
  const std::vector<float> x = random_values(random, rows * in), values = weight.decoded();
  const std::vector<double> exact = product(x, values, rows, out, in);
  const bl_input input{x.data(), rows, in, in, BL_F32};
  const auto multiplied = [&] {
    std::vector<float> y(static_cast<size_t>(rows * out), NAN);
    const bl_product job{&weight.m, nullptr, nullptr, y.data(), out, BL_F32};
    CHECK(bl_packed_linear(&input, &job, 1, 0, 2) == 0, "%s", kind.name);
    return y;
  };
  const double slack = 1e-5 * static_cast<double>(in) + 1e-4;
  near(multiplied(), exact, slack, kind.name);
  const std::vector<uint8_t> before(weight.codes.get(), weight.codes.get() + weight.m.codes_bytes);
  const bool halves = (weight.m.flags & (BL_DQ | BL_TENSOR)) == 0;
  void* scales = halves && weight.m.scales_bytes > 0 ? weight.scales.get() : nullptr;
  if (!halves && out > 1)
    CHECK(bl_arrange(&weight.m, weight.codes.get(), weight.scales.get(), 0, 1) == -1, "%s", kind.name);
  if (bl_arrange(&weight.m, weight.codes.get(), scales, 0, 2) != 0) return;
  weight.m.flags |= BL_ARRANGED;
  near(multiplied(), exact, slack, kind.name);
  CHECK(bl_arrange(&weight.m, weight.codes.get(), scales, 1, 2) == 0, "%s back", kind.name);
  for (size_t i = 0; i < before.size(); ++i) CHECK(before[i] == weight.codes[i], "%s there and back", kind.name);
}

void lora(const Kind& kind, int64_t rank, int64_t out, int64_t in) {
  if (kind.columns) return;  // refused
  Random random(static_cast<uint64_t>(rank * 7 + out + in));
  Packed a(kind, rank, in), bt(kind, rank, out);
  a.encode(random), bt.encode(random);
  const std::vector<float> x = random_values(random, 3 * in), va = a.decoded(), vb = bt.decoded();
  bl_block block{{rank, in, &a.m, nullptr, 0, BL_F32}, {rank, out, &bt.m, nullptr, 0, BL_F32}, 0.5f};
  const bl_blocks own[] = {{1, &block}, {0, nullptr}};
  const int64_t begin[] = {0, 2, 3};
  const int32_t listed[] = {2, 0, 1};
  const bl_segments segments{2, 1, begin, listed};
  std::vector<float> y(static_cast<size_t>(3 * out), 1.0f), z = y;
  // the second takes its block for all rows, too, as the start of a base
  const bl_lora jobs[] = {{out, {0, nullptr}, own, y.data(), out, BL_F32, 1}, {out, {1, &block}, own, z.data(), out, BL_F32, 0}};
  CHECK(bl_multi_lora(x.data(), BL_F32, 3, in, in, &segments, jobs, 2, 2) == 0, "%s", kind.name);
  for (int64_t r = 0; r < 3; ++r)
    for (int64_t o = 0; o < out; ++o) {
      double sum = 0;
      for (int64_t k = 0; k < rank; ++k)
        for (int64_t i = 0; i < in; ++i)
          sum += 0.5 * static_cast<double>(x[static_cast<size_t>(r * in + i)]) * static_cast<double>(va[static_cast<size_t>(k * in + i)]) *
                 static_cast<double>(vb[static_cast<size_t>(k * out + o)]);
      const double first = static_cast<double>(y[static_cast<size_t>(r * out + o)]), second = static_cast<double>(z[static_cast<size_t>(r * out + o)]);
      const double wanted[] = {1 + (r != 1 ? sum : 0), sum + (r != 1 ? sum : 0)}, slack = 2e-4 * static_cast<double>(in);
      CHECK(std::fabs(first - wanted[0]) <= slack, "%s: row %lld, %g, not %g", kind.name, (long long)r, first, wanted[0]);
      CHECK(std::fabs(second - wanted[1]) <= slack, "%s: row %lld and a start, %g, not %g", kind.name, (long long)r, second, wanted[1]);
    }
}

void dense(int64_t rows, int64_t outputs, int64_t columns) {
  Random random(static_cast<uint64_t>(rows + 31 * outputs + columns));
  const std::vector<float> x = random_values(random, rows * columns), weight = random_values(random, outputs * columns);
  std::vector<float> out(static_cast<size_t>(rows * outputs));
  CHECK(bl_dense_linear(x.data(), rows, columns, weight.data(), outputs, out.data(), 2) == 0, "a plain product");
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t o = 0; o < outputs; ++o) {
      double sum = 0;
      for (int64_t i = 0; i < columns; ++i)
        sum += static_cast<double>(x[static_cast<size_t>(r * columns + i)]) * static_cast<double>(weight[static_cast<size_t>(o * columns + i)]);
      const double found = static_cast<double>(out[static_cast<size_t>(r * outputs + o)]);
      CHECK(std::fabs(found - sum) <= 1e-5 * static_cast<double>(columns), "row %lld: %g, not %g", (long long)r, found, sum);
    }
}

}  // namespace

void test_products() {
  for (const int64_t rows : {0, 1, 3, 4, 9})
    for (const int64_t outputs : {0, 1, 6, 13, 900}) dense(rows, outputs, 16), dense(rows, outputs, 320);
  float one[16] = {};
  CHECK(bl_dense_linear(one, 1, 15, one, 1, one, 1) == -1, "columns that 16 does not divide");
  CHECK(bl_dense_linear(nullptr, 1, 16, one, 1, one, 1) == -1, "no input");
  const int64_t sizes[][3] = {{1, 64, 64}, {1, 130, 576}, {4, 65, 127}, {7, 3, 1}, {33, 70, 200}, {2, 0, 8}, {0, 5, 8}, {1, 2200, 96}, {3, 150, 320}, {9, 330, 640}, {6, 2200, 64}};
  for (const Kind& kind : kinds()) {
    for (const auto& [rows, out, in] : sizes) linear(kind, rows, out, in);
    for (const auto& [rank, out, in] : sizes)
      if (rank > 0 && out > 0) lora(kind, rank, out, in);
  }
}

void test_codes();

int main() {
  CHECK(bl_isa() != nullptr, "no instruction set");
  test_codes();
  test_products();
  std::printf("%s: codes and products agree\n", bl_isa());
}
