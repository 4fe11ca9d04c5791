// The scales of blocks as float32, from bytes of eight-bit floats; vectorized by the compiler, once
// per instruction set.
#pragma once

#include "peftkern/nf4.h"
#include "simd.h"

namespace peftkern {
namespace {

// e8m0: 2^(s - 127), of which 0 has no normal float; 255 is NaN.
inline void e8m0_scales(const uint8_t* s, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t byte = s[i];
    uint32_t bits = byte << 23;
    bits = byte == 0 ? 0x00400000 : bits;
    bits = byte == 255 ? 0x7fc00000 : bits;
    out[i] = bits_float(bits);
  }
}

// e4m3 (no infinities, NaN where all other bits are set) times a float, rounded once.
inline void e4m3_scales(const uint8_t* s, int64_t n, float tensor_scale, float* out) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t byte = s[i], magnitude = byte & 127;
    const float subnormal = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-9f;
    uint32_t bits = (magnitude << 20) + (uint32_t{120} << 23);
    bits = magnitude < 8 ? float_bits(subnormal) : bits;
    bits = magnitude == 127 ? 0x7fc00000 : bits;
    out[i] = bits_float(bits | (byte & 128) << 24) * tensor_scale;
  }
}

// Scales of blocks [first, first + count) of a weight that holds bytes of them, not nested.
inline void byte_scales(const NF4View& w, int64_t first, int64_t count, float* out) {
  const uint8_t* s = static_cast<const uint8_t*>(w.absmax) + first;
  if (w.format == Format::kMXFP4) {
    e8m0_scales(s, count, out);
  } else {
    e4m3_scales(s, count, *w.tensor_scale, out);
  }
}

}  // namespace
}  // namespace peftkern
