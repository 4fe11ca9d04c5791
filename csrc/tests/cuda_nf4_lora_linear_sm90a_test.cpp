// csrc/cuda/nf4_lora_linear_sm90a.cu against plain loops in double, on memory of exact size, under
// several orders of threads and blocks.
#include "peftkern/cuda_nf4_lora_linear_sm90a.h"

#include <functional>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_test.h"
#include "intrinsics.cuh"
#include "native_data.h"

namespace {

float value_of(DType dtype, uint16_t bits) {
  return dtype == DType::kBFloat16 ? to_float(BF16{bits}) : to_float(FP16{bits});
}
uint16_t bits_of(DType dtype, float x) {
  return dtype == DType::kBFloat16 ? from_float<BF16>(x).bits : from_float<FP16>(x).bits;
}

// `n` values at a multiple of 16 bytes that end where the allocation ends.
class Half {
 public:
  Half(DType dtype, int64_t n, float scale) : dtype_(dtype), bits_(n) {
    for (int64_t i = 0; i < n; ++i) bits_[i] = bits_of(dtype, scale * normal());
  }
  uint16_t* data() { return bits_.data(); }
  float at(int64_t i) const { return value_of(dtype_, bits_[i]); }

 private:
  DType dtype_;
  Buffer<uint16_t> bits_;
};

struct Case {
  int64_t M, N, K, r, blocksize, splits;
  bool nested, bias;
  DType dtype;
};

void check(const Case& c) {
  const std::string what = "nf4_lora_linear_sm90a M=" + std::to_string(c.M) +
                           " N=" + std::to_string(c.N) + " K=" + std::to_string(c.K) +
                           " r=" + std::to_string(c.r) + " splits=" + std::to_string(c.splits);
  Weight w(c.N * c.K, c.blocksize, c.nested, 4);
  Buffer<uint8_t> packed(c.N * c.K / 2);  // at a multiple of 16 bytes
  std::memcpy(packed.data(), w.view.packed, static_cast<size_t>(packed.size()));
  w.view.packed = packed.data();
  Half x(c.dtype, c.M * c.K, 1.0f), bias(c.dtype, c.N, 1.0f);
  Buffer<float> A(c.r * c.K), B(c.N * c.r), s(c.M * c.r);
  for (int64_t i = 0; i < A.size(); ++i) A[i] = normal() / 8;
  for (int64_t i = 0; i < B.size(); ++i) B[i] = normal();

  CudaNF4LinearArgs args;
  args.M = c.M, args.N = c.N, args.K = c.K, args.r = c.r;
  args.x = x.data();
  args.dtype = c.dtype;
  args.w = w.view;
  args.lora_A = A.data();
  args.lora_B = B.data();
  args.bias = c.bias ? bias.data() : nullptr;
  args.scaling = 1.5f;
  args.s = s.data();
  args.splits = c.splits;
  const int64_t bytes = cuda_nf4_lora_linear_sm90a_workspace(c.M, c.N, c.K, c.r, c.splits);
  args.workspace_bytes = bytes;

  std::vector<uint16_t> first;
  for (uint32_t schedule = 0; schedule < emulation::kSchedules; ++schedule) {
    emulation::set_schedule(schedule);
    Buffer<uint16_t> y(c.M * c.N);
    Buffer<uint8_t> workspace(bytes);
    std::memset(s.data(), 0xff, sizeof(float) * static_cast<size_t>(s.size()));
    args.y = y.data();
    args.workspace = workspace.data();
    if (cuda_nf4_lora_linear_sm90a_forward(args, nullptr))
      cuda_test_failed(what + ": not launched");
    if (schedule > 0) {
      for (int64_t i = 0; i < y.size(); ++i) {
        if (y[i] != first[static_cast<size_t>(i)]) cuda_test_failed(what + ": schedules differ");
      }
      continue;
    }
    first.assign(y.data(), y.data() + y.size());
  }
  emulation::set_schedule(0);

  const double unit = c.dtype == DType::kBFloat16 ? 0x1p-8 : 0x1p-11;
  for (int64_t m = 0; m < c.M; ++m) {
    std::vector<double> exact_s(static_cast<size_t>(c.r));
    for (int64_t j = 0; j < c.r; ++j) {
      double sum = 0.0, size = 0.0;
      for (int64_t k = 0; k < c.K; ++k) {
        const double product = double{x.at(m * c.K + k)} * double{A[j * c.K + k]};
        sum += product, size += std::fabs(product);
      }
      exact_s[static_cast<size_t>(j)] = sum;
      if (!(std::fabs(s[m * c.r + j] - sum) <= 64 * 0x1p-24 * size)) cuda_test_failed(what + ": s");
    }
    for (int64_t n = 0; n < c.N; ++n) {
      double sum = c.bias ? double{bias.at(n)} : 0.0, size = std::fabs(sum);
      for (int64_t k = 0; k < c.K; ++k) {
        const float weight = value_of(c.dtype, bits_of(c.dtype, w.at(n * c.K + k)));
        const double product = double{x.at(m * c.K + k)} * double{weight};
        sum += product, size += std::fabs(product);
      }
      for (int64_t j = 0; j < c.r; ++j) {
        const double product = 1.5 * exact_s[static_cast<size_t>(j)] * double{B[n * c.r + j]};
        sum += product, size += std::fabs(product);
      }
      const double got = value_of(c.dtype, first[static_cast<size_t>(m * c.N + n)]);
      const double bound = unit * std::fabs(sum) + 0x1p-16 * size;
      if (!(std::fabs(got - sum) <= bound)) {
        cuda_test_failed(what + ": y at " + std::to_string(m) + ", " + std::to_string(n) + " is " +
                         std::to_string(got) + ", not " + std::to_string(sum));
      }
    }
  }
}

// Rows of the identity pick columns of W: y is what cuda_nf4_dequantize writes, bit for bit.
void check_weights(DType dtype, bool nested, int64_t blocksize) {
  const int64_t N = 150, K = 128;
  Weight w(N * K, blocksize, nested, 4);
  Buffer<uint8_t> packed(N * K / 2);
  std::memcpy(packed.data(), w.view.packed, static_cast<size_t>(packed.size()));
  w.view.packed = packed.data();
  Buffer<uint16_t> x(K * K), y(K * N), dense(N * K);
  for (int64_t i = 0; i < x.size(); ++i) x[i] = bits_of(dtype, i % (K + 1) ? 0.0f : 1.0f);
  CudaNF4LinearArgs args;
  args.M = K, args.N = N, args.K = K;
  args.x = x.data(), args.y = y.data();
  args.dtype = dtype;
  args.w = w.view;
  Buffer<uint8_t> workspace(cuda_nf4_lora_linear_sm90a_workspace(K, N, K, 0, 0));
  args.workspace = workspace.data();
  args.workspace_bytes = workspace.size();
  if (cuda_nf4_lora_linear_sm90a_forward(args, nullptr) ||
      cuda_nf4_dequantize(args.w, dense.data(), dtype, N * K, nullptr)) {
    cuda_test_failed("sm90a: not launched");
  }
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t k = 0; k < K; ++k) {
      const uint16_t got = y[k * N + n], wanted = dense[n * K + k];
      if (got != wanted && (got | wanted) & 0x7fff) {  // a sum has no -0
        cuda_test_failed("sm90a: weight " + std::to_string(n) + ", " + std::to_string(k));
      }
    }
  }
}

void check_malformed() {
  const Weight w(64 * 128, 64, false);
  Buffer<uint8_t> packed(64 * 64), workspace(1 << 20);
  Half x(DType::kBFloat16, 33 * 128, 1.0f), y(DType::kBFloat16, 33 * 64, 1.0f);
  CudaNF4LinearArgs good;
  good.M = 33, good.N = 64, good.K = 128;
  good.x = x.data(), good.y = y.data();
  good.w = w.view;
  good.w.packed = packed.data();
  good.workspace = workspace.data();
  good.workspace_bytes = workspace.size();
  const std::vector<std::function<void(CudaNF4LinearArgs&)>> damages = {
      [](CudaNF4LinearArgs& a) { a.M = 513; },
      [](CudaNF4LinearArgs& a) { a.M = -1; },
      [](CudaNF4LinearArgs& a) { a.N = 63; },
      [](CudaNF4LinearArgs& a) { a.K = 96; },
      [](CudaNF4LinearArgs& a) { a.r = 257; },
      [](CudaNF4LinearArgs& a) { a.r = 8; },  // no adapters
      [](CudaNF4LinearArgs& a) { a.w.blocksize = 32, a.w.absmax_len = 256; },
      [](CudaNF4LinearArgs& a) { a.dtype = DType::kFloat32; },
      [](CudaNF4LinearArgs& a) { a.x = static_cast<const char*>(a.x) + 2; },
      [](CudaNF4LinearArgs& a) { a.w.packed += 4, a.w.packed_bytes -= 4; },
      [](CudaNF4LinearArgs& a) { a.y = nullptr; },
      [](CudaNF4LinearArgs& a) { a.workspace = nullptr; },
      [](CudaNF4LinearArgs& a) { a.workspace_bytes = 64 * 128 * 2 - 1; },
      [](CudaNF4LinearArgs& a) { a.splits = 17; },
  };
  if (cuda_nf4_lora_linear_sm90a_forward(good, nullptr)) cuda_test_failed("sm90a: not launched");
  for (size_t i = 0; i < damages.size(); ++i) {
    CudaNF4LinearArgs args = good;
    damages[i](args);
    try {
      cuda_nf4_lora_linear_sm90a_forward(args, nullptr);
    } catch (const std::invalid_argument&) {
      continue;
    }
    cuda_test_failed("sm90a: malformed argument " + std::to_string(i) + " was accepted");
  }
}

}  // namespace

void check_cuda_nf4_lora_linear_sm90a() {
  const DType bf16 = DType::kBFloat16, fp16 = DType::kFloat16;
  check({33, 64, 64, 0, 64, 1, false, false, bf16});
  check({40, 130, 192, 5, 64, 1, true, true, bf16});     // a tail in N, an odd number of units
  check({65, 57, 128, 16, 64, 0, true, true, fp16});     // rows of y at any address
  check({70, 136, 320, 21, 256, 2, false, true, fp16});  // blocks that cross rows
  check({37, 40, 64, 64, 64, 4, true, true, bf16});      // splits that have adapters only
  check({100, 8, 448, 1, 64, 8, true, false, fp16});
  check({300, 140, 128, 2, 64, 2, false, true, bf16});  // splits of several tiles each way
  check({33, 8, 1088, 4, 64, 1, true, false, bf16});    // the ring goes round, by rows of x in a
  check({100, 8, 960, 0, 64, 1, false, false, bf16});   // block: 64, 128
  check({130, 8, 832, 3, 64, 1, true, true, fp16});     // and 256
  for (const DType dtype : {bf16, fp16}) {
    check_weights(dtype, false, 64);
    check_weights(dtype, true, 256);
  }
  check_malformed();
}
