// The scales of blocks as float32, from bytes of eight-bit floats; once per instruction set.
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
inline void any_e4m3_scales(const uint8_t* s, int64_t n, float tensor_scale, float* out) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t byte = s[i], magnitude = byte & 127;
    const float subnormal = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-9f;
    const uint32_t small = magnitude < 8 ? ~uint32_t{0} : 0;  // a mask: a branch is no vector's
    uint32_t bits = (magnitude << 20) + (uint32_t{120} << 23);
    bits = (float_bits(subnormal) & small) | (bits & ~small);
    bits |= magnitude == 127 ? 0x7fc00000 : 0;
    out[i] = bits_float(bits | (byte & 128) << 24) * tensor_scale;
  }
}

#if defined(__AVX2__)
// Sixteen that are no NaN: float16 whose exponents are too small by 8, subnormals among them.
inline F32x16 e4m3_as_fp16(__m128i bytes) {
  const __m256i sign_and_rest = _mm256_set1_epi16(static_cast<int16_t>(0xbf80));
  uint16_t words[16];
  _mm256_storeu_si256(
      reinterpret_cast<__m256i*>(words),
      _mm256_and_si256(_mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes), 7), sign_and_rest));
  return f32_load_fp16(words);
}
#endif

inline void e4m3_scales(const uint8_t* s, int64_t n, float tensor_scale, float* out) {
  int64_t i = 0;
#if defined(__AVX2__)
  const float scale = tensor_scale * 256.0f;
  const bool exact = scale - scale == 0.0f;  // it has not overflowed
  for (; i + 16 <= n; i += 16) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(s + i));
    const __m128i magnitude = _mm_set1_epi8(127);
    const __m128i nan = _mm_cmpeq_epi8(_mm_and_si128(bytes, magnitude), magnitude);
    if (exact && _mm_movemask_epi8(nan) == 0) {
      f32_store(out + i, f32_mul(e4m3_as_fp16(bytes), f32_set1(scale)));
    } else {
      any_e4m3_scales(s + i, 16, tensor_scale, out + i);
    }
  }
#endif
  any_e4m3_scales(s + i, n - i, tensor_scale, out + i);
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

// The scale of every byte that such a weight can hold.
inline void scales_of_bytes(const NF4View& w, float out[256]) {
  uint8_t every[256];
  for (int i = 0; i < 256; ++i) every[i] = static_cast<uint8_t>(i);
  NF4View view = w;
  view.absmax = every;
  byte_scales(view, 0, 256, out);
}

}  // namespace
}  // namespace peftkern
