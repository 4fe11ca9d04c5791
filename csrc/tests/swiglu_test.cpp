// The gate of experts on exactly sized buffers, against float64.
#include "peftkern/swiglu.h"

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "native_data.h"

namespace {

// Below this an exponential over- or underflows: sums that it is a part of are that much off.
constexpr double kSmallest = 4e-37;

bool close(double got, double right, double relative, double absolute) {
  if (std::isnan(right)) return std::isnan(got);
  if (std::isinf(right) || std::fabs(right) > std::numeric_limits<float>::max()) {
    return std::isinf(got) && (got > 0) == (right > 0);
  }
  return std::fabs(got - right) <= relative * std::fabs(right) + absolute;
}

void expect(const char* what, Isa isa, double got, double right, double relative, double absolute) {
  if (close(got, right, relative, absolute)) return;
  char values[80];
  std::snprintf(values, sizeof values, ": got %.9g, expected %.9g", got, right);
  fail(std::string(isa_name(isa)) + " swiglu " + what + values);
}

struct Gate {
  double silu, slope;
  // As float32 has it where it is not finite, and where e^-x overflows.
  explicit Gate(double x) {
    const double s = 1.0 / (1.0 + std::exp(-x));
    silu = x * s;
    slope = s * (1.0 + x * (1.0 - s));
  }
};

// Gates of every exponent, both signs, and all that float32 has beside numbers.
void check_whole_range(Isa isa) {
  std::vector<float> gates;
  for (uint32_t bits = 0; bits < 0x7f800000; bits += 0x3fff1) {
    gates.push_back(from_bits(bits));
    gates.push_back(from_bits(bits | 0x80000000));
  }
  for (int i = -1100; i <= 1100; ++i) gates.push_back(static_cast<float>(i) * 0.1f);
  for (uint32_t bits : {0x80000000u, 1u, 0x7f7fffffu, 0xff7fffffu, 0x7f800000u, 0xff800000u,
                        0x7fc00000u, 0xffc00000u}) {
    gates.push_back(from_bits(bits));
  }
  const int64_t I = static_cast<int64_t>(gates.size());
  Buffer<float> u(2 * I), w(1), a(I), da(I), du(2 * I), dw(1);
  for (int64_t i = 0; i < I; ++i) u[i] = gates[static_cast<size_t>(i)], u[I + i] = da[i] = 1.0f;
  w[0] = 1.0f;
  SwigluArgs args;
  args.R = 1, args.I = I, args.u = u.data(), args.w = w.data(), args.a = a.data();
  swiglu_forward(isa, args);
  SwigluBackwardArgs back;
  back.R = 1, back.I = I, back.u = u.data(), back.w = w.data(), back.da = da.data();
  back.du = du.data(), back.dw = dw.data();
  swiglu_backward(isa, back);
  for (int64_t i = 0; i < I; ++i) {
    const Gate right(u[i]);
    expect("of a gate", isa, a[i], right.silu, 0x1p-21, kSmallest);
    expect("gradient of up", isa, du[I + i], right.silu, 0x1p-21, kSmallest);
    // Two terms that cancel where the slope changes its sign.
    expect("gradient of a gate", isa, du[i], right.slope, 0x1p-20, 0x1p-24 + kSmallest);
  }
}

void check_rows(Isa isa, DType dtype) {
  const int64_t R = pick({0, 1, 3, 40}), I = pick({0, 1, 15, 16, 17, 100, 1030});
  Values u(dtype, 2 * R * I, 1), a(dtype, R * I, 1), da(dtype, R * I), du(dtype, 2 * R * I, 1);
  Buffer<float> w(R), dw(R);
  u.randomize();
  da.randomize();
  for (int64_t i = 0; i < R; ++i) w[i] = uniform();
  const double rounding = dtype == DType::kFloat32 ? 1e-6 : 0.004;
  SwigluArgs args;
  args.R = R, args.I = I, args.u = u.data(), args.dtype = dtype, args.w = w.data();
  args.a = a.data(), args.threads = static_cast<int>(pick({1, 2, 3}));
  swiglu_forward(isa, args);
  SwigluBackwardArgs back;
  back.R = R, back.I = I, back.u = u.data(), back.dtype = dtype, back.w = w.data();
  back.da = da.data(), back.threads = args.threads;
  const bool both = rng() % 2;
  back.du = both || rng() % 2 ? du.data() : nullptr;
  back.dw = both || !back.du ? dw.data() : nullptr;
  swiglu_backward(isa, back);
  for (int64_t i = 0; i < R; ++i) {
    Sum sum;
    for (int64_t j = 0; j < I; ++j) {
      const Gate gate(u.at(2 * I * i + j));
      const double up = u.at(2 * I * i + I + j), d = da.at(I * i + j);
      expect("value", isa, a.at(I * i + j), gate.silu * up * w[i], rounding, 1e-6);
      sum += d * gate.silu * up;
      if (!back.du) continue;
      expect("gradient", isa, du.at(2 * I * i + j), d * w[i] * up * gate.slope, rounding, 1e-6);
      expect("gradient", isa, du.at(2 * I * i + I + j), d * w[i] * gate.silu, rounding, 1e-6);
    }
    if (back.dw) expect("weight's gradient", isa, dw[i], sum.value, 0, 1e-6 * sum.size);
  }
}

template <typename Args, typename Call>
void check_sizes(const char* what, const Args& good, const Call& call) {
  const Damages<Args> damages = {
      [](auto& args) { args.R = -1; },
      [](auto& args) { args.I = -1; },
      [](auto& args) { args.R = args.I = int64_t{1} << 32; },
      [](auto& args) { args.I = int64_t{1} << 61; },
      [](auto& args) { args.u = nullptr; },
      [](auto& args) { args.w = nullptr; },
      [](auto& args) { args.threads = 0; },
  };
  check_refusals(what, good, damages, call);
}

void check_malformed(Isa isa) {
  Buffer<float> u(8), w(2), a(4);
  SwigluArgs good;
  good.R = good.I = 2, good.u = u.data(), good.w = w.data(), good.a = a.data();
  const auto forward = [&](const auto& args) { swiglu_forward(isa, args); };
  check_sizes("swiglu_forward", good, forward);
  check_refusals<SwigluArgs>("swiglu_forward", good, {[](auto& args) { args.a = nullptr; }},
                             forward);
  SwigluBackwardArgs back;
  back.R = back.I = 2, back.u = u.data(), back.w = w.data(), back.da = a.data();
  const auto backward = [&](const auto& args) { swiglu_backward(isa, args); };
  check_sizes("swiglu_backward", back, backward);
  check_refusals<SwigluBackwardArgs>("swiglu_backward", back,
                                     {[](auto& args) { args.da = nullptr; }}, backward);
}

}  // namespace

void check_swiglu(Isa isa) {
  check_whole_range(isa);
  for (int i = 0; i < 40; ++i) {
    for (DType dtype : {DType::kFloat32, DType::kBFloat16}) check_rows(isa, dtype);
  }
  check_malformed(isa);
}
