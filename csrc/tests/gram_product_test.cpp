// The products of block Lanczos on exactly sized buffers, against float64.
#include "peftkern/gram_product.h"

#include <cmath>
#include <string>

#include "native_data.h"

namespace {

constexpr double kSmallest = 0x1p-126;  // products of tiny scales are below it

void expect(const char* what, Isa isa, double got, const Sum& right) {
  if (std::fabs(got - right.value) <= 1e-6 * right.size + kSmallest) return;
  fail(std::string(isa_name(isa)) + " gram_product " + what + ": got " + std::to_string(got) +
       ", expected " + std::to_string(right.value));
}

void check_products(Isa isa, bool quantized) {
  const Blocks blocks = random_blocks();
  const int64_t m = pick({0, 1, 3, 4, 63, 64, 65, 131}), width = pick({0, 1, 2, 3, 5, 8, 13, 24});
  int64_t n = pick({0, 1, 15, 16, 17, 31, 32, 33, 96, 1100});
  if (quantized) n = blocks.columns(n);
  const DType dtype = quantized || rng() % 2 ? DType::kFloat32 : DType::kBFloat16;
  Values dense(dtype, quantized ? 0 : m * n, 1);
  dense.randomize();
  Weight w(blocks.format, m * n, blocks.size, blocks.nests() && rng() % 2);
  const auto weight = [&](int64_t i) { return quantized ? w.at(i) : dense.at(i); };
  Buffer<float> x(width * n, 1), y(width * m, 1), z(width * n, 1), squares(m, 1);
  for (int64_t i = 0; i < x.size(); ++i) x[i] = uniform();
  GramProductArgs args;
  args.m = m, args.n = n, args.width = width, args.dtype = dtype;
  if (quantized) args.w = w.view;
  if (!quantized) args.weight = dense.data();
  args.x = x.data(), args.y = y.data();
  args.z = rng() % 4 ? z.data() : nullptr;
  args.squares = rng() % 4 ? squares.data() : nullptr;
  gram_product(isa, args);
  for (int64_t c = 0; c < width; ++c) {
    for (int64_t i = 0; i < m; ++i) {
      Sum sum;
      for (int64_t j = 0; j < n; ++j) {
        sum += static_cast<double>(weight(i * n + j)) * x[c * n + j];
      }
      expect("y", isa, y[c * m + i], sum);
    }
    for (int64_t j = 0; args.z && j < n; ++j) {
      Sum sum;
      for (int64_t i = 0; i < m; ++i) {
        sum += static_cast<double>(weight(i * n + j)) * y[c * m + i];
      }
      expect("z", isa, z[c * n + j], sum);
    }
  }
  for (int64_t i = 0; args.squares && i < m; ++i) {
    Sum sum;
    for (int64_t j = 0; j < n; ++j) {
      sum += static_cast<double>(weight(i * n + j)) * weight(i * n + j);
    }
    expect("square", isa, squares[i], sum);
  }
}

void check_malformed(Isa isa) {
  Buffer<float> dense(4 * 32), x(2 * 32), y(2 * 4);
  GramProductArgs good;
  good.m = 4, good.n = 32, good.width = 2;
  good.weight = dense.data(), good.x = x.data(), good.y = y.data();
  const Damages<GramProductArgs> damages = {
      [](auto& args) { args.m = -1; },
      [](auto& args) { args.n = -1; },
      [](auto& args) { args.width = -1; },
      [](auto& args) { args.m = args.n = int64_t{1} << 32; },
      [](auto& args) { args.width = int64_t{1} << 57; },
      [](auto& args) { args.weight = nullptr; },
      [](auto& args) { args.x = nullptr; },
      [](auto& args) { args.y = nullptr; },
  };
  const auto call = [&](const auto& args) { gram_product(isa, args); };
  check_refusals("gram_product", good, damages, call);
  Weight w(4 * 32, 64, false);
  GramProductArgs other = good;
  other.weight = nullptr, other.w = w.view;
  check_refusals<GramProductArgs>(
      "gram_product", other,
      {[](auto& args) { args.m = 5; }, [](auto& args) { args.w.packed_bytes -= 1; }}, call);
}

}  // namespace

void check_gram_product(Isa isa) {
  for (int i = 0; i < 60; ++i) {
    for (bool quantized : {false, true}) check_products(isa, quantized);
  }
  check_malformed(isa);
}
