// Runs every kernel of every instruction set of this machine on awkward shapes, without Python.
//
//   make sanitize    builds it with AddressSanitizer and UBSan, and runs it
//
// Buffers are exactly as long as the format says, so one element too many is an error report.
// Results are compared with plain loops in float64; the tight error bounds are in the Python tests.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "native_data.h"
#include "peftkern/dora.h"
#include "peftkern/isa.h"
#include "peftkern/lora_linear.h"
#include "peftkern/nf4_lora_linear.h"
#include "peftkern/parallel.h"

void check_low_rank_svd(Isa isa);        // low_rank_svd_test.cpp
void check_adalora(Isa isa);             // adalora_test.cpp
void check_rosa(Isa isa);                // rosa_test.cpp
void check_grouped_linear(Isa isa);      // grouped_linear_test.cpp
void check_nf4_grouped_linear(Isa isa);  // nf4_grouped_linear_test.cpp
void check_swiglu(Isa isa);              // swiglu_test.cpp
void check_gram_product(Isa isa);        // gram_product_test.cpp
void check_route();                      // route_test.cpp

namespace {

const std::vector<int64_t> kNumels = {0,    1,    2,    3,    31,    32,   33,  63,
                                      64,   65,   127,  128,  129,   255,  257, 509,
                                      1024, 4095, 4096, 4097, 12289, 70001};
const std::vector<int64_t> kBlocksizes = {32, 64, 128, 256, 512, 1024, 2048, 4096};

void check_dequantize(Isa isa, const Weight& w) {
  const int64_t numel = w.view.numel;
  const int threads = static_cast<int>(pick({1, 2, 3}));
  for (DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    Values out(dtype, numel, static_cast<int64_t>(rng() % 3));
    nf4_dequantize(isa, threads, w.view, out.data(), dtype, numel, rng() % 2);
    for (int64_t i = 0; i < numel; ++i) {
      const float exact = w.at(i);
      const float wanted = dtype == DType::kFloat32 ? exact : from_bf16(to_bf16(exact));
      if (out.at(i) != wanted && !(std::isnan(exact) && std::isnan(out.at(i)))) {
        fail(std::string(isa_name(isa)) + " dequantize: wrong value of format " +
             std::to_string(static_cast<int>(w.view.format)) + " at " + std::to_string(i));
      }
    }
  }
  Buffer<uint16_t> half(numel);
  nf4_dequantize(isa, threads, w.view, half.data(), DType::kFloat16, numel, false);
}

void check_dequantize(Isa isa) {
  for (int64_t numel : kNumels) {
    for (int64_t blocksize : kBlocksizes) {
      const Format format = rng() % 2 ? Format::kNF4 : Format::kFP4;
      check_dequantize(isa, Weight(format, numel, blocksize, rng() % 2, pick({1, 3, 256})));
    }
    for (const Blocks& blocks : {Blocks{Format::kMXFP4, 32}, Blocks{Format::kNVFP4, 16},
                                 Blocks{Format::kINT4, pick({32, 64, 128, 256})}}) {
      check_dequantize(isa, Weight(blocks.format, blocks.columns(numel), blocks.size, false, 0,
                                   Weight::Scales::kAny));
    }
  }
}

// Quantize, then dequantize: each value is within half the widest step (0.152 absmax) of itself.
void check_quantize(Isa isa) {
  for (int64_t numel : kNumels) {
    for (int64_t blocksize : kBlocksizes) {
      const DType dtype = rng() % 2 ? DType::kFloat32 : DType::kBFloat16;
      Values src(dtype, numel, static_cast<int64_t>(rng() % 3));
      src.randomize();
      const int64_t blocks = (numel + blocksize - 1) / blocksize;
      Buffer<uint8_t> packed((numel + 1) / 2);
      Buffer<float> absmax(blocks);
      nf4_quantize(isa, 2, src.data(), dtype, numel, blocksize, packed.data(), packed.size(),
                   absmax.data(), blocks);
      for (int64_t i = 0; i < numel; ++i) {
        const int code = i % 2 ? packed[i / 2] & 15 : packed[i / 2] >> 4;
        const float scale = absmax[i / blocksize];
        if (!(std::fabs(src.at(i) - kNF4Code[code] * scale) <= 0.153f * scale)) {
          fail(std::string(isa_name(isa)) + " quantize: value too far from its code");
        }
      }
    }
  }
}

void check_quantize_absmax() {
  Buffer<float> code(256);
  for (int i = 0; i < 256; ++i) code[i] = (i - 128) / 128.0f;
  for (int64_t n : {0, 1, 2, 255, 256, 257, 1000}) {
    const int64_t groups = (n + 255) / 256;
    Buffer<float> absmax(n), nested_absmax(groups);
    Buffer<uint8_t> q(n);
    for (int64_t i = 0; i < n; ++i) absmax[i] = std::fabs(uniform());
    nf4_quantize_absmax(2, absmax.data(), n, 0.5f, code.data(), 256, q.data(), nested_absmax.data(),
                        groups);
    for (int64_t i = 0; i < n; ++i) {
      const float scale = nested_absmax[i / 256];
      if (!(std::fabs(code[q[i]] * scale + 0.5f - absmax[i]) <= scale / 127)) {
        fail("quantize_absmax: value too far from its code");
      }
    }
  }
}

struct Shape {
  int64_t M, N, K, r;
};

std::string describe(Isa isa, const char* what, const Shape& c, DType dtype) {
  return std::string(isa_name(isa)) + " " + what + " M=" + std::to_string(c.M) +
         " N=" + std::to_string(c.N) + " K=" + std::to_string(c.K) + " r=" + std::to_string(c.r) +
         (dtype == DType::kFloat32 ? " float32" : " bfloat16");
}

// Forward: out[M, N] = in[M, K] W^T + s factor^T + bias. Backward: out[M, K] = in[M, N] W + s
// factor.
void check_linear(Isa isa, Shape c, const Blocks& blocks, DType dtype, bool backward) {
  c.K = blocks.columns(c.K);
  const Weight w(blocks.format, c.N * c.K, blocks.size, blocks.nests() && rng() % 2);
  const int64_t inner = backward ? c.N : c.K, outer = backward ? c.K : c.N;
  const int64_t shift = static_cast<int64_t>(rng() % 3);
  Values in(dtype, c.M * inner, shift), out(dtype, c.M * outer, shift);
  Values s(DType::kFloat32, c.M * c.r), factor(DType::kFloat32, outer * c.r);
  Values bias(DType::kFloat32, outer);
  for (Values* values : {&in, &s, &factor, &bias}) values->randomize();
  const bool with_bias = !backward && rng() % 2;

  NF4LinearArgs args;
  args.M = c.M, args.N = c.N, args.K = c.K, args.r = c.r;
  args.in = in.data(), args.out = out.data(), args.dtype = dtype, args.w = w.view;
  args.s = c.r ? static_cast<float*>(s.data()) : nullptr;
  args.factor = c.r ? static_cast<float*>(factor.data()) : nullptr;
  args.bias = with_bias ? static_cast<float*>(bias.data()) : nullptr;
  args.scaling = 0.5f;
  args.threads = static_cast<int>(pick({1, 2, 3}));
  args.few_rows = pick({0, 8, 1 << 20});
  (backward ? nf4_lora_linear_backward : nf4_lora_linear_forward)(isa, args);

  std::vector<double> weight(static_cast<size_t>(c.N * c.K));
  for (int64_t i = 0; i < c.N * c.K; ++i) weight[i] = w.at(i);
  for (int64_t m = 0; m < c.M; ++m) {
    for (int64_t o = 0; o < outer; ++o) {
      Sum sum;
      sum += with_bias ? bias.at(o) : 0.0;
      for (int64_t i = 0; i < inner; ++i) {
        sum += in.at(m * inner + i) * weight[backward ? i * c.K + o : o * c.K + i];
      }
      for (int64_t j = 0; j < c.r; ++j) {
        sum += 0.5 * s.at(m * c.r + j) * factor.at(backward ? j * c.K + o : o * c.r + j);
      }
      const double bound =
          dtype == DType::kFloat32
              ? 1e-5 * sum.size
              : 0.004 * (std::fabs(sum.value) + sum.size);  // y, and each weight, rounded to bf16
      if (!(std::fabs(out.at(m * outer + o) - sum.value) <= bound + 1e-30)) {
        fail(describe(isa, backward ? "backward" : "forward", c, dtype) + ", format " +
             std::to_string(static_cast<int>(blocks.format)) + " block size " +
             std::to_string(blocks.size) + ": row " + std::to_string(m) + " column " +
             std::to_string(o));
      }
    }
  }
}

// The adapter's gradients and dx in one call are the bits of the products one after the other.
void check_backward(Isa isa, const Shape& c, DType dtype) {
  const Weight w(c.N * c.K, pick({32, 64, 256}), rng() % 2);
  const bool dropout = rng() % 2;
  Values dy(dtype, c.M * c.N), x(dtype, c.M * c.K), got(dtype, c.M * c.K), dx(dtype, c.M * c.K);
  Values a(DType::kFloat32, c.r * c.K), b(DType::kFloat32, c.r * c.N),
      s(DType::kFloat32, c.M * c.r);
  for (Values* values : {&dy, &x, &a, &b, &s}) values->randomize();
  Buffer<uint8_t> keep(c.M * c.K);
  for (int64_t i = 0; i < keep.size(); ++i) keep[i] = rng() % 4 != 0;
  Buffer<float> ds(c.M * c.r), da(c.r * c.K), db(c.N * c.r), ds2(c.M * c.r), da2(c.r * c.K),
      db2(c.r * c.N);

  LoraBackwardArgs gradients;
  gradients.M = c.M, gradients.N = c.N, gradients.K = c.K, gradients.r = c.r;
  gradients.dy = dy.data(), gradients.dy_dtype = gradients.x_dtype = dtype, gradients.x = x.data();
  gradients.b = static_cast<float*>(b.data());
  gradients.s = static_cast<float*>(s.data()), gradients.scaling = 0.5f;
  gradients.keep = dropout ? keep.data() : nullptr, gradients.keep_scale = dropout ? 1.25f : 1.0f;
  gradients.ds = ds.data(), gradients.da = da.data(), gradients.db = db.data();
  gradients.threads = 2;
  NF4LinearArgs args;
  args.M = c.M, args.N = c.N, args.K = c.K, args.r = c.r, args.w = w.view, args.dtype = dtype;
  args.in = dy.data(), args.out = got.data(), args.factor = static_cast<float*>(a.data());
  args.s = ds.data(), args.gradients = &gradients, args.threads = 2;
  nf4_lora_linear_backward(isa, args);

  LoraShrinkArgs shrink;
  shrink.M = c.M, shrink.K = c.N, shrink.r = c.r, shrink.dtype = dtype, shrink.scale = 0.5f;
  shrink.x = dy.data(), shrink.a = gradients.b, shrink.s = ds2.data();
  lora_shrink(isa, shrink);
  LoraOuterArgs outer;
  outer.M = c.M, outer.K = c.K, outer.r = c.r, outer.dtype = dtype;
  outer.scale = gradients.keep_scale, outer.keep = gradients.keep;
  outer.s = ds2.data(), outer.x = x.data(), outer.g = da2.data();
  lora_outer(isa, outer);
  outer.K = c.N, outer.scale = 0.5f, outer.keep = nullptr;
  outer.s = gradients.s, outer.x = dy.data(), outer.g = db2.data();
  lora_outer(isa, outer);
  args.gradients = nullptr, args.out = dx.data(), args.s = ds2.data();
  args.r = dropout ? 0 : c.r;
  nf4_lora_linear_backward(isa, args);
  LoraExpandArgs expand;
  expand.M = c.M, expand.K = c.K, expand.r = c.r, expand.dtype = dtype;
  expand.scale = gradients.keep_scale, expand.keep = gradients.keep;
  expand.s = ds2.data(), expand.a = args.factor, expand.y = dx.data();
  if (dropout) lora_expand(isa, expand);

  bool same = true;
  for (int64_t i = 0; i < ds.size(); ++i) same &= ds[i] == ds2[i];
  for (int64_t i = 0; i < da.size(); ++i) same &= da[i] == da2[i];
  for (int64_t i = 0; i < db.size(); ++i) same &= db[i] == db2[i % c.r * c.N + i / c.r];
  for (int64_t i = 0; i < c.M * c.K; ++i) same &= got.at(i) == dx.at(i);
  if (!same) fail(describe(isa, "backward in one call", c, dtype));
}

void check_linears(Isa isa) {
  std::vector<Shape> shapes = {{129, 257, 515, 16}, {64, 256, 1024, 8}, {300, 33, 4100, 0},
                               {1, 1000, 1000, 16}, {17, 4097, 64, 3},  {513, 40, 130, 4},
                               {1025, 33, 70, 3},   {2, 3, 8191, 1}};
  for (int i = 0; i < 250; ++i) {
    shapes.push_back({pick({0, 1, 2, 3, 5, 7, 8, 15, 16, 17, 33, 64, 65}),
                      pick({1, 2, 7, 15, 16, 17, 31, 64, 65, 130}),
                      pick({1, 2, 3, 31, 32, 33, 63, 64, 65, 100, 127, 128, 192, 257, 320}),
                      pick({0, 0, 1, 2, 3, 8, 15, 16, 17, 33})});
  }
  for (const Shape& shape : shapes) {
    for (DType dtype : {DType::kFloat32, DType::kBFloat16}) {
      for (bool backward : {false, true}) {
        check_linear(isa, shape, random_blocks(), dtype, backward);
      }
      if (shape.r > 0 && rng() % 3 == 0) check_backward(isa, shape, dtype);
    }
  }
}

// The three skinny products against float64; `keep` on every other call.
void check_product(Isa isa, const char* name, int64_t M, int64_t K, int64_t r, DType dtype) {
  Values x(dtype, M * K, static_cast<int64_t>(rng() % 3)), s(DType::kFloat32, M * r),
      a(DType::kFloat32, r * K);
  x.randomize(), s.randomize(), a.randomize();
  Buffer<uint8_t> keep(M * K);
  for (int64_t i = 0; i < M * K; ++i) keep[i] = rng() % 4 != 0;
  const bool masked = rng() % 2;
  const auto kept = [&](int64_t i) { return masked && !keep[i] ? 0.0 : 1.0; };
  const float scale = 0.75f;

  std::vector<double> before;  // of the operand that is written
  const auto fill = [](LoraArgs& args, auto... values) {
    std::tie(args.M, args.K, args.r, args.dtype, args.scale, args.keep) =
        std::make_tuple(values...);
    args.threads = 2;
  };
  const uint8_t* mask = masked ? keep.data() : nullptr;
  const std::string product = name;
  if (product == "shrink") {
    LoraShrinkArgs args;
    fill(args, M, K, r, dtype, scale, mask);
    args.x = x.data(), args.a = static_cast<float*>(a.data());
    args.s = static_cast<float*>(s.data());
    lora_shrink(isa, args);
  } else if (product == "expand") {
    for (int64_t i = 0; i < M * K; ++i) before.push_back(x.at(i));
    LoraExpandArgs args;
    fill(args, M, K, r, dtype, scale, mask);
    args.s = static_cast<float*>(s.data()), args.a = static_cast<float*>(a.data());
    args.y = x.data();
    lora_expand(isa, args);
  } else {
    LoraOuterArgs args;
    fill(args, M, K, r, dtype, scale, mask);
    args.s = static_cast<float*>(s.data()), args.x = x.data();
    args.g = static_cast<float*>(a.data());
    lora_outer(isa, args);
  }
  const auto check = [&](double got, const Sum& sum, int64_t i, double rounding = 0.0) {
    const double bound = 1e-5 * sum.size + rounding * std::fabs(sum.value) + 1e-30;
    if (!(std::fabs(got - sum.value) <= bound)) {
      fail(describe(isa, name, {M, 0, K, r}, dtype) + ": element " + std::to_string(i));
    }
  };
  const auto masked_x = [&](int64_t e) { return scale * kept(e) * x.at(e); };
  for (int64_t i = 0; product == "shrink" && i < M * r; ++i) {
    Sum sum;
    for (int64_t k = 0; k < K; ++k) sum += masked_x(i / r * K + k) * a.at(i % r * K + k);
    check(s.at(i), sum, i);
  }
  for (int64_t i = 0; product == "expand" && i < M * K; ++i) {
    Sum sum;
    sum += before[i];
    for (int64_t j = 0; j < r; ++j) {
      sum += scale * kept(i) * s.at(i / K * r + j) * a.at(j * K + i % K);
    }
    check(x.at(i), sum, i, dtype == DType::kFloat32 ? 0.0 : 0.004);
  }
  for (int64_t i = 0; product == "outer" && i < r * K; ++i) {
    Sum sum;
    for (int64_t m = 0; m < M; ++m) sum += masked_x(m * K + i % K) * s.at(m * r + i / K);
    check(a.at(i), sum, i);
  }
}

void check_products(Isa isa) {
  for (const char* name : {"shrink", "expand", "outer"}) {
    for (int64_t M : {0, 1, 3, 4, 7, 8, 17, 65, 130}) {
      for (int64_t K : {1, 15, 16, 17, 33, 100, 129, 257, 1023}) {
        for (int64_t r : {1, 3, 4, 8, 9, 16, 33}) {
          for (DType dtype : {DType::kFloat32, DType::kBFloat16}) {
            check_product(isa, name, M, K, r, dtype);
          }
        }
      }
    }
  }
}

// Row norms of a dense weight, or of a 4-bit one that is decoded to `dtype`, against float64.
void check_dora_norm(Isa isa, int64_t N, int64_t K, int64_t r, DType dtype, bool nf4) {
  const Blocks blocks = random_blocks();
  if (nf4) K = blocks.columns(K);
  Values dense(dtype, nf4 ? 0 : N * K, static_cast<int64_t>(rng() % 3));
  Values a(DType::kFloat32, r * K), b(DType::kFloat32, N * r), norm(DType::kFloat32, N);
  dense.randomize(), a.randomize(), b.randomize();
  const Weight w(blocks.format, nf4 ? N * K : 0, blocks.size, blocks.nests() && rng() % 2);
  DoraNormArgs args;
  args.N = N, args.K = K, args.r = r, args.dtype = dtype, args.threads = 2;
  nf4 ? void(args.w = w.view) : void(args.weight = dense.data());
  args.a = static_cast<float*>(a.data()), args.b = static_cast<float*>(b.data());
  args.norm = static_cast<float*>(norm.data());
  dora_norm(isa, args);
  for (int64_t n = 0; n < N; ++n) {
    double sum = 0.0, size = 0.0;
    for (int64_t k = 0; k < K; ++k) {
      float value = nf4 ? w.at(n * K + k) : dense.at(n * K + k);
      if (nf4 && dtype == DType::kBFloat16) value = from_bf16(to_bf16(value));
      Sum total;
      total += value;
      for (int64_t j = 0; j < r; ++j) total += double{b.at(n * r + j)} * a.at(j * K + k);
      sum += total.value * total.value, size += total.size * total.size;
    }
    if (!(std::fabs(norm.at(n) - std::sqrt(sum)) <= 1e-5 * std::sqrt(size))) {
      fail(describe(isa, nf4 ? "nf4 dora norm" : "dora norm", {0, N, K, r}, dtype));
    }
  }
}

void check_dora_norms(Isa isa) {
  for (int64_t N : {0, 1, 7, 8, 16, 33}) {
    for (int64_t K : {1, 15, 17, 129, 257, 513}) {
      for (int64_t r : {1, 3, 16}) {
        for (DType dtype : {DType::kFloat32, DType::kBFloat16}) {
          for (bool nf4 : {false, true}) check_dora_norm(isa, N, K, r, dtype, nf4);
        }
      }
    }
  }
  Values values(DType::kFloat32, 64);
  float* x = static_cast<float*>(values.data());
  DoraNormArgs good;
  good.N = 4, good.K = 4, good.r = 1, good.weight = good.a = good.b = x, good.norm = x;
  const Damages<DoraNormArgs> damages = {
      [](auto& d) { d.N = -1; },
      [](auto& d) { d.N = int64_t{1} << 40, d.K = int64_t{1} << 40; },
      [](auto& d) { d.r = -1; },
      [](auto& d) { d.weight = nullptr; },  // and the NF4 weight is empty
      [](auto& d) { d.a = nullptr; },
      [](auto& d) { d.b = nullptr; },
      [](auto& d) { d.norm = nullptr; },
      [](auto& d) { d.threads = 0; },
  };
  check_refusals("dora_norm", good, damages, [&](const auto& args) { dora_norm(isa, args); });
}

// States whose sizes lie below what their buffers hold: refused, or run within bounds.
void check_malformed_states(Isa isa) {
  std::vector<int64_t> absurd = {-1, 0, 1, 2, 31, 32, 48, 64, 65, 4096, 8192, 1 << 20};
  absurd.insert(absurd.end(), {int64_t{1} << 31, int64_t{1} << 60, INT64_MAX, INT64_MIN});
  const auto shrink = [](int64_t& size) {
    size = size > 0 && rng() % 2 ? size - 1 - rng() % size : -size;
  };
  const Damages<NF4View> damages = {
      [&](auto& w) { w.numel = pick(absurd); },
      [&](auto& w) { w.blocksize = pick(absurd); },
      [&](auto& w) { w.nested_blocksize = pick(absurd); },
      [&](auto& w) { shrink(w.packed_bytes); },
      [&](auto& w) { shrink(w.absmax_len); },
      [&](auto& w) { shrink(w.nested_absmax_len); },
      [](auto& w) { w.packed = nullptr; },
      [](auto& w) { w.absmax = nullptr; },
      [](auto& w) { w.nested_absmax = nullptr; },
      [](auto& w) { w.nested_code = nullptr; },
      [](auto& w) { w.nested_offset = nullptr; },
      [](auto& w) { w.format = static_cast<Format>(pick({-1, 5, 1 << 20})); },
      [](auto& w) { w.nested |= w.low_first(); },
      [](auto& w) { w.tensor_scale = nullptr; },
      [&](auto& w) { shrink(w.aux_len); },
  };
  int64_t refused = 0, ran = 0;
  for (int i = 0; i < 4000; ++i) {  // what refuses is shared by all instruction sets
    const Blocks blocks = random_blocks();
    const Weight good(blocks.format, blocks.columns(pick({1, 63, 64, 65, 300, 4097})), blocks.size,
                      blocks.nests() && rng() % 2, pick({1, 2, 256}));
    NF4View w = good.view;
    for (uint32_t n = rng() % 3; n-- > 0;) damages[rng() % damages.size()](w);
    const int64_t room = w.numel >= 0 && w.numel <= 1 << 20 ? w.numel : 0;
    Buffer<float> out(room), y(1);
    rejected([&] { nf4_dequantize(isa, 1, w, out.data(), DType::kFloat32, w.numel, false); })
        ? ++refused
        : ++ran;
    NF4LinearArgs args;  // [1, numel] weight
    args.M = 1, args.N = 1, args.K = w.numel, args.in = out.data(), args.out = y.data();
    args.w = w;
    rejected([&] { nf4_lora_linear_forward(isa, args); });
  }
  if (refused < 200 || ran < 200) fail("the damaged states no longer exercise both outcomes");
}

void check_malformed_arguments(Isa isa) {
  const Weight w(64 * 64, 64, false);
  Buffer<float> x(64), y(64), s(4), factor(64 * 4);
  NF4LinearArgs good;
  good.M = 1, good.N = 64, good.K = 64, good.r = 4, good.w = w.view;
  good.in = x.data(), good.out = y.data(), good.s = s.data(), good.factor = factor.data();
  const Damages<NF4LinearArgs> damages = {
      [](auto& a) { a.M = -1; },
      [](auto& a) { a.N = 65; },
      [](auto& a) { a.K = -64, a.N = -64; },
      [](auto& a) { a.N = int64_t{1} << 32, a.K = (int64_t{1} << 32) + 1; },
      [](auto& a) { a.M = int64_t{1} << 60; },
      [](auto& a) { a.r = -1; },
      [](auto& a) { a.in = nullptr; },
      [](auto& a) { a.out = nullptr; },
      [](auto& a) { a.s = nullptr; },
      [](auto& a) { a.factor = nullptr; },
      [](auto& a) { a.threads = 0; },
      [](auto& a) { a.dtype = DType::kFloat16; },
  };
  for (auto* entry : {nf4_lora_linear_forward, nf4_lora_linear_backward}) {
    check_refusals("nf4_lora_linear", good, damages, [&](const auto& args) { entry(isa, args); });
  }
  for (int code : {-1, kIsaCount, 1 << 20, INT32_MIN}) {
    if (!rejected([&] { nf4_lora_linear_forward(Isa{code}, good); })) fail("isa was accepted");
  }
}

}  // namespace

int main() {
  check_quantize_absmax();
  check_route();
  for (int i = 0; i < kIsaCount; ++i) {
    if (!isa_available(Isa{i})) continue;
    const Isa isa{i};
    check_dequantize(isa);
    check_quantize(isa);
    check_linears(isa);
    check_products(isa);
    check_dora_norms(isa);
    check_low_rank_svd(isa);
    check_adalora(isa);
    check_rosa(isa);
    check_grouped_linear(isa);
    check_nf4_grouped_linear(isa);
    check_swiglu(isa);
    check_gram_product(isa);
    check_malformed_states(isa);
    check_malformed_arguments(isa);
    std::printf("native test: %s passed\n", isa_name(isa));
  }
  set_fork_child();
  check_linear(Isa::kScalar, {33, 65, 130, 4}, {Format::kNF4, 64}, DType::kFloat32, false);
  std::printf("native test: all passed\n");
  return 0;
}
