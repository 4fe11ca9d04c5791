// csrc/cuda/nf4_lora_linear.cu and nf4_lora_linear_sm90a.cu against plain loops in float64, on
// memory of exact size, and against themselves under other orders of threads and blocks.
#include "cuda_test.h"
#include "intrinsics.cuh"
#include "native_data.h"
#include "peftkern/cuda_nf4_lora_linear_sm90a.h"

namespace {

constexpr DType kBF16 = DType::kBFloat16, kFP16 = DType::kFloat16, kFP32 = DType::kFloat32;

float value_of(DType dtype, uint16_t bits) {
  return dtype == kBF16 ? to_float(BF16{bits}) : to_float(FP16{bits});
}
uint16_t bits_of(DType dtype, float x) {
  return dtype == kBF16 ? from_float<BF16>(x).bits : from_float<FP16>(x).bits;
}

// Random values of one type, exactly as many, `shift` elements past 16-byte alignment.
class Tensor {
 public:
  Tensor(DType dtype, int64_t n, float size, int64_t shift = 0)
      : dtype_(dtype), bytes_(n * itemsize(dtype), shift * itemsize(dtype)) {
    for (int64_t i = 0; i < n; ++i) {
      const float x = uniform() * size;
      const uint16_t half = dtype == kFP32 ? 0 : bits_of(dtype, x);
      std::memcpy(&bytes_[itemsize(dtype) * i],
                  dtype == kFP32 ? static_cast<const void*>(&x) : &half,
                  static_cast<size_t>(itemsize(dtype)));
    }
  }
  void* data() { return bytes_.data(); }
  double at(int64_t i) const {
    float wide;
    uint16_t half;
    if (dtype_ == kFP32) {
      std::memcpy(&wide, bytes_.data() + 4 * i, 4);
      return wide;
    }
    std::memcpy(&half, bytes_.data() + 2 * i, 2);
    return value_of(dtype_, half);
  }

 private:
  DType dtype_;
  Buffer<uint8_t> bytes_;
};

// The kernel for few rows of x and the one for more, which compute capability 9.0 alone has.
struct Kernel {
  const char* name;
  int (*forward)(const CudaNF4LinearArgs&, CudaStream);
  bool rounds_codes;        // to the type of x, before absmax is multiplied in; else the product
  double s_slack, y_slack;  // of the size of the terms; y is rounded once besides
};
const Kernel kDecode = {"nf4_lora_linear", cuda_nf4_lora_linear_forward, true, 2e-6, 2e-6};
const Kernel kPrefill = {"nf4_lora_linear_sm90a", cuda_nf4_lora_linear_sm90a_forward, false,
                         64 * 0x1p-24, 0x1p-16};

int64_t workspace_of(const Kernel& kernel, int64_t M, int64_t N, int64_t K, int64_t r,
                     int64_t splits) {
  return &kernel == &kDecode ? cuda_nf4_lora_linear_workspace(M, N, K, splits)
                             : cuda_nf4_lora_linear_sm90a_workspace(M, N, K, r, splits);
}

// A weight whose codes begin at a multiple of 16 bytes.
struct Packed {
  Packed(int64_t numel, int64_t blocksize, bool nested, int64_t nested_blocksize = 4)
      : weight(numel, blocksize, nested, nested_blocksize), packed(numel / 2), view(weight.view) {
    std::memcpy(packed.data(), view.packed, static_cast<size_t>(packed.size()));
    view.packed = packed.data();
  }
  // The value of weight i as the kernel has it.
  double at(int64_t i, DType dtype, const Kernel& kernel) const {
    const auto rounded = [&](float x) { return value_of(dtype, bits_of(dtype, x)); };
    if (!kernel.rounds_codes) return rounded(weight.at(i));
    const uint8_t byte = packed[i / 2];
    float absmax = 0.0f;
    load_absmax(view, i / view.blocksize, 1, &absmax);
    return double{rounded(kNF4Code[i % 2 ? byte & 15 : byte >> 4])} * absmax;
  }
  Weight weight;
  Buffer<uint8_t> packed;
  NF4View view;
};

struct Case {
  int64_t M, N, K, r, blocksize, splits;
  bool nested, bias;
  DType dtype, a_dtype = kFP32, b_dtype = kFP32;
};

std::string describe(const Kernel& kernel, const Case& c) {
  std::string text = kernel.name;
  for (int64_t value : {c.M, c.N, c.K, c.r, c.blocksize, c.splits}) {
    text += " " + std::to_string(value);
  }
  return text + " dtype " + std::to_string(static_cast<int>(c.dtype)) + (c.nested ? " nested" : "");
}

void near(double got, const Sum& wanted, double rounding, double slack, const std::string& what) {
  if (!(std::fabs(got - wanted.value) <=
        rounding * std::fabs(wanted.value) + slack * wanted.size)) {
    fail(what + ": got " + std::to_string(got) + ", wanted " + std::to_string(wanted.value));
  }
}

void check(const Kernel& kernel, const Case& c, int64_t nested_blocksize = 4) {
  const std::string what = describe(kernel, c);
  Packed w(c.N * c.K, c.blocksize, c.nested, nested_blocksize);
  Tensor x(c.dtype, c.M * c.K, 1.0f), bias(c.dtype, c.N, 1.0f, static_cast<int64_t>(rng() % 3));
  Tensor lora_A(c.a_dtype, c.r * c.K, 0.1f);
  Tensor lora_B(c.b_dtype, c.N * c.r, 0.3f, static_cast<int64_t>(rng() % 3));
  const int64_t bytes = workspace_of(kernel, c.M, c.N, c.K, c.r, c.splits);
  Buffer<uint16_t> first(c.M * c.N);
  Buffer<float> s(c.M * c.r);
  CudaNF4LinearArgs args;
  args.M = c.M, args.N = c.N, args.K = c.K, args.r = c.r;
  args.x = x.data(), args.dtype = c.dtype;
  args.w = w.view;
  args.lora_A = lora_A.data(), args.a_dtype = c.a_dtype;
  args.lora_B = lora_B.data(), args.b_dtype = c.b_dtype;
  args.bias = c.bias ? bias.data() : nullptr;
  args.scaling = 1.5f;
  args.s = s.data();
  args.workspace_bytes = bytes, args.splits = c.splits;
  for (uint32_t schedule = 0; schedule < emulation::kSchedules; ++schedule) {
    emulation::set_schedule(schedule);
    Buffer<uint16_t> y(c.M * c.N);
    Buffer<uint8_t> workspace(bytes);
    std::memset(s.data(), 0xff, sizeof(float) * static_cast<size_t>(s.size()));
    args.y = schedule ? y.data() : first.data();
    args.workspace = workspace.data();
    if (kernel.forward(args, nullptr)) fail(what + ": not launched");
    if (schedule && std::memcmp(y.data(), first.data(), 2 * static_cast<size_t>(y.size()))) {
      fail(what + ": another order of threads gives other bits");
    }
  }
  emulation::set_schedule(0);

  for (int64_t m = 0; m < c.M; ++m) {
    std::vector<double> shrunk;
    for (int64_t j = 0; j < c.r; ++j) {
      Sum sum;
      for (int64_t k = 0; k < c.K; ++k) sum += x.at(m * c.K + k) * lora_A.at(j * c.K + k);
      near(s[m * c.r + j], sum, 0.0, kernel.s_slack, what + ": s");
      shrunk.push_back(sum.value);
    }
    for (int64_t n = 0; n < c.N; ++n) {
      Sum sum;
      if (c.bias) sum += bias.at(n);
      for (int64_t k = 0; k < c.K; ++k) {
        sum += x.at(m * c.K + k) * w.at(n * c.K + k, c.dtype, kernel);
      }
      for (int64_t j = 0; j < c.r; ++j) {
        sum += 1.5 * shrunk[static_cast<size_t>(j)] * lora_B.at(n * c.r + j);
      }
      near(value_of(c.dtype, first[m * c.N + n]), sum, c.dtype == kBF16 ? 0x1p-8 : 0x1p-11,
           kernel.y_slack, what + ": y at " + std::to_string(m) + ", " + std::to_string(n));
    }
  }
}

// Rows of the identity pick columns of W: y is what cuda_nf4_dequantize writes, bit for bit.
void check_prefill_weights(DType dtype, bool nested, int64_t blocksize) {
  const int64_t N = 150, K = 128;
  Packed w(N * K, blocksize, nested);
  Buffer<uint16_t> x(K * K), y(K * N), dense(N * K);
  for (int64_t i = 0; i < x.size(); ++i) x[i] = bits_of(dtype, i % (K + 1) ? 0.0f : 1.0f);
  Buffer<uint8_t> workspace(workspace_of(kPrefill, K, N, K, 0, 0));
  CudaNF4LinearArgs args;
  args.M = K, args.N = N, args.K = K;
  args.x = x.data(), args.y = y.data(), args.dtype = dtype;
  args.w = w.view;
  args.workspace = workspace.data(), args.workspace_bytes = workspace.size();
  if (kPrefill.forward(args, nullptr) ||
      cuda_nf4_dequantize(args.w, dense.data(), dtype, N * K, nullptr)) {
    fail("sm90a: not launched");
  }
  for (int64_t i = 0; i < N * K; ++i) {
    const uint16_t got = y[i % K * N + i / K], wanted = dense[i];
    if (got != wanted && (got | wanted) & 0x7fff) {  // a sum has no -0
      fail("sm90a: weight " + std::to_string(i / K) + ", " + std::to_string(i % K));
    }
  }
}

// `own`: what this kernel refuses besides, the other not.
void check_malformed(const Kernel& kernel, int64_t M, const Damages<CudaNF4LinearArgs>& own) {
  Packed w(24 * 128, 64, true);
  Tensor x(kBF16, M * 128 + 8, 1.0f), adapter(kFP32, 3 * 128 + 8, 1.0f);
  Buffer<uint8_t> y(2 * M * 24), workspace(1 << 20);
  Buffer<float> s(3 * M);
  CudaNF4LinearArgs good;
  good.M = M, good.N = 24, good.K = 128, good.r = 3;
  good.x = x.data(), good.y = y.data(), good.w = w.view;
  good.lora_A = adapter.data(), good.lora_B = adapter.data(), good.s = s.data();
  good.workspace = workspace.data(), good.workspace_bytes = workspace.size();
  good.splits = 2;
  const int64_t needed = workspace_of(kernel, M, 24, 128, 3, 2);
  const Damages<CudaNF4LinearArgs> damages = {
      [](auto& a) { a.M = -1; },
      [](auto& a) { a.N = 0; },
      [](auto& a) { a.N = 25; },
      [](auto& a) { a.K = 96; },
      [](auto& a) { a.K = int64_t{1} << 27; },
      [](auto& a) { a.r = -1; },
      [](auto& a) { a.splits = 17; },
      [](auto& a) { a.dtype = kFP32; },
      [](auto& a) { a.w.numel = 64; },
      [](auto& a) { a.w.blocksize = 32; },
      [](auto& a) { a.w.packed += 4; },
      [](auto& a) { a.w.nested_offset = nullptr; },
      [](auto& a) { a.x = nullptr; },
      [](auto& a) { a.x = static_cast<const char*>(a.x) + 2; },
      [](auto& a) { a.y = nullptr; },
      [](auto& a) { a.lora_A = nullptr; },
      [](auto& a) { a.lora_A = static_cast<const char*>(a.lora_A) + 4; },
      [](auto& a) { a.lora_B = nullptr; },
      [](auto& a) { a.lora_B = static_cast<const char*>(a.lora_B) + 2; },
      [](auto& a) { a.s = nullptr; },
      [](auto& a) { a.workspace = nullptr; },
      [&](auto& a) { a.workspace_bytes = needed - 1; },
  };
  if (kernel.forward(good, nullptr)) fail(std::string(kernel.name) + ": not launched");
  const auto call = [&](const auto& args) { kernel.forward(args, nullptr); };
  check_refusals(kernel.name, good, damages, call);
  check_refusals(std::string(kernel.name) + "'s own", good, own, call);
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
    c.dtype = rng() % 2 ? kBF16 : kFP16;
    c.a_dtype = adapter(), c.b_dtype = adapter();
    c.nested = rng() % 2, c.bias = rng() % 2;
    check(kDecode, c, pick({1, 4, 256}));
  }
  const Damages<CudaNF4LinearArgs> decode_damages = {
      [](auto& a) { a.M = 33; },
      [](auto& a) { a.r = 65; },
      [](auto& a) { a.w.blocksize = 256; },  // blocks that cross rows
  };
  check_malformed(kDecode, 2, decode_damages);
  for (const Case& c : std::vector<Case>{
           {33, 64, 64, 0, 64, 1, false, false, kBF16},
           {40, 130, 192, 5, 64, 1, true, true, kBF16},     // a tail in N, an odd number of units
           {65, 57, 128, 16, 64, 0, true, true, kFP16},     // rows of y at any address
           {70, 136, 320, 21, 256, 2, false, true, kFP16},  // blocks that cross rows
           {37, 40, 64, 64, 64, 4, true, true, kBF16},      // splits that have adapters only
           {100, 8, 448, 1, 64, 8, true, false, kFP16},
           {300, 140, 128, 2, 64, 2, false, true, kBF16},  // splits of several tiles each way
           {33, 8, 1088, 4, 64, 1, true, false, kBF16},    // the ring goes round, by rows of x in a
           {100, 8, 960, 0, 64, 1, false, false, kBF16},   // block: 64, 128
           {130, 8, 832, 3, 64, 1, true, true, kFP16},     // and 256
       }) {
    check(kPrefill, c);
  }
  for (const DType dtype : {kBF16, kFP16}) {
    check_prefill_weights(dtype, false, 64);
    check_prefill_weights(dtype, true, 256);
  }
  check_malformed(kPrefill, 33, {[](auto& a) { a.M = 513; }, [](auto& a) { a.r = 257; }});
}
