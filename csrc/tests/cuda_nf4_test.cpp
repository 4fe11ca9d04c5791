// csrc/cuda/nf4.cu against the CPU's kernels, bit for bit.
#include "peftkern/cuda_nf4.h"

#include <functional>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_test.h"
#include "native_data.h"

namespace {

const std::vector<int64_t> kNumels = {0,    1,    2,    3,    7,    8,    9,    31,   32,  33,
                                      63,   64,   65,   127,  128,  129,  255,  256,  257, 1023,
                                      1025, 4095, 4096, 4097, 8191, 8192, 8193, 20011};
const std::vector<int64_t> kBlocksizes = {32, 64, 128, 256, 512, 1024, 2048, 4096};
const std::vector<DType> kDTypes = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};

// Equal bits, or both NaN: a device has one NaN, the CPU keeps signs and payloads.
bool same(const uint8_t* a, const uint8_t* b, DType dtype) {
  if (dtype == DType::kFloat32) {
    uint32_t x, y;
    std::memcpy(&x, a, 4);
    std::memcpy(&y, b, 4);
    return x == y || ((x & 0x7fffffff) > 0x7f800000 && (y & 0x7fffffff) > 0x7f800000);
  }
  uint16_t x, y;
  std::memcpy(&x, a, 2);
  std::memcpy(&y, b, 2);
  const uint16_t infinity = dtype == DType::kBFloat16 ? 0x7f80 : 0x7c00;
  return x == y || ((x & 0x7fff) > infinity && (y & 0x7fff) > infinity);
}

std::string describe(const char* what, DType dtype, int64_t numel, int64_t blocksize, bool flag) {
  return std::string(what) + ": dtype " + std::to_string(static_cast<int>(dtype)) + ", " +
         std::to_string(numel) + " weights, blocks of " + std::to_string(blocksize) +
         (flag ? ", nested" : "");
}

void check_dequantize(int64_t numel, int64_t blocksize, DType dtype, bool nested, int64_t group) {
  const Weight w(numel, blocksize, nested, group);  // its packed bytes start at any address
  const int64_t size = itemsize(dtype);
  const int64_t shift = rng() % 3 ? 0 : static_cast<int64_t>(1 + rng() % 3);
  Buffer<uint8_t> wanted(numel * size), out(numel * size, shift * size);
  nf4_dequantize(Isa::kScalar, 1, w.view, wanted.data(), dtype, numel, false);
  if (cuda_nf4_dequantize(w.view, out.data(), dtype, numel, nullptr)) {
    fail("dequantize: not launched");
  }
  for (int64_t i = 0; i < numel; ++i) {
    if (!same(&wanted.data()[i * size], &out.data()[i * size], dtype)) {
      fail(describe("dequantize", dtype, numel, blocksize, nested) + ": element " +
           std::to_string(i));
    }
  }
}

// Values with blocks of zeros, tiny numbers, exact ties and, for some, NaN and infinity.
void fill(Buffer<uint8_t>& bytes, DType dtype, int64_t numel, int64_t blocksize) {
  const int special = static_cast<int>(rng() % 6);
  for (int64_t i = 0; i < numel; ++i) {
    float x = uniform();
    const int64_t block = i / blocksize;
    if (special == 1 && block % 2) x = 0.0f;
    if (special == 2) x *= 1e-38f;
    if (special == 3) x = i % blocksize ? kNF4Midpoint[rng() % 15] : 1.0f;
    if (special == 4 && rng() % 200 == 0) x = std::numeric_limits<float>::quiet_NaN();
    if (special == 5 && rng() % 200 == 0) x = -std::numeric_limits<float>::infinity();
    if (dtype == DType::kFloat32) {
      std::memcpy(&bytes.data()[4 * i], &x, 4);
    } else {
      uint16_t half = x != x ? 0x7fc0 : to_bf16(x);  // as fp16 too: any bits will do
      if (dtype == DType::kFloat16) half = static_cast<uint16_t>(special ? rng() : rng() & 0xbbff);
      std::memcpy(&bytes.data()[2 * i], &half, 2);
    }
  }
}

void check_quantize(int64_t numel, int64_t blocksize, DType dtype) {
  const int64_t size = itemsize(dtype), blocks = (numel + blocksize - 1) / blocksize;
  Buffer<uint8_t> src(numel * size, (rng() % 3 ? 0 : static_cast<int64_t>(1 + rng() % 3)) * size);
  fill(src, dtype, numel, blocksize);
  Buffer<uint8_t> wanted((numel + 1) / 2);
  Buffer<uint8_t> packed((numel + 1) / 2, rng() % 3 ? 0 : static_cast<int64_t>(1 + rng() % 3));
  Buffer<float> wanted_absmax(blocks), absmax(blocks);
  nf4_quantize(Isa::kScalar, 1, src.data(), dtype, numel, blocksize, wanted.data(), wanted.size(),
               wanted_absmax.data(), blocks);
  if (cuda_nf4_quantize(src.data(), dtype, numel, blocksize, packed.data(), packed.size(),
                        absmax.data(), blocks, nullptr)) {
    fail("quantize: not launched");
  }
  const std::string what = describe("quantize", dtype, numel, blocksize, false);
  for (int64_t i = 0; i < wanted.size(); ++i) {
    if (wanted[i] != packed[i]) fail(what + ": byte " + std::to_string(i));
  }
  for (int64_t i = 0; i < blocks; ++i) {
    if (std::memcmp(&wanted_absmax[i], &absmax[i], 4)) {
      fail(what + ": absmax " + std::to_string(i));
    }
  }
}

// Every code boundary, one step to each side of it, for scales that round differently.
void check_ties() {
  for (float scale : {1.0f, 0.3f, 1.7e-3f, 65504.0f, 3e-39f, 1.9e38f}) {
    const int64_t numel = 64;
    Buffer<uint8_t> src(numel * 4);
    for (int64_t i = 0; i < numel; ++i) {
      float x = i < 45 ? kNF4Midpoint[i / 3] * scale : scale;
      if (i < 45 && i % 3) x = std::nextafter(x, i % 3 == 1 ? -3e38f : 3e38f);
      std::memcpy(&src.data()[4 * i], &x, 4);
    }
    Buffer<uint8_t> wanted(32), packed(32);
    Buffer<float> wanted_absmax(1), absmax(1);
    nf4_quantize(Isa::kScalar, 1, src.data(), DType::kFloat32, 64, 64, wanted.data(), 32,
                 wanted_absmax.data(), 1);
    cuda_nf4_quantize(src.data(), DType::kFloat32, 64, 64, packed.data(), 32, absmax.data(), 1,
                      nullptr);
    if (std::memcmp(wanted.data(), packed.data(), 32) || wanted_absmax[0] != absmax[0]) {
      fail("quantize: a tie goes elsewhere");
    }
  }
}

void check_malformed() {
  const Weight w(1000, 64, true);
  const NF4View& good = w.view;
  Buffer<float> out(1000);
  const Damages<NF4View> damages = {
      [](auto& v) { v.numel = -1; },
      [](auto& v) { v.numel = 1001; },
      [](auto& v) { v.blocksize = 48; },
      [](auto& v) { v.packed_bytes = 499; },
      [](auto& v) { v.packed = nullptr; },
      [](auto& v) { v.absmax_len = 15; },
      [](auto& v) { v.nested_absmax_len = 0; },
      [](auto& v) { v.nested_blocksize = 0; },
      [](auto& v) { v.nested_blocksize = 48; },
      [](auto& v) { v.nested_code = nullptr; },
      [](auto& v) { v.nested_offset = nullptr; },
  };
  check_refusals("nf4_dequantize", good, damages, [&](const NF4View& view) {
    cuda_nf4_dequantize(view, out.data(), DType::kFloat32, 1000, nullptr);
  });
  Buffer<uint8_t> packed(500);
  Buffer<float> absmax(16);
  const auto dequantize = [&](float* to, int64_t numel) {
    return [=] { cuda_nf4_dequantize(good, to, DType::kFloat32, numel, nullptr); };
  };
  const auto quantize = [&](const float* from, int64_t packed_bytes) {
    return [=, &packed, &absmax] {
      cuda_nf4_quantize(from, DType::kFloat32, 1000, 64, packed.data(), packed_bytes, absmax.data(),
                        16, nullptr);
    };
  };
  if (!rejected(dequantize(nullptr, 1000)) || !rejected(dequantize(out.data(), 999)) ||
      !rejected(quantize(nullptr, 500)) || !rejected(quantize(out.data(), 499))) {
    fail("a malformed argument was accepted");
  }
}

}  // namespace

void check_cuda_nf4() {
  uint32_t schedule = 0;
  for (int64_t numel : kNumels) {
    for (int64_t blocksize : kBlocksizes) {
      for (DType dtype : kDTypes) {
        emulation::set_schedule(schedule++ % emulation::kSchedules);
        check_dequantize(numel, blocksize, dtype, rng() % 2, pick({1, 4, 256}));
        check_quantize(numel, blocksize, dtype);
      }
    }
  }
  emulation::set_schedule(0);
  check_ties();
  check_malformed();
}
