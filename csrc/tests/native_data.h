// Random 4-bit weights and activations in heap buffers of exactly the size that the format names,
// so that AddressSanitizer sees any access past an end.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "peftkern/nf4.h"
#include "peftkern/nf4_table.h"

namespace {

using namespace peftkern;

std::mt19937 rng(20240607);

inline int64_t pick(const std::vector<int64_t>& values) { return values[rng() % values.size()]; }
// Uniform, of variance 1: a normal one would take a third of the test's time.
inline float uniform() { return static_cast<float>(static_cast<int32_t>(rng())) * 0x1.bb67aep-31f; }

[[noreturn]] inline void fail(const std::string& message) {
  std::fprintf(stderr, "test failed: %s\n", message.c_str());
  std::exit(1);
}

inline bool rejected(const std::function<void()>& call) {
  try {
    call();
  } catch (const std::invalid_argument&) {
    return true;
  }
  return false;
}

template <typename Args>
using Damages = std::vector<std::function<void(Args&)>>;

// `call` refuses what each of the damages makes of good arguments.
template <typename Args, typename Call>
void check_refusals(const std::string& what, const Args& good, const Damages<Args>& damages,
                    const Call& call) {
  for (size_t i = 0; i < damages.size(); ++i) {
    Args args = good;
    damages[i](args);
    if (!rejected([&] { call(args); })) {
      fail(what + ": malformed argument " + std::to_string(i) + " was accepted");
    }
  }
}

// A sum in float64 and the size of its terms, which may cancel.
struct Sum {
  double value = 0.0, size = 0.0;
  void operator+=(double term) { value += term, size += std::fabs(term); }
};

// Exactly `size` elements on the heap, all bytes 0xff (NaN for floats), `shift` elements past the
// allocator's alignment.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t size, int64_t shift = 0)
      : base_(static_cast<T*>(std::malloc(static_cast<size_t>(size + shift) * sizeof(T)))),
        shift_(shift),
        size_(size) {
    std::memset(static_cast<void*>(base_), 0xff, static_cast<size_t>(size + shift) * sizeof(T));
  }
  ~Buffer() { std::free(base_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* data() { return base_ + shift_; }
  const T* data() const { return base_ + shift_; }
  int64_t size() const { return size_; }
  T& operator[](int64_t i) { return data()[i]; }
  T operator[](int64_t i) const { return data()[i]; }

 private:
  T* base_;
  int64_t shift_, size_;
};

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint16_t to_bf16(float value) {  // nearest even; finite values only
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float from_bf16(uint16_t half) { return from_bits(static_cast<uint32_t>(half) << 16); }

// `n` values of type `dtype`, as raw memory of exactly the right size.
class Values {
 public:
  Values(DType dtype, int64_t n, int64_t shift = 0)
      : dtype_(dtype),
        wide_(dtype == DType::kFloat32 ? n : 0, shift),
        half_(dtype == DType::kFloat32 ? 0 : n, shift) {}
  void randomize() {
    for (int64_t i = 0; i < wide_.size(); ++i) wide_[i] = uniform();
    for (int64_t i = 0; i < half_.size(); ++i) half_[i] = to_bf16(uniform());
  }
  void* data() {
    return dtype_ == DType::kFloat32 ? static_cast<void*>(wide_.data()) : half_.data();
  }
  DType dtype() const { return dtype_; }
  float at(int64_t i) const { return dtype_ == DType::kFloat32 ? wide_[i] : from_bf16(half_[i]); }

 private:
  DType dtype_;
  Buffer<float> wide_;
  Buffer<uint16_t> half_;
};

// e8m0 and e4m3 by their definitions.
inline float e8m0(uint8_t byte) {
  return byte == 255 ? std::nanf("") : static_cast<float>(std::ldexp(1.0, byte - 127));
}
inline float e4m3(uint8_t byte) {
  const int exponent = byte >> 3 & 15, mantissa = byte & 7;
  if (exponent == 15 && mantissa == 7) return std::nanf("");
  const double magnitude =
      exponent ? std::ldexp(8 + mantissa, exponent - 10) : std::ldexp(mantissa, -9);
  return static_cast<float>(byte & 128 ? -magnitude : magnitude);
}

// A random weight of a format and its exact values.
class Weight {
 public:
  // Scales of products: none so large that a sum of them overflows, and now and then a tiny one.
  enum class Scales { kModerate, kAny };

  Weight(int64_t numel, int64_t blocksize, bool nested, int64_t nested_blocksize = 256)
      : Weight(Format::kNF4, numel, blocksize, nested, nested_blocksize) {}

  Weight(Format format, int64_t numel, int64_t blocksize, bool nested,
         int64_t nested_blocksize = 256, Scales scales = Scales::kModerate)
      : packed_((numel + 1) / 2, static_cast<int64_t>(rng() % 4)),
        blocks_((numel + blocksize - 1) / blocksize),
        bytes_(nested || format == Format::kMXFP4 || format == Format::kNVFP4 ? blocks_ : 0),
        absmax_(bytes_.size() ? 0 : blocks_),
        nested_absmax_(nested ? (blocks_ + nested_blocksize - 1) / nested_blocksize : 0),
        nested_code_(nested ? 256 : 0),
        nested_offset_(1),
        zero_(format == Format::kINT4 && rng() % 3 ? blocks_ : 0),
        tensor_scale_(1) {
    for (int64_t i = 0; i < packed_.size(); ++i) packed_[i] = static_cast<uint8_t>(rng());
    for (int64_t i = 0; i < absmax_.size(); ++i) absmax_[i] = std::fabs(uniform());
    for (int64_t i = 0; i < bytes_.size(); ++i) bytes_[i] = scale_byte(format, scales);
    if (nested) {
      for (int64_t i = 0; i < nested_absmax_.size(); ++i) nested_absmax_[i] = std::fabs(uniform());
      for (int i = 0; i < 256; ++i) nested_code_[i] = static_cast<float>(i - 128) / 128.0f;
    }
    for (int64_t i = 0; i < zero_.size(); ++i) {  // one in four is no integer
      zero_[i] = static_cast<float>(rng() % 16) + (rng() % 4 ? 0.0f : 0.3f);
    }
    nested_offset_[0] = 0.7f;
    tensor_scale_[0] = 0.37f;
    view.format = format;
    view.packed = packed_.data();
    view.packed_bytes = packed_.size();
    view.absmax = bytes_.size() ? static_cast<const void*>(bytes_.data()) : absmax_.data();
    view.absmax_len = blocks_;
    view.nested = nested;
    view.nested_absmax = nested ? nested_absmax_.data() : nullptr;
    view.nested_absmax_len = nested_absmax_.size();
    view.nested_code = nested ? nested_code_.data() : nullptr;
    view.nested_offset = nested ? nested_offset_.data() : nullptr;
    view.tensor_scale = format == Format::kNVFP4 ? tensor_scale_.data() : nullptr;
    view.zero = zero_.size() ? zero_.data() : nullptr;
    view.aux_len = view.zero ? zero_.size() : view.tensor_scale ? 1 : 0;
    view.blocksize = blocksize;
    view.nested_blocksize = nested ? nested_blocksize : 0;
    view.numel = numel;
  }

  float scale(int64_t block) const {
    if (view.format == Format::kMXFP4) return e8m0(bytes_[block]);
    if (view.format == Format::kNVFP4) return e4m3(bytes_[block]) * tensor_scale_[0];
    if (!view.nested) return absmax_[block];
    const float product =
        nested_code_[bytes_[block]] * nested_absmax_[block / view.nested_blocksize];
    return product + nested_offset_[0];
  }
  float at(int64_t i) const {
    const int64_t block = i / view.blocksize;
    const uint8_t byte = packed_[i / 2];
    const int code = (i % 2 == 0) == view.low_first() ? byte & 15 : byte >> 4;
    if (view.format == Format::kINT4) {
      const float difference = static_cast<float>(code) - (view.zero ? zero_[block] : 8.0f);
      return difference * scale(block);
    }
    const float* codes = view.format == Format::kNF4   ? kNF4Code
                         : view.format == Format::kFP4 ? kFP4Code
                                                       : kE2M1Code;
    return codes[code] * scale(block);
  }

  NF4View view;

 private:
  static uint8_t scale_byte(Format format, Scales scales) {
    if (scales == Scales::kAny || format == Format::kNF4 || format == Format::kFP4) {
      return static_cast<uint8_t>(rng());
    }
    if (format == Format::kMXFP4)
      return static_cast<uint8_t>(rng() % 16 ? 120 + rng() % 12 : rng() % 3);
    return static_cast<uint8_t>(rng() % 127 + (rng() % 16 ? 0 : 128));
  }

  Buffer<uint8_t> packed_;
  int64_t blocks_;
  Buffer<uint8_t> bytes_;
  Buffer<float> absmax_, nested_absmax_, nested_code_, nested_offset_, zero_, tensor_scale_;
};

// A format and a size of its blocks.
struct Blocks {
  Format format;
  int64_t size;
  // So many columns, and of blocks that cannot cross rows a multiple of their size.
  int64_t columns(int64_t K) const {
    return format < Format::kMXFP4 ? K : (K + size - 1) / size * size;
  }
  bool nests() const { return format < Format::kMXFP4; }
};
inline Blocks random_blocks() {
  switch (rng() % 7) {
    case 0:
      return {Format::kMXFP4, 32};
    case 1:
      return {Format::kNVFP4, 16};
    case 2:
      return {Format::kINT4, pick({32, 64, 128, 256})};
    case 3:
      return {Format::kFP4, pick({32, 64, 256, 4096})};
    default:
      return {Format::kNF4, pick({32, 64, 64, 256, 4096})};
  }
}

}  // namespace
