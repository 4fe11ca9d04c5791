// F32x16: sixteen floats in whatever registers the including file is compiled for (one zmm, two
// ymm, or an array), and the NF4 primitives that differ by instruction set. Everything is in an
// anonymous namespace: each instruction set gets its own copy, and the linker can never mix them
// up.
//
// Files that include this must not use inline functions of the standard library either: their
// AVX-512 copy could be the one that the linker keeps for everybody.
#pragma once

#include <cstdint>
#include <cstring>

#include "peftkern/nf4_table.h"
#include "tasks.h"

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace peftkern {
namespace {

inline uint32_t float_bits(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}
inline float bits_float(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

// max(a, |b|) for a >= 0; NaN propagates.
inline float maxabs(float a, float b) {
  if (a != a || b != b) return bits_float(0x7fc00000);
  const float m = bits_float(float_bits(b) & 0x7fffffff);
  return m > a ? m : a;
}

// Round to nearest even; any NaN becomes 0x7fc0 as in torch.
inline uint16_t bf16_from_float(float x) {
  if (x != x) return 0x7fc0;
  const uint32_t u = float_bits(x);
  return static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
inline float float_from_bf16(uint16_t h) { return bits_float(static_cast<uint32_t>(h) << 16); }

inline uint16_t fp16_from_float(float x) {
  const uint32_t u = float_bits(x);
  const uint32_t sign = u >> 16 & 0x8000;
  const uint32_t a = u & 0x7fffffff;
  if (a > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (a >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // rounds past 65504
  if (a <
      0x38800000) {  // subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the mantissa
    return static_cast<uint16_t>(sign | (float_bits(bits_float(a) + 0.5f) - 0x3f000000));
  }
  return static_cast<uint16_t>(sign | ((a - 0x38000000 + 0xfff + (a >> 13 & 1)) >> 13));
}
inline float float_from_fp16(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
  const uint32_t exponent = h >> 10 & 31;
  const uint32_t mantissa = h & 0x3ff;
  if (exponent == 31) return bits_float(sign | 0x7f800000 | mantissa << 13);
  if (exponent == 0) {
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return bits_float(sign | float_bits(magnitude));
  }
  return bits_float(sign | (exponent + 112) << 23 | mantissa << 13);
}

#if defined(__AVX512F__)

struct F32x16 {
  __m512 v;
};
inline F32x16 f32_zero() { return {_mm512_setzero_ps()}; }
inline F32x16 f32_set1(float x) { return {_mm512_set1_ps(x)}; }
inline F32x16 f32_load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void f32_store(float* p, F32x16 a) { _mm512_storeu_ps(p, a.v); }
inline F32x16 f32_fma(F32x16 a, F32x16 b, F32x16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F32x16 f32_mul(F32x16 a, F32x16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F32x16 f32_add(F32x16 a, F32x16 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F32x16 f32_div(F32x16 a, F32x16 b) { return {_mm512_div_ps(a.v, b.v)}; }
// The first where it is smaller, or larger, else the second, a NaN among others.
inline F32x16 f32_min(F32x16 a, F32x16 b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F32x16 f32_max(F32x16 a, F32x16 b) { return {_mm512_max_ps(a.v, b.v)}; }
// 2^n, -127 < n < 128, of n + kIntegers.
inline F32x16 f32_pow2(F32x16 n) {
  const __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(n.v), 23);
  return {_mm512_castsi512_ps(_mm512_add_epi32(exponent, _mm512_set1_epi32(0x3f800000)))};
}
inline float f32_sum(F32x16 a) { return _mm512_reduce_add_ps(a.v); }
inline __mmask16 mask16(int n) { return static_cast<__mmask16>((1u << n) - 1); }
inline F32x16 f32_load_n(const float* p, int n) { return {_mm512_maskz_loadu_ps(mask16(n), p)}; }
inline void f32_store_n(float* p, F32x16 a, int n) { _mm512_mask_storeu_ps(p, mask16(n), a.v); }

// x times 1 or, where the byte is zero, 0 (a NaN stays one); n <= 16 bytes are read.
inline F32x16 f32_keep(F32x16 x, const uint8_t* keep, int n) {
  const __m128i bytes = _mm_maskz_loadu_epi8(mask16(n), keep);
  const __mmask16 kept = _mm_test_epi8_mask(bytes, bytes);
  return {_mm512_mul_ps(x.v, _mm512_maskz_mov_ps(kept, _mm512_set1_ps(1.0f)))};
}

inline __m512i bf16_bits(__m512 x) {  // in the low half of each lane
  const __m512i u = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i rounded =
      _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, odd), _mm512_set1_epi32(0x7fff)), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0));
}
inline F32x16 f32_round_bf16(F32x16 a) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(bf16_bits(a.v), 16))};
}
inline F32x16 f32_round_fp16(F32x16 a) {
  return {_mm512_cvtph_ps(_mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))};
}
inline F32x16 f32_load_bf16(const uint16_t* p) {
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}
inline F32x16 f32_load_fp16(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline void f32_store_bf16(uint16_t* p, F32x16 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(bf16_bits(a.v)));
}
inline void f32_store_fp16(uint16_t* p, F32x16 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// The shifts that bring the nibbles of a dword down in the order of the weights.
struct NibbleOrder {
  __m512i shift;
};
inline NibbleOrder nibble_order(bool low_first) {
  const __m512i shift = _mm512_set_epi32(24, 28, 16, 20, 8, 12, 0, 4, 24, 28, 16, 20, 8, 12, 0, 4);
  return {_mm512_xor_si512(shift, _mm512_set1_epi32(low_first ? 4 : 0))};
}

// Sixteen weights from eight packed bytes through a table of 16 floats. vpermps looks at the low
// four bits of each lane only, so the shifted nibbles need no mask.
inline F32x16 f32_lookup(const uint8_t* packed, F32x16 table, NibbleOrder order) {
  const __m512i spread = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed));
  const __m512i words = _mm512_permutexvar_epi32(spread, _mm512_castsi128_si512(bytes));
  return {_mm512_permutexvar_ps(_mm512_srlv_epi32(words, order.shift), table.v)};
}

inline float f32_absmax(F32x16 a) {  // NaN propagates
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  if (nan) return bits_float(0x7fc00000);
  return _mm512_reduce_max_ps(_mm512_abs_ps(a.v));
}
inline F32x16 f32_abs(F32x16 a) { return {_mm512_abs_ps(a.v)}; }
inline F32x16 f32_where_finite(F32x16 test, F32x16 a,
                               F32x16 b) {  // a where |test| < Inf, else b
  const __mmask16 finite =
      _mm512_cmp_ps_mask(_mm512_abs_ps(test.v), _mm512_set1_ps(bits_float(0x7f800000)), _CMP_LT_OQ);
  return {_mm512_mask_mov_ps(b.v, finite, a.v)};
}
inline F32x16 f32_maxabs(F32x16 a,
                         F32x16 b) {  // lanes where b is NaN become NaN; a NaN in a stays
  const __m512 m = _mm512_max_ps(a.v, _mm512_abs_ps(b.v));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, b.v, _CMP_UNORD_Q);
  return {_mm512_mask_mov_ps(m, nan, _mm512_set1_ps(bits_float(0x7fc00000)))};
}

// Codes of sixteen scaled values: the number of midpoints below x (NaN: all), by binary search.
inline void f32_codes(F32x16 x, uint8_t* codes) {
  const __m512 midpoints = _mm512_maskz_loadu_ps(0x7fff, kNF4Midpoint);
  __m512i code = _mm512_setzero_si512();
  for (int step = 8; step >= 1; step >>= 1) {
    const __m512i probe = _mm512_add_epi32(code, _mm512_set1_epi32(step - 1));
    const __m512 t = _mm512_permutexvar_ps(probe, midpoints);
    const __mmask16 above = _mm512_cmp_ps_mask(x.v, t, _CMP_NLE_UQ);
    code = _mm512_mask_add_epi32(code, above, code, _mm512_set1_epi32(step));
  }
  _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), _mm512_cvtepi32_epi8(code));
}

#elif defined(__AVX2__)

struct F32x16 {
  __m256 a, b;
};
inline F32x16 f32_zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline F32x16 f32_set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F32x16 f32_load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void f32_store(float* p, F32x16 x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
inline F32x16 f32_fma(F32x16 x, F32x16 y, F32x16 z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
inline F32x16 f32_mul(F32x16 x, F32x16 y) {
  return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)};
}
inline F32x16 f32_add(F32x16 x, F32x16 y) {
  return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)};
}
inline F32x16 f32_div(F32x16 x, F32x16 y) {
  return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)};
}
inline F32x16 f32_min(F32x16 x, F32x16 y) {
  return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)};
}
inline F32x16 f32_max(F32x16 x, F32x16 y) {
  return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)};
}
inline __m256 pow2(__m256 n) {
  const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(n), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(exponent, _mm256_set1_epi32(0x3f800000)));
}
inline F32x16 f32_pow2(F32x16 n) { return {pow2(n.a), pow2(n.b)}; }
inline float f32_sum(F32x16 x) {
  const __m256 s = _mm256_add_ps(x.a, x.b);
  __m128 h = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  h = _mm_add_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_add_ss(h, _mm_movehdup_ps(h)));
}
// A call of memcpy takes longer than most of what surrounds these.
inline F32x16 f32_load_n(const float* p, int n) {
  static constexpr int32_t kUsed[32] = {-1, -1, -1, -1, -1, -1, -1, -1,
                                        -1, -1, -1, -1, -1, -1, -1, -1};
  const __m256i* used = reinterpret_cast<const __m256i*>(kUsed + 16 - n);
  return {_mm256_maskload_ps(p, _mm256_loadu_si256(used)),
          _mm256_maskload_ps(p + 8, _mm256_loadu_si256(used + 1))};
}
inline void f32_store_n(float* p, F32x16 x, int n) {
  if (n == 16) return f32_store(p, x);
  float t[16];
  f32_store(t, x);
  std::memcpy(p, t, static_cast<size_t>(n) * 4);
}

inline __m256i bf16_bits(__m256 x) {
  const __m256i u = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i rounded =
      _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, odd), _mm256_set1_epi32(0x7fff)), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
}
inline F32x16 f32_round_bf16(F32x16 x) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(bf16_bits(x.a), 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(bf16_bits(x.b), 16))};
}
inline __m128i fp16_bits(__m256 x) {
  return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline F32x16 f32_round_fp16(F32x16 x) {
  return {_mm256_cvtph_ps(fp16_bits(x.a)), _mm256_cvtph_ps(fp16_bits(x.b))};
}
inline __m256 load8_bf16(const uint16_t* p) {
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
inline F32x16 f32_load_bf16(const uint16_t* p) { return {load8_bf16(p), load8_bf16(p + 8)}; }
inline F32x16 f32_load_fp16(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
inline __m256i bf16_words(F32x16 x) {
  const __m256i packed = _mm256_packus_epi32(bf16_bits(x.a), bf16_bits(x.b));
  return _mm256_permute4x64_epi64(packed, 0xd8);
}
inline void f32_store_bf16(uint16_t* p, F32x16 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bf16_words(x));
}
inline void f32_store_fp16(uint16_t* p, F32x16 x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), fp16_bits(x.a));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), fp16_bits(x.b));
}

struct NibbleOrder {
  __m256i shift;
};
inline NibbleOrder nibble_order(bool low_first) {
  const __m256i shift = _mm256_set_epi32(24, 28, 16, 20, 8, 12, 0, 4);
  return {_mm256_xor_si256(shift, _mm256_set1_epi32(low_first ? 4 : 0))};
}

// vpermps over eight lanes: look the low three bits up in both halves, let bit 3 choose.
inline __m256 lookup8(uint32_t word, F32x16 table, NibbleOrder order) {
  const __m256i code = _mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(word)), order.shift);
  const __m256 low = _mm256_permutevar8x32_ps(table.a, code);
  const __m256 high = _mm256_permutevar8x32_ps(table.b, code);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(code, 28)));
}
inline F32x16 f32_lookup(const uint8_t* packed, F32x16 table, NibbleOrder order) {
  uint32_t words[2];
  std::memcpy(words, packed, 8);
  return {lookup8(words[0], table, order), lookup8(words[1], table, order)};
}

inline __m256 abs8(__m256 x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
inline __m256 maxabs8(__m256 a, __m256 b) {
  const __m256 nan = _mm256_cmp_ps(a, b, _CMP_UNORD_Q);
  return _mm256_or_ps(_mm256_max_ps(a, abs8(b)), nan);
}
inline F32x16 f32_abs(F32x16 x) { return {abs8(x.a), abs8(x.b)}; }
inline F32x16 f32_where_finite(F32x16 test, F32x16 x, F32x16 y) {
  const __m256 inf = _mm256_set1_ps(bits_float(0x7f800000));
  return {_mm256_blendv_ps(y.a, x.a, _mm256_cmp_ps(abs8(test.a), inf, _CMP_LT_OQ)),
          _mm256_blendv_ps(y.b, x.b, _mm256_cmp_ps(abs8(test.b), inf, _CMP_LT_OQ))};
}
inline F32x16 f32_maxabs(F32x16 x, F32x16 y) { return {maxabs8(x.a, y.a), maxabs8(x.b, y.b)}; }
inline float f32_absmax(F32x16 x) {
  const __m256 m = maxabs8(abs8(x.a), x.b);
  if (_mm256_movemask_ps(_mm256_cmp_ps(m, m, _CMP_UNORD_Q))) return bits_float(0x7fc00000);
  __m128 h = _mm_max_ps(_mm256_castps256_ps128(m), _mm256_extractf128_ps(m, 1));
  h = _mm_max_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_max_ss(h, _mm_movehdup_ps(h)));
}
inline __m256i codes8(__m256 x) {
  __m256i code = _mm256_setzero_si256();
  for (int i = 0; i < 15; ++i) {
    const __m256 above = _mm256_cmp_ps(x, _mm256_set1_ps(kNF4Midpoint[i]), _CMP_NLE_UQ);
    code = _mm256_sub_epi32(code, _mm256_castps_si256(above));
  }
  return code;
}
inline void f32_codes(F32x16 x, uint8_t* codes) {
  const __m256i words =
      _mm256_permute4x64_epi64(_mm256_packus_epi32(codes8(x.a), codes8(x.b)), 0xd8);
  const __m128i bytes =
      _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), bytes);
}

#else

struct F32x16 {
  float v[16];
};
template <class Fn>
inline F32x16 f32_make(Fn fn) {
  F32x16 r;
  for (int i = 0; i < 16; ++i) r.v[i] = fn(i);
  return r;
}
inline F32x16 f32_set1(float x) {
  return f32_make([=](int) { return x; });
}
inline F32x16 f32_zero() { return f32_set1(0.0f); }
inline F32x16 f32_load(const float* p) {
  F32x16 r;
  std::memcpy(r.v, p, 64);
  return r;
}
inline void f32_store(float* p, F32x16 x) { std::memcpy(p, x.v, 64); }
inline F32x16 f32_fma(const F32x16& a, const F32x16& b, const F32x16& c) {
  return f32_make([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
inline F32x16 f32_mul(const F32x16& a, const F32x16& b) {
  return f32_make([&](int i) { return a.v[i] * b.v[i]; });
}
inline F32x16 f32_add(const F32x16& a, const F32x16& b) {
  return f32_make([&](int i) { return a.v[i] + b.v[i]; });
}
inline F32x16 f32_div(const F32x16& a, const F32x16& b) {
  return f32_make([&](int i) { return a.v[i] / b.v[i]; });
}
inline F32x16 f32_min(const F32x16& a, const F32x16& b) {
  return f32_make([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline F32x16 f32_max(const F32x16& a, const F32x16& b) {
  return f32_make([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline F32x16 f32_pow2(const F32x16& n) {
  return f32_make([&](int i) { return bits_float((float_bits(n.v[i]) << 23) + 0x3f800000); });
}
inline float f32_sum(const F32x16& a) {
  float s = 0.0f;
  for (int i = 0; i < 16; ++i) s += a.v[i];
  return s;
}
inline F32x16 f32_load_n(const float* p, int n) {
  F32x16 r = f32_zero();
  std::memcpy(r.v, p, static_cast<size_t>(n) * 4);
  return r;
}
inline void f32_store_n(float* p, const F32x16& x, int n) {
  std::memcpy(p, x.v, static_cast<size_t>(n) * 4);
}
inline F32x16 f32_round_bf16(const F32x16& a) {
  return f32_make([&](int i) { return float_from_bf16(bf16_from_float(a.v[i])); });
}
inline F32x16 f32_round_fp16(const F32x16& a) {
  return f32_make([&](int i) { return float_from_fp16(fp16_from_float(a.v[i])); });
}
inline F32x16 f32_load_bf16(const uint16_t* p) {
  return f32_make([=](int i) { return float_from_bf16(p[i]); });
}
inline F32x16 f32_load_fp16(const uint16_t* p) {
  return f32_make([=](int i) { return float_from_fp16(p[i]); });
}
inline void f32_store_bf16(uint16_t* p, const F32x16& a) {
  for (int i = 0; i < 16; ++i) p[i] = bf16_from_float(a.v[i]);
}
inline void f32_store_fp16(uint16_t* p, const F32x16& a) {
  for (int i = 0; i < 16; ++i) p[i] = fp16_from_float(a.v[i]);
}
struct NibbleOrder {
  int even, odd;  // shifts of a byte
};
inline NibbleOrder nibble_order(bool low_first) {
  return low_first ? NibbleOrder{0, 4} : NibbleOrder{4, 0};
}
inline F32x16 f32_lookup(const uint8_t* packed, const F32x16& table, NibbleOrder order) {
  return f32_make(
      [&](int i) { return table.v[packed[i >> 1] >> (i & 1 ? order.odd : order.even) & 15]; });
}
inline F32x16 f32_abs(const F32x16& a) {
  return f32_make([&](int i) { return bits_float(float_bits(a.v[i]) & 0x7fffffff); });
}
inline F32x16 f32_where_finite(const F32x16& test, const F32x16& a, const F32x16& b) {
  return f32_make(
      [&](int i) { return (float_bits(test.v[i]) & 0x7fffffff) < 0x7f800000 ? a.v[i] : b.v[i]; });
}
inline F32x16 f32_maxabs(const F32x16& a, const F32x16& b) {
  return f32_make([&](int i) { return maxabs(a.v[i], b.v[i]); });
}
inline float f32_absmax(const F32x16& a) {
  float m = 0.0f;
  for (int i = 0; i < 16; ++i) m = maxabs(m, a.v[i]);
  return m;
}
inline void f32_codes(const F32x16& x, uint8_t* codes) {
  for (int i = 0; i < 16; ++i) {
    int code = 0;
    for (int t = 0; t < 15; ++t) code += !(x.v[i] <= kNF4Midpoint[t]);
    codes[i] = static_cast<uint8_t>(code);
  }
}

#endif

#if !defined(__AVX512F__)
// x times 1 or, where the byte is zero, 0 (a NaN stays one); n <= 16 bytes are read.
inline F32x16 f32_keep(const F32x16& x, const uint8_t* keep, int n) {
  float factor[16] = {};
  for (int i = 0; i < n; ++i) factor[i] = keep[i] ? 1.0f : 0.0f;
  return f32_mul(x, f32_load(factor));
}
#endif

constexpr float kIntegers = 0x1.8p23f;  // to which an integer is added exactly, in the low bits

// e^x within 2^-21 of itself, or of 2^-126; beyond the range of floats 0 and infinity.
inline F32x16 f32_exp(const F32x16& x) {
  const F32x16 integers = f32_set1(kIntegers), none = f32_set1(-kIntegers);
  const F32x16 at = f32_max(f32_set1(-104.0f), f32_min(f32_set1(89.0f), x));
  const F32x16 n = f32_add(f32_fma(at, f32_set1(0x1.715476p0f), integers), none);  // at / log 2
  // n log 2 in two parts, of which the first is exact: |rest| is about half of log 2 at most.
  F32x16 rest = f32_fma(n, f32_set1(-0x1.63p-1f), at);
  rest = f32_fma(n, f32_set1(0x1.bd0106p-13f), rest);
  constexpr float kSeries[] = {0x1.a0d2cep-13f,
                               0x1.6e879cp-10f,
                               0x1.11121p-7f,
                               0x1.555382p-5f,
                               0x1.555554p-3f,
                               0.5f,
                               1.0f,
                               1.0f};
  F32x16 series = f32_set1(kSeries[0]);
  for (int i = 1; i < 8; ++i) series = f32_fma(series, rest, f32_set1(kSeries[i]));
  // By 2^n in two steps, since 2^128 and what is below 2^-126 have no float of that form.
  const F32x16 half = f32_fma(n, f32_set1(0.5f), integers);
  const F32x16 other = f32_add(n, f32_fma(f32_add(half, none), f32_set1(-1.0f), integers));
  return f32_mul(f32_mul(series, f32_pow2(half)), f32_pow2(other));
}

// Sixteen weights that start anywhere, an odd element included, which is in a low nibble; n <= 16
// are read, the rest repeat code 0.
inline F32x16 f32_lookup_at(const uint8_t* packed, int64_t element, int n, const F32x16& table) {
  uint8_t aligned[8] = {};
  for (int i = 0; i < n; ++i) {
    const int64_t e = element + i;
    const int code = packed[e >> 1] >> (e & 1 ? 0 : 4) & 15;
    aligned[i >> 1] = static_cast<uint8_t>(aligned[i >> 1] | code << (i & 1 ? 0 : 4));
  }
  return f32_lookup(aligned, table, nibble_order(false));
}

}  // namespace
}  // namespace peftkern
