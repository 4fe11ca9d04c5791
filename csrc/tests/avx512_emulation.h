// AVX-512, AVX512-BF16 and AMX-BF16 on a processor with AVX2, for tests: what csrc/cpu uses of
// them, so that every kernel runs on a machine that lacks its instructions (make test-isas).
// Force-included
// (-include) with PEFTKERN_EMULATED_AVX512 defined; nothing that ships includes it. These functions
// hide those of immintrin.h, which have the same names outside of this namespace.
//
// What it finds beyond wrong results: aligned loads and streams to addresses that are not, reads of
// what is undefined above a widened register (0x7fa5a5a5, a NaN), tiles without a configuration.
// It cannot find anything about speed.
#pragma once

#ifndef PEFTKERN_EMULATED_AVX512
#error "avx512_emulation.h needs PEFTKERN_EMULATED_AVX512"
#endif

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

// Only now: with these immintrin.h would take them as given.
#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512VL__ 1
#define __AVX512DQ__ 1
#if PEFTKERN_EMULATED_BF16
#define __AVX512BF16__ 1
#endif

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps

namespace peftkern {
namespace {
namespace emulation {

// A register as numbers of a type; one of 128 or 256 bits fills the first of them.
template <class T>
struct Lanes {
  static constexpr int kCount = 64 / sizeof(T);
  T lane[kCount];
  T& operator[](int i) { return lane[i]; }
  const T& operator[](int i) const { return lane[i]; }
};

template <class T, class V>
Lanes<T> lanes(V x) {
  Lanes<T> r;
  std::memcpy(r.lane, &x, sizeof x);
  return r;
}

template <class V, class T>
V vector(const Lanes<T>& x) {
  V r;
  std::memcpy(&r, x.lane, sizeof r);
  return r;
}

template <class V, class T, class Fn>
V each(const Fn& fn) {
  Lanes<T> r;
  for (int i = 0; i < Lanes<T>::kCount; ++i) r[i] = static_cast<T>(fn(i));
  return vector<V>(r);
}

template <class T, class V, class Fn>
V map(V x, const Fn& fn) {
  const Lanes<T> a = lanes<T>(x);
  return each<V, T>([&](int i) { return fn(a[i]); });
}

template <class T, class V, class Fn>
V map(V x, V y, const Fn& fn) {
  const Lanes<T> a = lanes<T>(x), b = lanes<T>(y);
  return each<V, T>([&](int i) { return fn(a[i], b[i]); });
}

// Lanes of y where the mask has a one, else of x.
template <class T, class V>
V blend(V x, uint64_t mask, V y) {
  const Lanes<T> a = lanes<T>(x), b = lanes<T>(y);
  return each<V, T>([&](int i) { return mask >> i & 1 ? b[i] : a[i]; });
}

template <class V>
V load(const void* p) {
  V r;
  std::memcpy(&r, p, sizeof r);
  return r;
}

inline void check_aligned(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 64) std::abort();
}

template <class V, class T>
V masked_load(uint64_t mask, const void* p) {
  Lanes<T> r = {};
  for (int i = 0; i < static_cast<int>(sizeof(V) / sizeof(T)); ++i) {
    if (mask >> i & 1) std::memcpy(&r[i], static_cast<const T*>(p) + i, sizeof(T));
  }
  return vector<V>(r);
}

template <class T, class V>
void masked_store(void* p, uint64_t mask, V x) {
  const Lanes<T> a = lanes<T>(x);
  for (int i = 0; i < Lanes<T>::kCount; ++i) {
    if (mask >> i & 1) std::memcpy(static_cast<T*>(p) + i, &a[i], sizeof(T));
  }
}

template <class V, class W>
V repeat(W x) {
  unsigned char bytes[64];
  for (size_t i = 0; i < 64; i += sizeof x) std::memcpy(bytes + i, &x, sizeof x);
  return load<V>(bytes);
}

template <class V, class W>
V widen(W x) {
  Lanes<uint32_t> r;
  for (uint32_t& lane : r.lane) lane = 0x7fa5a5a5;
  std::memcpy(r.lane, &x, sizeof x);
  return vector<V>(r);
}

template <class V, class W>
V insert(V x, W y, int part) {
  std::memcpy(reinterpret_cast<char*>(&x) + part * sizeof y, &y, sizeof y);
  return x;
}

template <class W, class V>
W extract(V x, int part) {
  return load<W>(reinterpret_cast<const char*>(&x) + part * sizeof(W));
}

template <class T, class V>
V permute(__m512i index, V x) {
  const Lanes<T> a = lanes<T>(x), at = lanes<T>(index);
  return each<V, T>([&](int i) { return a[at[i] % Lanes<T>::kCount]; });
}

template <class T, class V>
V permute(V x, __m512i index, V y) {
  constexpr int kCount = Lanes<T>::kCount;
  const Lanes<T> a = lanes<T>(x), b = lanes<T>(y), at = lanes<T>(index);
  return each<V, T>([&](int i) { return (at[i] & kCount ? b : a)[at[i] % kCount]; });
}

template <class T, class V>
V unpack(V x, V y, bool high) {
  constexpr int kQuarter = 16 / sizeof(T);
  const Lanes<T> a = lanes<T>(x), b = lanes<T>(y);
  return each<V, T>([&](int i) {
    const int from = i / kQuarter * kQuarter + i % kQuarter / 2 + (high ? kQuarter / 2 : 0);
    return (i % 2 ? b : a)[from];
  });
}

template <class V>
V shuffle_quarters(V x, V y, int order) {
  const Lanes<uint64_t> a = lanes<uint64_t>(x), b = lanes<uint64_t>(y);
  return each<V, uint64_t>(
      [&](int i) { return (i < 4 ? a : b)[2 * (order >> i / 2 * 2 & 3) + i % 2]; });
}

template <class T, class V>
uint64_t compare(V x, V y, int predicate) {
  const Lanes<T> a = lanes<T>(x), b = lanes<T>(y);
  uint64_t mask = 0;
  for (int i = 0; i < Lanes<T>::kCount; ++i) {
    const bool unordered = a[i] != a[i] || b[i] != b[i];
    const bool holds = predicate == _CMP_UNORD_Q  ? unordered
                       : predicate == _CMP_LT_OQ  ? a[i] < b[i]
                       : predicate == _CMP_GT_OQ  ? a[i] > b[i]
                       : predicate == _CMP_NLE_UQ ? !(a[i] <= b[i])
                                                  : throw std::logic_error("another predicate");
    mask |= uint64_t{holds} << i;
  }
  return mask;
}

template <class T, class V, class Fn>
T reduce(V x, const Fn& fn) {
  Lanes<T> a = lanes<T>(x);
  for (int n = Lanes<T>::kCount / 2; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) a[i] = fn(a[i], a[i + n]);
  }
  return a[0];
}

inline int16_t saturated(int x) {
  return static_cast<int16_t>(x > 32767 ? 32767 : x < -32768 ? -32768 : x);
}

// These instructions take subnormal numbers as zeros.
inline float flushed(uint32_t bits) {
  if ((bits & 0x7f800000) == 0) bits &= 0x80000000;
  return load<float>(&bits);
}
inline float from_bf16(uint16_t x) { return flushed(static_cast<uint32_t>(x) << 16); }
inline uint16_t to_bf16(float x) {
  const float value = flushed(load<uint32_t>(&x));
  const uint32_t bits = load<uint32_t>(&value);
  if (value != value) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

using BFloat16s = decltype(::_mm512_cvtne2ps_pbh(__m512{}, __m512{}));
using HalfBFloat16s = decltype(::_mm512_cvtneps_pbh(__m512{}));

struct Tiles {
  uint8_t bytes[8][1024];
  bool configured;
};
inline thread_local Tiles tiles = {};

template <class T = uint8_t>
T* tile(int i) {
  if (!tiles.configured) std::abort();
  return reinterpret_cast<T*>(tiles.bytes[i]);
}

}  // namespace emulation

// ---- memory

inline __m512 _mm512_loadu_ps(const void* p) { return emulation::load<__m512>(p); }
inline __m512d _mm512_loadu_pd(const void* p) { return emulation::load<__m512d>(p); }
inline __m512i _mm512_loadu_si512(const void* p) { return emulation::load<__m512i>(p); }
inline __m512i _mm512_load_si512(const void* p) {
  emulation::check_aligned(p);
  return emulation::load<__m512i>(p);
}
inline void _mm512_storeu_ps(void* p, __m512 x) { std::memcpy(p, &x, sizeof x); }
inline void _mm512_storeu_pd(void* p, __m512d x) { std::memcpy(p, &x, sizeof x); }
inline void _mm512_storeu_si512(void* p, __m512i x) { std::memcpy(p, &x, sizeof x); }
inline void _mm512_stream_ps(void* p, __m512 x) {
  emulation::check_aligned(p);
  std::memcpy(p, &x, sizeof x);
}
inline void _mm512_stream_si512(void* p, __m512i x) {
  emulation::check_aligned(p);
  std::memcpy(p, &x, sizeof x);
}
#define PEFTKERN_MASKED_LOAD(name, V, Mask, T) \
  inline V name(Mask mask, const void* p) { return emulation::masked_load<V, T>(mask, p); }
PEFTKERN_MASKED_LOAD(_mm512_maskz_loadu_epi8, __m512i, __mmask64, uint8_t)
PEFTKERN_MASKED_LOAD(_mm512_maskz_loadu_epi16, __m512i, __mmask32, uint16_t)
PEFTKERN_MASKED_LOAD(_mm512_maskz_loadu_ps, __m512, __mmask16, uint32_t)
PEFTKERN_MASKED_LOAD(_mm256_maskz_loadu_ps, __m256, __mmask8, uint32_t)
PEFTKERN_MASKED_LOAD(_mm_maskz_loadu_ps, __m128, __mmask8, uint32_t)
PEFTKERN_MASKED_LOAD(_mm_maskz_loadu_epi8, __m128i, __mmask16, uint8_t)
#undef PEFTKERN_MASKED_LOAD
inline void _mm512_mask_storeu_ps(void* p, __mmask16 mask, __m512 x) {
  emulation::masked_store<uint32_t>(p, mask, x);
}
inline void _mm512_mask_storeu_epi16(void* p, __mmask32 mask, __m512i x) {
  emulation::masked_store<uint16_t>(p, mask, x);
}
inline __m512 _mm512_mask_i32gather_ps(__m512 x, __mmask16 mask, __m512i index, const void* p,
                                       int scale) {
  emulation::Lanes<float> r = emulation::lanes<float>(x);
  const emulation::Lanes<int32_t> at = emulation::lanes<int32_t>(index);
  for (int i = 0; i < 16; ++i) {
    if (mask >> i & 1) {
      std::memcpy(&r[i], static_cast<const char*>(p) + int64_t{at[i]} * scale, sizeof(float));
    }
  }
  return emulation::vector<__m512>(r);
}

// ---- constants

inline __m512 _mm512_set1_ps(float x) { return emulation::repeat<__m512>(x); }
inline __m512d _mm512_set1_pd(double x) { return emulation::repeat<__m512d>(x); }
inline __m512i _mm512_set1_epi64(int64_t x) { return emulation::repeat<__m512i>(x); }
inline __m512i _mm512_set1_epi32(int32_t x) { return emulation::repeat<__m512i>(x); }
inline __m512i _mm512_set1_epi16(int16_t x) { return emulation::repeat<__m512i>(x); }
inline __m512i _mm512_set1_epi8(int8_t x) { return emulation::repeat<__m512i>(x); }
inline __m512 _mm512_setzero_ps() { return _mm512_set1_ps(0.0f); }
inline __m512i _mm512_setzero_si512() { return _mm512_set1_epi32(0); }
template <class... Ints>
__m512i _mm512_set_epi32(Ints... from_last) {
  const int32_t x[] = {static_cast<int32_t>(from_last)...};
  static_assert(sizeof x == 64, "sixteen numbers");
  return emulation::each<__m512i, int32_t>([&](int i) { return x[15 - i]; });
}
template <class... Ints>
__m512i _mm512_set_epi64(Ints... from_last) {
  const int64_t x[] = {static_cast<int64_t>(from_last)...};
  static_assert(sizeof x == 64, "eight numbers");
  return emulation::each<__m512i, int64_t>([&](int i) { return x[7 - i]; });
}
inline __m512i _mm512_set4_epi32(int d, int c, int b, int a) {
  return _mm512_set_epi32(d, c, b, a, d, c, b, a, d, c, b, a, d, c, b, a);
}

// ---- arithmetic

#define PEFTKERN_UNARY(name, V, T, result)                   \
  inline V name(V x) {                                       \
    return emulation::map<T>(x, [](T a) { return result; }); \
  }
#define PEFTKERN_BINARY(name, V, T, result)                          \
  inline V name(V x, V y) {                                          \
    return emulation::map<T>(x, y, [](T a, T b) { return result; }); \
  }
#define PEFTKERN_SHIFT(name, T, result)                                                 \
  inline __m512i name(__m512i x, unsigned n) {                                          \
    return emulation::map<T>(x, [n](T a) { return n < 8 * sizeof a ? result : T{0}; }); \
  }
PEFTKERN_UNARY(_mm512_abs_ps, __m512, float, std::fabs(a))
PEFTKERN_UNARY(_mm512_abs_pd, __m512d, double, std::fabs(a))
PEFTKERN_UNARY(_mm512_sqrt_pd, __m512d, double, std::sqrt(a))
PEFTKERN_BINARY(_mm512_add_ps, __m512, float, a + b)
PEFTKERN_BINARY(_mm512_sub_ps, __m512, float, a - b)
PEFTKERN_BINARY(_mm512_mul_ps, __m512, float, a* b)
PEFTKERN_BINARY(_mm512_div_ps, __m512, float, a / b)
PEFTKERN_BINARY(_mm512_max_ps, __m512, float, a > b ? a : b)
PEFTKERN_BINARY(_mm512_min_ps, __m512, float, a < b ? a : b)
PEFTKERN_BINARY(_mm512_add_pd, __m512d, double, a + b)
PEFTKERN_BINARY(_mm512_sub_pd, __m512d, double, a - b)
PEFTKERN_BINARY(_mm512_mul_pd, __m512d, double, a* b)
PEFTKERN_BINARY(_mm512_div_pd, __m512d, double, a / b)
PEFTKERN_BINARY(_mm512_and_si512, __m512i, uint64_t, a& b)
PEFTKERN_BINARY(_mm512_or_si512, __m512i, uint64_t, a | b)
PEFTKERN_BINARY(_mm512_xor_si512, __m512i, uint64_t, a ^ b)
PEFTKERN_BINARY(_mm512_add_epi32, __m512i, uint32_t, a + b)
PEFTKERN_BINARY(_mm512_add_epi16, __m512i, uint16_t, a + b)
PEFTKERN_BINARY(_mm512_adds_epi16, __m512i, int16_t, emulation::saturated(a + b))
PEFTKERN_BINARY(_mm512_sllv_epi32, __m512i, uint32_t, b < 32 ? a << b : 0)
PEFTKERN_BINARY(_mm512_srlv_epi32, __m512i, uint32_t, b < 32 ? a >> b : 0)
PEFTKERN_SHIFT(_mm512_slli_epi32, uint32_t, a << n)
PEFTKERN_SHIFT(_mm512_srli_epi32, uint32_t, a >> n)
PEFTKERN_SHIFT(_mm512_slli_epi16, uint16_t, static_cast<uint16_t>(a << n))
PEFTKERN_SHIFT(_mm512_srli_epi16, uint16_t, static_cast<uint16_t>(a >> n))
#undef PEFTKERN_UNARY
#undef PEFTKERN_BINARY
#undef PEFTKERN_SHIFT

inline __m512 _mm512_fmadd_ps(__m512 x, __m512 y, __m512 z) {
  const auto a = emulation::lanes<float>(x), b = emulation::lanes<float>(y);
  const auto c = emulation::lanes<float>(z);
  return emulation::each<__m512, float>([&](int i) { return std::fma(a[i], b[i], c[i]); });
}
inline __m512d _mm512_fmadd_pd(__m512d x, __m512d y, __m512d z) {
  const auto a = emulation::lanes<double>(x), b = emulation::lanes<double>(y);
  const auto c = emulation::lanes<double>(z);
  return emulation::each<__m512d, double>([&](int i) { return std::fma(a[i], b[i], c[i]); });
}
inline __m512i _mm512_maddubs_epi16(__m512i x, __m512i y) {
  const auto a = emulation::lanes<uint8_t>(x);
  const auto b = emulation::lanes<int8_t>(y);
  return emulation::each<__m512i, int16_t>([&](int i) {
    return emulation::saturated(a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1]);
  });
}
inline __m512i _mm512_ternarylogic_epi64(__m512i x, __m512i y, __m512i z, int truth) {
  const auto a = emulation::lanes<uint64_t>(x), b = emulation::lanes<uint64_t>(y);
  const auto c = emulation::lanes<uint64_t>(z);
  return emulation::each<__m512i, uint64_t>([&](int i) {
    uint64_t r = 0;
    for (int k = 0; k < 8; ++k) {
      if (truth >> k & 1) {
        r |= (k & 4 ? a[i] : ~a[i]) & (k & 2 ? b[i] : ~b[i]) & (k & 1 ? c[i] : ~c[i]);
      }
    }
    return r;
  });
}
inline float _mm512_reduce_add_ps(__m512 x) {
  return emulation::reduce<float>(x, [](float a, float b) { return a + b; });
}
inline double _mm512_reduce_add_pd(__m512d x) {
  return emulation::reduce<double>(x, [](double a, double b) { return a + b; });
}
inline float _mm512_reduce_max_ps(__m512 x) {
  return emulation::reduce<float>(x, [](float a, float b) { return a > b ? a : b; });
}

// ---- masks

inline __mmask16 _mm512_cmp_ps_mask(__m512 x, __m512 y, int predicate) {
  return static_cast<__mmask16>(emulation::compare<float>(x, y, predicate));
}
inline __mmask8 _mm512_cmp_pd_mask(__m512d x, __m512d y, int predicate) {
  return static_cast<__mmask8>(emulation::compare<double>(x, y, predicate));
}
#define PEFTKERN_TEST(name, V, Mask, T, result)                                      \
  inline Mask name(V x, V y) {                                                       \
    const auto a = emulation::lanes<T>(x), b = emulation::lanes<T>(y);               \
    Mask mask = 0;                                                                   \
    for (size_t i = 0; i < sizeof x / sizeof(T); ++i) {                              \
      if (a.lane[i] result b.lane[i]) mask = static_cast<Mask>(mask | Mask{1} << i); \
    }                                                                                \
    return mask;                                                                     \
  }
PEFTKERN_TEST(_mm512_test_epi16_mask, __m512i, __mmask32, uint16_t, &)
PEFTKERN_TEST(_mm_test_epi8_mask, __m128i, __mmask16, uint8_t, &)
PEFTKERN_TEST(above, __m256i, __mmask8, uint32_t, >)
#undef PEFTKERN_TEST
inline __mmask8 _mm256_mask_cmpgt_epu32_mask(__mmask8 some, __m256i x, __m256i y) {
  return static_cast<__mmask8>(above(x, y) & some);
}
#define PEFTKERN_MASKED_MOVE(name, V, Mask, T) \
  inline V name(V x, Mask mask, V y) { return emulation::blend<T>(x, mask, y); }
PEFTKERN_MASKED_MOVE(_mm512_mask_mov_ps, __m512, __mmask16, uint32_t)
PEFTKERN_MASKED_MOVE(_mm512_mask_mov_pd, __m512d, __mmask8, uint64_t)
PEFTKERN_MASKED_MOVE(_mm512_mask_mov_epi32, __m512i, __mmask16, uint32_t)
PEFTKERN_MASKED_MOVE(_mm512_mask_mov_epi16, __m512i, __mmask32, uint16_t)
#undef PEFTKERN_MASKED_MOVE
inline __m512 _mm512_maskz_mov_ps(__mmask16 mask, __m512 x) {
  return _mm512_mask_mov_ps(_mm512_setzero_ps(), mask, x);
}
inline __m512i _mm512_maskz_mov_epi16(__mmask32 mask, __m512i x) {
  return _mm512_mask_mov_epi16(_mm512_setzero_si512(), mask, x);
}
inline __m512 _mm512_maskz_sub_ps(__mmask16 mask, __m512 x, __m512 y) {
  return _mm512_maskz_mov_ps(mask, _mm512_sub_ps(x, y));
}
inline __m512i _mm512_maskz_adds_epi16(__mmask32 mask, __m512i x, __m512i y) {
  return _mm512_maskz_mov_epi16(mask, _mm512_adds_epi16(x, y));
}
inline __m512i _mm512_mask_add_epi32(__m512i x, __mmask16 mask, __m512i y, __m512i z) {
  return _mm512_mask_mov_epi32(x, mask, _mm512_add_epi32(y, z));
}

// ---- lanes to other places

#define PEFTKERN_PERMUTE(name, V, T) \
  inline V name(__m512i index, V x) { return emulation::permute<T>(index, x); }
PEFTKERN_PERMUTE(_mm512_permutexvar_epi16, __m512i, uint16_t)
PEFTKERN_PERMUTE(_mm512_permutexvar_epi32, __m512i, uint32_t)
PEFTKERN_PERMUTE(_mm512_permutexvar_epi64, __m512i, uint64_t)
PEFTKERN_PERMUTE(_mm512_permutexvar_ps, __m512, uint32_t)
#undef PEFTKERN_PERMUTE
inline __m512i _mm512_mask_permutexvar_epi16(__m512i x, __mmask32 mask, __m512i index, __m512i y) {
  return _mm512_mask_mov_epi16(x, mask, _mm512_permutexvar_epi16(index, y));
}
inline __m512i _mm512_permutex2var_epi16(__m512i x, __m512i index, __m512i y) {
  return emulation::permute<uint16_t>(x, index, y);
}
inline __m512 _mm512_permutex2var_ps(__m512 x, __m512i index, __m512 y) {
  return emulation::permute<uint32_t>(x, index, y);
}
inline __m512 _mm512_permutevar_ps(__m512 x, __m512i index) {
  const auto a = emulation::lanes<uint32_t>(x), at = emulation::lanes<uint32_t>(index);
  return emulation::each<__m512, uint32_t>([&](int i) { return a[i / 4 * 4 + at[i] % 4]; });
}
inline __m512i _mm512_shuffle_epi8(__m512i x, __m512i index) {
  const auto a = emulation::lanes<uint8_t>(x), at = emulation::lanes<uint8_t>(index);
  return emulation::each<__m512i, uint8_t>(
      [&](int i) { return at[i] & 0x80 ? 0 : a[i / 16 * 16 + at[i] % 16]; });
}
// The type of its order would find immintrin.h's function, too.
#define _mm512_shuffle_epi32 shuffle_epi32
inline __m512i shuffle_epi32(__m512i x, int order) {
  const auto a = emulation::lanes<uint32_t>(x);
  return emulation::each<__m512i, uint32_t>(
      [&](int i) { return a[i / 4 * 4 + (order >> i % 4 * 2 & 3)]; });
}
inline __m512 _mm512_shuffle_ps(__m512 x, __m512 y, int order) {
  const auto a = emulation::lanes<uint32_t>(x), b = emulation::lanes<uint32_t>(y);
  return emulation::each<__m512, uint32_t>(
      [&](int i) { return (i % 4 < 2 ? a : b)[i / 4 * 4 + (order >> i % 4 * 2 & 3)]; });
}
inline __m512i _mm512_shuffle_i64x2(__m512i x, __m512i y, int order) {
  return emulation::shuffle_quarters(x, y, order);
}
inline __m512 _mm512_shuffle_f32x4(__m512 x, __m512 y, int order) {
  return emulation::shuffle_quarters(x, y, order);
}
#define PEFTKERN_UNPACK(suffix, V, T)                                                       \
  inline V _mm512_unpacklo_##suffix(V x, V y) { return emulation::unpack<T>(x, y, false); } \
  inline V _mm512_unpackhi_##suffix(V x, V y) { return emulation::unpack<T>(x, y, true); }
PEFTKERN_UNPACK(epi8, __m512i, uint8_t)
PEFTKERN_UNPACK(epi16, __m512i, uint16_t)
PEFTKERN_UNPACK(epi32, __m512i, uint32_t)
PEFTKERN_UNPACK(epi64, __m512i, uint64_t)
PEFTKERN_UNPACK(ps, __m512, uint32_t)
#undef PEFTKERN_UNPACK

// ---- other widths, other types

inline __m512 _mm512_castsi512_ps(__m512i x) { return emulation::load<__m512>(&x); }
inline __m512i _mm512_castps_si512(__m512 x) { return emulation::load<__m512i>(&x); }
inline __m256i _mm512_castsi512_si256(__m512i x) { return emulation::extract<__m256i>(x, 0); }
inline __m256 _mm512_castps512_ps256(__m512 x) { return emulation::extract<__m256>(x, 0); }
inline __m512i _mm512_castsi256_si512(__m256i x) { return emulation::widen<__m512i>(x); }
inline __m512i _mm512_castsi128_si512(__m128i x) { return emulation::widen<__m512i>(x); }
inline __m512 _mm512_castps256_ps512(__m256 x) { return emulation::widen<__m512>(x); }
#define PEFTKERN_PARTS(read, write, V, W)                                 \
  inline W read(V x, int part) { return emulation::extract<W>(x, part); } \
  inline V write(V x, W y, int part) { return emulation::insert(x, y, part); }
PEFTKERN_PARTS(_mm512_extracti64x4_epi64, _mm512_inserti64x4, __m512i, __m256i)
PEFTKERN_PARTS(_mm512_extractf32x8_ps, _mm512_insertf32x8, __m512, __m256)
#undef PEFTKERN_PARTS
inline __m512i _mm512_broadcast_i64x4(__m256i x) { return emulation::repeat<__m512i>(x); }
inline __m512i _mm512_broadcast_i32x4(__m128i x) { return emulation::repeat<__m512i>(x); }
inline __m512 _mm512_broadcast_f32x8(__m256 x) { return emulation::repeat<__m512>(x); }
inline __m512 _mm512_broadcast_f32x4(__m128 x) { return emulation::repeat<__m512>(x); }
inline __m512i _mm512_broadcastd_epi32(__m128i x) {
  return emulation::repeat<__m512i>(_mm_cvtsi128_si32(x));
}
inline __m512i _mm512_mask_broadcast_i64x2(__m512i x, __mmask8 mask, __m128i y) {
  return emulation::blend<uint64_t>(x, mask, emulation::repeat<__m512i>(y));
}

#define PEFTKERN_CONVERT(name, V, W, From, To)                                         \
  inline V name(W x) {                                                                 \
    const auto a = emulation::lanes<From>(x);                                          \
    emulation::Lanes<To> r = {};                                                       \
    for (size_t i = 0; i < sizeof x / sizeof(From) && i < sizeof(V) / sizeof(To); ++i) \
      r.lane[i] = static_cast<To>(a.lane[i]);                                          \
    return emulation::vector<V>(r);                                                    \
  }
PEFTKERN_CONVERT(_mm512_cvtepu8_epi32, __m512i, __m128i, uint8_t, uint32_t)
PEFTKERN_CONVERT(_mm512_cvtepu16_epi32, __m512i, __m256i, uint16_t, uint32_t)
PEFTKERN_CONVERT(_mm512_cvtepi32_epi16, __m256i, __m512i, uint32_t, uint16_t)
PEFTKERN_CONVERT(_mm512_cvtepi32_epi8, __m128i, __m512i, uint32_t, uint8_t)
PEFTKERN_CONVERT(_mm512_cvtepi16_epi8, __m256i, __m512i, uint16_t, uint8_t)
PEFTKERN_CONVERT(_mm512_cvtps_pd, __m512d, __m256, float, double)
PEFTKERN_CONVERT(_mm512_cvtpd_ps, __m256, __m512d, double, float)
#undef PEFTKERN_CONVERT
inline __m256i _mm512_cvtps_ph(__m512 x, int) {
  return _mm256_set_m128i(_mm256_cvtps_ph(_mm512_extractf32x8_ps(x, 1), 0),
                          _mm256_cvtps_ph(_mm512_extractf32x8_ps(x, 0), 0));
}
inline __m512 _mm512_cvtph_ps(__m256i x) {
  return _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_cvtph_ps(_mm256_castsi256_si128(x))),
                            _mm256_cvtph_ps(_mm256_extracti128_si256(x, 1)), 1);
}

// ---- bfloat16

inline emulation::HalfBFloat16s _mm512_cvtneps_pbh(__m512 x) {
  const auto a = emulation::lanes<float>(x);
  uint16_t r[16];
  for (int i = 0; i < 16; ++i) r[i] = emulation::to_bf16(a[i]);
  return emulation::load<emulation::HalfBFloat16s>(r);
}
inline emulation::BFloat16s _mm512_cvtne2ps_pbh(__m512 high, __m512 low) {
  const auto a = emulation::lanes<float>(low), b = emulation::lanes<float>(high);
  uint16_t r[32];
  for (int i = 0; i < 32; ++i) r[i] = emulation::to_bf16(i < 16 ? a[i] : b[i - 16]);
  return emulation::load<emulation::BFloat16s>(r);
}
inline __m512 _mm512_dpbf16_ps(__m512 sums, emulation::BFloat16s x, emulation::BFloat16s y) {
  const auto a = emulation::lanes<uint16_t>(x), b = emulation::lanes<uint16_t>(y);
  const auto c = emulation::lanes<float>(sums);
  const auto product = [&](int i) {
    return emulation::from_bf16(a[i]) * emulation::from_bf16(b[i]);
  };
  return emulation::each<__m512, float>(
      [&](int i) { return c[i] + product(2 * i) + product(2 * i + 1); });
}

// ---- tiles of 16 rows of 64 bytes

inline void _tile_loadconfig(const void*) { emulation::tiles = {{}, true}; }
inline void _tile_release() { emulation::tiles.configured = false; }
inline void _tile_zero(int i) { std::memset(emulation::tile(i), 0, 1024); }
inline void _tile_loadd(int i, const void* p, int64_t stride) {
  for (int row = 0; row < 16; ++row) {
    std::memcpy(emulation::tile(i) + 64 * row, static_cast<const char*>(p) + row * stride, 64);
  }
}
inline void _tile_stored(int i, void* p, int64_t stride) {
  for (int row = 0; row < 16; ++row) {
    std::memcpy(static_cast<char*>(p) + row * stride, emulation::tile(i) + 64 * row, 64);
  }
}
inline void _tile_dpbf16ps(int sums, int x, int y) {
  float* c = emulation::tile<float>(sums);
  const uint16_t *a = emulation::tile<uint16_t>(x), *b = emulation::tile<uint16_t>(y);
  float left[2], right[2];
  for (int m = 0; m < 16; ++m) {
    for (int k = 0; k < 16; ++k) {
      for (int i = 0; i < 2; ++i) left[i] = emulation::from_bf16(a[32 * m + 2 * k + i]);
      for (int n = 0; n < 16; ++n) {
        for (int i = 0; i < 2; ++i) right[i] = emulation::from_bf16(b[32 * k + 2 * n + i]);
        c[16 * m + n] += left[0] * right[0] + left[1] * right[1];
      }
    }
  }
}

}  // namespace
}  // namespace peftkern
