// Sixteen values of any element type, widened to float32 and rounded back, and 16 x 16 tiles.
#pragma once

#include "simd.h"

namespace peftkern {
namespace {

inline F32x16 load_any(const void* src, DType dtype, int64_t i, int n) {
  if (dtype == DType::kFloat32) {
    const float* p = static_cast<const float*>(src) + i;
    return n == 16 ? f32_load(p) : f32_load_n(p, n);
  }
  const uint16_t* p = static_cast<const uint16_t*>(src) + i;
  uint16_t tail[16] = {};
  if (n < 16) {
    std::memcpy(tail, p, static_cast<size_t>(n) * 2);
    p = tail;
  }
  return dtype == DType::kBFloat16 ? f32_load_bf16(p) : f32_load_fp16(p);
}

inline void store_any(void* out, DType dtype, int64_t i, const F32x16& x, int n) {
  if (dtype == DType::kFloat32) {
    float* p = static_cast<float*>(out) + i;
    n == 16 ? f32_store(p, x) : f32_store_n(p, x, n);
    return;
  }
  uint16_t t[16];
  uint16_t* p = static_cast<uint16_t*>(out) + i;
  uint16_t* q = n == 16 ? p : t;
  dtype == DType::kBFloat16 ? f32_store_bf16(q, x) : f32_store_fp16(q, x);
  if (n < 16) std::memcpy(p, t, static_cast<size_t>(n) * 2);
}

#if defined(__AVX512F__)
// Stores the transpose of sixteen rows of dwords.
inline void store_transposed_rows(__m512i (&a)[16], uint32_t* out) {
  __m512i b[16];
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {  // 128-bit lane l of a[i + 4 g] holds column 4 l + i of rows 4 g..
    const __m512i p = _mm512_shuffle_i64x2(a[i], a[i + 4], 0x88);
    const __m512i q = _mm512_shuffle_i64x2(a[i], a[i + 4], 0xdd);
    const __m512i u = _mm512_shuffle_i64x2(a[i + 8], a[i + 12], 0x88);
    const __m512i v = _mm512_shuffle_i64x2(a[i + 8], a[i + 12], 0xdd);
    _mm512_storeu_si512(out + 16 * i, _mm512_shuffle_i64x2(p, u, 0x88));
    _mm512_storeu_si512(out + 16 * (i + 4), _mm512_shuffle_i64x2(q, v, 0x88));
    _mm512_storeu_si512(out + 16 * (i + 8), _mm512_shuffle_i64x2(p, u, 0xdd));
    _mm512_storeu_si512(out + 16 * (i + 12), _mm512_shuffle_i64x2(q, v, 0xdd));
  }
}
#endif

// Transposes a 16 x 16 tile of dwords.
inline void transpose_tile(const uint32_t* in, int64_t in_stride, uint32_t* out) {
#if defined(__AVX512F__)
  __m512i a[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(in + i * in_stride);
  store_transposed_rows(a, out);
#else
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 16; ++j) out[16 * j + i] = in[i * in_stride + j];
  }
#endif
}

}  // namespace
}  // namespace peftkern
