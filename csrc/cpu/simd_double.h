// Doubles: as many float64 values as one register of the including file's instruction set holds
// (eight, four or two), with operators, so that formulas are written once for numbers and for
// vectors. Everything is in an anonymous namespace, as in simd.h.
#pragma once

#include "load_store.h"
#include "peftkern/jacobi.h"

namespace peftkern {
namespace {

#if defined(__AVX512F__)

constexpr int kDoubles = 8;
struct Doubles {
  __m512d v;
};
inline Doubles doubles_set1(double x) { return {_mm512_set1_pd(x)}; }
inline Doubles doubles_load(const double* p) { return {_mm512_loadu_pd(p)}; }
inline void doubles_store(double* p, Doubles a) { _mm512_storeu_pd(p, a.v); }
inline Doubles doubles_fma(Doubles a, Doubles b, Doubles c) {
  return {_mm512_fmadd_pd(a.v, b.v, c.v)};
}
inline Doubles operator+(Doubles a, Doubles b) { return {_mm512_add_pd(a.v, b.v)}; }
inline Doubles operator-(Doubles a, Doubles b) { return {_mm512_sub_pd(a.v, b.v)}; }
inline Doubles operator*(Doubles a, Doubles b) { return {_mm512_mul_pd(a.v, b.v)}; }
inline Doubles operator/(Doubles a, Doubles b) { return {_mm512_div_pd(a.v, b.v)}; }
inline Doubles jacobi_sqrt(Doubles a) { return {_mm512_sqrt_pd(a.v)}; }
inline Doubles jacobi_abs(Doubles a) { return {_mm512_abs_pd(a.v)}; }
inline Doubles select_gt(Doubles a, Doubles b, Doubles x, Doubles y) {
  return {_mm512_mask_mov_pd(y.v, _mm512_cmp_pd_mask(a.v, b.v, _CMP_GT_OQ), x.v)};
}
inline bool any_gt(Doubles a, Doubles b) { return _mm512_cmp_pd_mask(a.v, b.v, _CMP_GT_OQ) != 0; }
inline double doubles_sum(Doubles a) { return _mm512_reduce_add_pd(a.v); }
inline void doubles_store_floats(float* p, Doubles a) { _mm256_storeu_ps(p, _mm512_cvtpd_ps(a.v)); }
inline void doubles_stream_floats(float* p, Doubles a, Doubles b) {  // p: 64-byte aligned
  _mm512_stream_ps(
      p, _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(a.v)), _mm512_cvtpd_ps(b.v), 1));
}
inline void f32_stream(float* p, F32x16 a) { _mm512_stream_ps(p, a.v); }
inline void stream_fence() { _mm_sfence(); }
inline Doubles doubles_load_floats(const float* p) { return {_mm512_cvtps_pd(_mm256_loadu_ps(p))}; }
inline void f32_store_doubles(double* p, F32x16 a) {
  _mm512_storeu_pd(p, _mm512_cvtps_pd(_mm512_castps512_ps256(a.v)));
  _mm512_storeu_pd(p + 8, _mm512_cvtps_pd(_mm512_extractf32x8_ps(a.v, 1)));
}

#elif defined(__AVX2__)

constexpr int kDoubles = 4;
struct Doubles {
  __m256d v;
};
inline Doubles doubles_set1(double x) { return {_mm256_set1_pd(x)}; }
inline Doubles doubles_load(const double* p) { return {_mm256_loadu_pd(p)}; }
inline void doubles_store(double* p, Doubles a) { _mm256_storeu_pd(p, a.v); }
inline Doubles doubles_fma(Doubles a, Doubles b, Doubles c) {
  return {_mm256_fmadd_pd(a.v, b.v, c.v)};
}
inline Doubles operator+(Doubles a, Doubles b) { return {_mm256_add_pd(a.v, b.v)}; }
inline Doubles operator-(Doubles a, Doubles b) { return {_mm256_sub_pd(a.v, b.v)}; }
inline Doubles operator*(Doubles a, Doubles b) { return {_mm256_mul_pd(a.v, b.v)}; }
inline Doubles operator/(Doubles a, Doubles b) { return {_mm256_div_pd(a.v, b.v)}; }
inline Doubles jacobi_sqrt(Doubles a) { return {_mm256_sqrt_pd(a.v)}; }
inline Doubles jacobi_abs(Doubles a) { return {_mm256_andnot_pd(_mm256_set1_pd(-0.0), a.v)}; }
inline Doubles select_gt(Doubles a, Doubles b, Doubles x, Doubles y) {
  return {_mm256_blendv_pd(y.v, x.v, _mm256_cmp_pd(a.v, b.v, _CMP_GT_OQ))};
}
inline bool any_gt(Doubles a, Doubles b) {
  return _mm256_movemask_pd(_mm256_cmp_pd(a.v, b.v, _CMP_GT_OQ)) != 0;
}
inline double doubles_sum(Doubles a) {
  const __m128d s = _mm_add_pd(_mm256_castpd256_pd128(a.v), _mm256_extractf128_pd(a.v, 1));
  return _mm_cvtsd_f64(_mm_add_sd(s, _mm_unpackhi_pd(s, s)));
}
inline void doubles_store_floats(float* p, Doubles a) { _mm_storeu_ps(p, _mm256_cvtpd_ps(a.v)); }
inline void doubles_stream_floats(float* p, Doubles a, Doubles b) {  // p: 32-byte aligned
  _mm256_stream_ps(p, _mm256_set_m128(_mm256_cvtpd_ps(b.v), _mm256_cvtpd_ps(a.v)));
}
inline void f32_stream(float* p, F32x16 x) {
  _mm256_stream_ps(p, x.a);
  _mm256_stream_ps(p + 8, x.b);
}
inline void stream_fence() { _mm_sfence(); }
inline Doubles doubles_load_floats(const float* p) { return {_mm256_cvtps_pd(_mm_loadu_ps(p))}; }
inline void f32_store_doubles(double* p, F32x16 x) {
  _mm256_storeu_pd(p, _mm256_cvtps_pd(_mm256_castps256_ps128(x.a)));
  _mm256_storeu_pd(p + 4, _mm256_cvtps_pd(_mm256_extractf128_ps(x.a, 1)));
  _mm256_storeu_pd(p + 8, _mm256_cvtps_pd(_mm256_castps256_ps128(x.b)));
  _mm256_storeu_pd(p + 12, _mm256_cvtps_pd(_mm256_extractf128_ps(x.b, 1)));
}

#else

constexpr int kDoubles = 2;
struct Doubles {
  double v[2];
};
inline Doubles doubles_set1(double x) { return {{x, x}}; }
inline Doubles doubles_load(const double* p) { return {{p[0], p[1]}}; }
inline void doubles_store(double* p, Doubles a) { p[0] = a.v[0], p[1] = a.v[1]; }
inline Doubles operator+(Doubles a, Doubles b) { return {{a.v[0] + b.v[0], a.v[1] + b.v[1]}}; }
inline Doubles operator-(Doubles a, Doubles b) { return {{a.v[0] - b.v[0], a.v[1] - b.v[1]}}; }
inline Doubles operator*(Doubles a, Doubles b) { return {{a.v[0] * b.v[0], a.v[1] * b.v[1]}}; }
inline Doubles operator/(Doubles a, Doubles b) { return {{a.v[0] / b.v[0], a.v[1] / b.v[1]}}; }
inline Doubles doubles_fma(Doubles a, Doubles b, Doubles c) { return a * b + c; }
inline Doubles jacobi_sqrt(Doubles a) { return {{sqrt(a.v[0]), sqrt(a.v[1])}}; }
inline Doubles jacobi_abs(Doubles a) { return {{fabs(a.v[0]), fabs(a.v[1])}}; }
inline Doubles select_gt(Doubles a, Doubles b, Doubles x, Doubles y) {
  return {{a.v[0] > b.v[0] ? x.v[0] : y.v[0], a.v[1] > b.v[1] ? x.v[1] : y.v[1]}};
}
inline bool any_gt(Doubles a, Doubles b) { return a.v[0] > b.v[0] || a.v[1] > b.v[1]; }
inline double doubles_sum(Doubles a) { return a.v[0] + a.v[1]; }
inline void doubles_store_floats(float* p, Doubles a) {
  p[0] = static_cast<float>(a.v[0]), p[1] = static_cast<float>(a.v[1]);
}
inline void doubles_stream_floats(float* p, Doubles a, Doubles b) {
  doubles_store_floats(p, a), doubles_store_floats(p + kDoubles, b);
}
inline void f32_stream(float* p, const F32x16& a) { f32_store(p, a); }
inline void stream_fence() {}
inline Doubles doubles_load_floats(const float* p) { return {{p[0], p[1]}}; }
inline void f32_store_doubles(double* p, const F32x16& a) {
  for (int i = 0; i < 16; ++i) p[i] = static_cast<double>(a.v[i]);
}

#endif

// n <= kDoubles values.
inline void doubles_store_floats_n(float* p, Doubles a, int64_t n) {
  if (n == kDoubles) return doubles_store_floats(p, a);
  float t[kDoubles];
  doubles_store_floats(t, a);
  std::memcpy(p, t, static_cast<size_t>(n) * sizeof(float));
}

inline double dot(const double* a, const double* b, int64_t n) {
  Doubles sum = doubles_set1(0.0);
  int64_t i = 0;
  for (; i + kDoubles <= n; i += kDoubles) {
    sum = doubles_fma(doubles_load(a + i), doubles_load(b + i), sum);
  }
  double total = doubles_sum(sum);
  for (; i < n; ++i) total += a[i] * b[i];
  return total;
}

// y += a x
inline void add_scaled(double* y, double a, const double* x, int64_t n) {
  const Doubles factor = doubles_set1(a);
  int64_t i = 0;
  for (; i + kDoubles <= n; i += kDoubles) {
    doubles_store(y + i, doubles_fma(factor, doubles_load(x + i), doubles_load(y + i)));
  }
  for (; i < n; ++i) y[i] += a * x[i];
}

}  // namespace
}  // namespace peftkern
