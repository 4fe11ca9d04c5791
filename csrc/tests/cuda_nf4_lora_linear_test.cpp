// csrc/cuda/nf4_lora_linear.cu against loops in float64, and against itself in other orders.
#include "peftkern/cuda_nf4_lora_linear.h"

#include <functional>
#include <stdexcept>
#include <string>

#include "cuda_test.h"
#include "intrinsics.cuh"
#include "native_data.h"

namespace {

float rounded(float x, DType dtype) {
  if (dtype == DType::kFloat32) return x;
  return dtype == DType::kBFloat16 ? to_float(from_float<BF16>(x)) : to_float(from_float<FP16>(x));
}

// Random values of one type, exactly as many, `shift` elements past 16-byte alignment.
class Tensor {
 public:
  Tensor(DType dtype, int64_t n, double size, int64_t shift = 0)
      : dtype_(dtype), bytes_(n * itemsize(dtype), shift * itemsize(dtype)) {
    for (int64_t i = 0; i < n; ++i) {
      const float x = normal() * static_cast<float>(size);
      if (dtype == DType::kFloat32) {
        std::memcpy(&bytes_[4 * i], &x, 4);
      } else {
        const uint16_t bits =
            dtype == DType::kBFloat16 ? from_float<BF16>(x).bits : from_float<FP16>(x).bits;
        std::memcpy(&bytes_[2 * i], &bits, 2);
      }
    }
  }
  void* data() { return bytes_.data(); }
  double at(int64_t i) const {
    float wide;
    uint16_t half;
    if (dtype_ == DType::kFloat32) {
      std::memcpy(&wide, bytes_.data() + 4 * i, 4);
      return wide;
    }
    std::memcpy(&half, bytes_.data() + 2 * i, 2);
    return dtype_ == DType::kBFloat16 ? to_float(BF16{half}) : to_float(FP16{half});
  }

 private:
  DType dtype_;
  Buffer<uint8_t> bytes_;
};

// A weight whose codes begin at a multiple of 8 bytes.
struct Packed {
  Packed(int64_t numel, int64_t blocksize, bool nested)
      : weight(numel, blocksize, nested, pick({1, 4, 256})), packed(numel / 2) {
    std::memcpy(packed.data(), weight.view.packed, static_cast<size_t>(packed.size()));
    weight.view.packed = packed.data();
    view = weight.view;
  }
  // The value of weight i with its code rounded to `dtype`, as the kernel has it.
  double at(int64_t i, DType dtype) const {
    const uint8_t byte = packed[i / 2];
    const float code = kNF4Code[i % 2 ? byte & 15 : byte >> 4];
    const int64_t block = i / view.blocksize;
    float absmax = 0.0f;
    load_absmax(weight.view, block, 1, &absmax);
    return double{rounded(code, dtype)} * absmax;
  }
  Weight weight;
  Buffer<uint8_t> packed;
  NF4View view;
};

struct Case {
  int64_t M, N, K, r, blocksize, splits;
  DType dtype, a_dtype, b_dtype;
  bool nested, bias;
  std::string text() const {
    std::string text = "nf4_lora_linear:";
    for (int64_t value : {M, N, K, r, blocksize, splits}) text += " " + std::to_string(value);
    return text + " dtype " + std::to_string(static_cast<int>(dtype)) + (nested ? " nested" : "");
  }
};

void near(double got, double wanted, double size, double slack, const std::string& what) {
  if (!(std::fabs(got - wanted) <= slack * std::fabs(wanted) + 2e-6 * size)) {
    cuda_test_failed(what + ": got " + std::to_string(got) + ", wanted " + std::to_string(wanted));
  }
}

void check(const Case& c) {
  Packed w(c.N * c.K, c.blocksize, c.nested);
  Tensor x(c.dtype, c.M * c.K, 1.0), bias(c.dtype, c.N, 1.0, static_cast<int64_t>(rng() % 3));
  Tensor lora_A(c.a_dtype, c.r * c.K, 0.1);
  Tensor lora_B(c.b_dtype, c.N * c.r, 0.3, static_cast<int64_t>(rng() % 3));
  const int64_t bytes = cuda_nf4_lora_linear_workspace(c.M, c.N, c.K, c.splits);
  Buffer<uint8_t> y(2 * c.M * c.N), again(2 * c.M * c.N), workspace(bytes);
  Buffer<float> s(c.M * c.r);
  CudaNF4LinearArgs args;
  args.M = c.M, args.N = c.N, args.K = c.K, args.r = c.r;
  args.x = x.data(), args.y = y.data(), args.dtype = c.dtype;
  args.w = w.view;
  args.lora_A = lora_A.data(), args.a_dtype = c.a_dtype;
  args.lora_B = lora_B.data(), args.b_dtype = c.b_dtype;
  args.bias = c.bias ? bias.data() : nullptr;
  args.scaling = 1.5f;
  args.s = s.data();
  args.workspace = workspace.data(), args.workspace_bytes = bytes;
  args.splits = c.splits;
  if (cuda_nf4_lora_linear_forward(args, nullptr)) cuda_test_failed(c.text() + ": not launched");

  const double rounding = c.dtype == DType::kBFloat16 ? 0x1p-8 : 0x1p-11;
  for (int64_t m = 0; m < c.M; ++m) {
    std::vector<double> shrunk(static_cast<size_t>(c.r));
    for (int64_t j = 0; j < c.r; ++j) {
      double sum = 0.0, size = 0.0;
      for (int64_t k = 0; k < c.K; ++k) {
        const double term = x.at(m * c.K + k) * lora_A.at(j * c.K + k);
        sum += term, size += std::fabs(term);
      }
      near(s[m * c.r + j], sum, size, 0.0, c.text() + ": s");
      shrunk[static_cast<size_t>(j)] = sum;
    }
    for (int64_t n = 0; n < c.N; ++n) {
      double sum = c.bias ? bias.at(n) : 0.0, size = std::fabs(sum);
      for (int64_t k = 0; k < c.K; ++k) {
        const double term = x.at(m * c.K + k) * w.at(n * c.K + k, c.dtype);
        sum += term, size += std::fabs(term);
      }
      for (int64_t j = 0; j < c.r; ++j) {
        const double term = 1.5 * shrunk[static_cast<size_t>(j)] * lora_B.at(n * c.r + j);
        sum += term, size += std::fabs(term);
      }
      uint16_t bits;
      std::memcpy(&bits, &y[2 * (m * c.N + n)], 2);
      const double got = c.dtype == DType::kBFloat16 ? to_float(BF16{bits}) : to_float(FP16{bits});
      near(got, sum, size, rounding, c.text() + ": y");
    }
  }
  args.y = again.data();
  for (uint32_t schedule = 1; schedule < emulation::kSchedules; ++schedule) {
    emulation::set_schedule(schedule);
    std::memset(workspace.data(), 0xff, static_cast<size_t>(bytes));
    std::memset(s.data(), 0xff, sizeof(float) * static_cast<size_t>(s.size()));
    cuda_nf4_lora_linear_forward(args, nullptr);
    if (std::memcmp(y.data(), again.data(), static_cast<size_t>(y.size()))) {
      cuda_test_failed(c.text() + ": another order of threads gives other bits");
    }
  }
  emulation::set_schedule(0);
}

void check_malformed() {
  Packed w(24 * 128, 64, true);
  Tensor x(DType::kBFloat16, 2 * 128 + 8, 1.0), adapter(DType::kFloat32, 3 * 128 + 8, 1.0);
  Buffer<uint8_t> y(2 * 2 * 24), workspace(1 << 16);
  Buffer<float> s(6);
  CudaNF4LinearArgs good;
  good.M = 2, good.N = 24, good.K = 128, good.r = 3;
  good.x = x.data(), good.y = y.data(), good.w = w.view;
  good.lora_A = adapter.data(), good.lora_B = adapter.data(), good.s = s.data();
  good.workspace = workspace.data(), good.workspace_bytes = workspace.size();
  good.splits = 2;
  const auto moved = [](const void* p, int bytes) {
    return static_cast<const void*>(static_cast<const char*>(p) + bytes);
  };
  const std::vector<std::function<void(CudaNF4LinearArgs&)>> damages = {
      [](auto& a) { a.M = -1; },
      [](auto& a) { a.M = 33; },
      [](auto& a) { a.N = 0; },
      [](auto& a) { a.N = 25; },
      [](auto& a) { a.K = 96; },
      [](auto& a) { a.K = int64_t{1} << 27; },
      [](auto& a) { a.r = 65; },
      [](auto& a) { a.r = -1; },
      [](auto& a) { a.splits = 17; },
      [](auto& a) { a.dtype = DType::kFloat32; },
      [](auto& a) { a.w.numel = 64; },
      [](auto& a) { a.w.blocksize = 32; },
      [](auto& a) { a.w.blocksize = 256; },
      [](auto& a) { a.w.packed += 4; },
      [](auto& a) { a.w.nested_offset = nullptr; },
      [](auto& a) { a.x = nullptr; },
      [&](auto& a) { a.x = moved(a.x, 2); },
      [](auto& a) { a.y = nullptr; },
      [&](auto& a) { a.lora_A = moved(a.lora_A, 4); },
      [&](auto& a) { a.lora_B = moved(a.lora_B, 2); },
      [](auto& a) { a.s = nullptr; },
      [](auto& a) { a.workspace = nullptr; },
      [](auto& a) { a.workspace_bytes = 255; },
  };
  if (cuda_nf4_lora_linear_forward(good, nullptr)) cuda_test_failed("nf4_lora_linear: good call");
  for (size_t i = 0; i < damages.size(); ++i) {
    CudaNF4LinearArgs args = good;
    damages[i](args);
    try {
      cuda_nf4_lora_linear_forward(args, nullptr);
    } catch (const std::invalid_argument&) {
      continue;
    }
    cuda_test_failed("nf4_lora_linear: malformed call " + std::to_string(i) + " was accepted");
  }
}

}  // namespace

void check_cuda_nf4_lora_linear() {
  const std::vector<int64_t> rows = {1, 2, 7, 8, 9, 15, 16, 17, 31, 32};
  for (int i = 0; i < 60; ++i) {
    const auto adapter = [] { return static_cast<DType>(rng() % 3); };
    Case c;
    c.M = rows[static_cast<size_t>(i) % rows.size()];
    c.N = pick({1, 16, 31, 33, 65, 130});
    c.blocksize = pick({64, 64, 128, 256});
    c.K = c.blocksize * pick({1, 2, 3, 5});
    c.r = pick({0, 1, 9, 16, 64});
    c.splits = pick({0, 1, 2, 5, 16});
    c.dtype = rng() % 2 ? DType::kBFloat16 : DType::kFloat16;
    c.a_dtype = adapter(), c.b_dtype = adapter();
    c.nested = rng() % 2, c.bias = rng() % 2;
    check(c);
  }
  check_malformed();
}
