// Dot products of packed weight rows with a few rows of x: what decoding one token costs. Weights
// are looked up as they stream by, multiplied as float32 codes, and each block's sum is scaled by
// its absmax, so that no weight is ever rounded. Compiled once per instruction set.
//
// Bytes per weight: 0.52. AVX-512 spends 27 vector instructions on 128 weights for one row
// of x: a load, 7 shifts, 8 look-ups, 9 multiply-adds and 2 scales.
#pragma once

#include "nf4_panel.h"

namespace peftkern {
namespace {

constexpr int64_t kDotGroup = 128;  // elements that come in an order of their own

// Position in x of element j of a group: AVX-512 takes the weights as eight streams, number l of
// stream j being element 8 l + j, because shifting the sixteen packed dwords yields them so.
inline int64_t dot_position(int64_t j) {
#if defined(__AVX512F__)
  return j % 8 * 16 + j / 8;
#else
  return j;
#endif
}

// A row of x as float32 in the order of the groups, zero-padded to whole groups.
inline void prepare_dot(const void* in, DType dtype, int64_t i, int64_t n, float* out) {
  for (int64_t g = 0; g < n; g += kDotGroup, out += kDotGroup) {
    float values[kDotGroup] = {};
    for (int64_t j = 0; j < min64(kDotGroup, n - g); j += 16) {
      const int count = static_cast<int>(min64(16, n - g - j));
      f32_store(values + j, load_any(in, dtype, i + g + j, count));
    }
    for (int64_t j = 0; j < kDotGroup; ++j) out[dot_position(j)] = values[j];
  }
}

// acc[m] += the group's weights times row m of x; the first 64 and the last 64 weights lie in
// blocks with these absmax.
template <int kRows>
inline void dot_group(const uint8_t* packed, int64_t bytes, float first, float second,
                      const float* x, int64_t stride, F32x16* acc) {
#if defined(__AVX512F__)
  const __m512i words = bytes >= 64 ? _mm512_loadu_si512(packed)
                                    : _mm512_maskz_loadu_epi8((__mmask64{1} << bytes) - 1, packed);
  const __m512 code = _mm512_loadu_ps(kNF4Code);
  const __m512 scale = _mm512_mask_broadcastss_ps(_mm512_set1_ps(first), 0xff00,
                                                  _mm_set_ss(second));  // eight dwords a block
  __m512 sum[kRows];
  // vpermps reads the low four bits of a lane only.
  const auto add = [&](int stream, __m512i shifted) {
    const __m512 w = _mm512_permutexvar_ps(shifted, code);
    for (int m = 0; m < kRows; ++m) {
      const __m512 v = _mm512_loadu_ps(x + m * stride + 16 * stream);
      sum[m] = stream == 0 ? _mm512_mul_ps(w, v) : _mm512_fmadd_ps(w, v, sum[m]);
    }
  };
  add(0, _mm512_srli_epi32(words, 4));
  add(1, words);
  add(2, _mm512_srli_epi32(words, 12));
  add(3, _mm512_srli_epi32(words, 8));
  add(4, _mm512_srli_epi32(words, 20));
  add(5, _mm512_srli_epi32(words, 16));
  add(6, _mm512_srli_epi32(words, 28));
  add(7, _mm512_srli_epi32(words, 24));
  for (int m = 0; m < kRows; ++m) acc[m].v = _mm512_fmadd_ps(sum[m], scale, acc[m].v);
#else
  uint8_t tail[64] = {};
  if (bytes < 64) {
    std::memcpy(tail, packed, static_cast<size_t>(bytes));
    packed = tail;
  }
  const F32x16 code = f32_load(kNF4Code);
  for (int half = 0; half < 2; ++half) {
    F32x16 sum[kRows];
    for (F32x16& s : sum) s = f32_zero();
    for (int j = half * 64; j < half * 64 + 64; j += 16) {
      const F32x16 w = f32_lookup(packed + j / 2, code);
      for (int m = 0; m < kRows; ++m) sum[m] = f32_fma(w, f32_load(x + m * stride + j), sum[m]);
    }
    const F32x16 scale = f32_set1(half == 0 ? first : second);
    for (int m = 0; m < kRows; ++m) acc[m] = f32_fma(sum[m], scale, acc[m]);
  }
#endif
}

// acc[m] += n weights from `element` on times row m of the prepared x.
template <int kRows>
inline void dot(const NF4View& w, const Absmax& absmax, int64_t element, int64_t n, const float* x,
                int64_t stride, F32x16* acc) {
  if (element % 64 != 0 || w.blocksize < 64) {  // groups that straddle blocks: one by one
    for (int64_t g = 0; g < n; g += kDotGroup, x += kDotGroup) {
      float values[kDotGroup] = {};
      for (int64_t j = 0; j < min64(kDotGroup, n - g); ++j) {
        values[dot_position(j)] = weight_at(w, absmax, element + g + j, DType::kFloat32);
      }
      for (int64_t j = 0; j < kDotGroup; j += 16) {
        const F32x16 v = f32_load(values + j);
        for (int m = 0; m < kRows; ++m) acc[m] = f32_fma(v, f32_load(x + m * stride + j), acc[m]);
      }
    }
    return;
  }
  const uint8_t* packed = w.packed + element / 2;
  const int shift = absmax.log2 - 6;
  const auto scale = [&](int64_t block) { return absmax.values[(block >> shift) - absmax.first]; };
  int64_t block = element >> 6, left = n;
  for (; left >= kDotGroup; left -= kDotGroup, block += 2, packed += 64, x += kDotGroup) {
    __builtin_prefetch(packed + kDotAhead);
    dot_group<kRows>(packed, 64, scale(block), scale(block + 1), x, stride, acc);
  }
  if (left > 0) {
    dot_group<kRows>(packed, (left + 1) / 2, scale(block), left > 64 ? scale(block + 1) : 0.0f, x,
                     stride, acc);
  }
}

}  // namespace
}  // namespace peftkern
