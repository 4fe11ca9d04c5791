// Operands of grouped products as tiles of bfloat16 pairs. A float32 operand is the sum of three
// bfloat16 ones, exact but for its last bits, where the result is float32 (s and gradients), and of
// two where it is rounded to bfloat16: there, a dword of s holds both halves of one value and meets
// a factor's upper halves in one step, its lower ones in the next.
#pragma once

#include "grouped_tiles.h"
#include "nf4_bf16.h"

namespace peftkern {
namespace {
namespace grouped {

// Sixteen floats as bfloat16 in the low half of each lane.
inline __m512i upper_half(__m512 x) {
  return _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
}
// x less its upper half; zero where that is not finite.
inline __m512 remainder(__m512 x, __m512i half) {
  const __m512 upper = _mm512_castsi512_ps(_mm512_slli_epi32(half, 16));
  const __mmask16 finite =
      _mm512_cmp_ps_mask(_mm512_abs_ps(upper), _mm512_set1_ps(bits_float(0x7f800000)), _CMP_LT_OQ);
  return _mm512_maskz_sub_ps(finite, x, upper);
}
inline __m512i pair_up(__m512i low, __m512i high) {
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

struct BFloat16Tiles {
  static constexpr int64_t kStep = 32;
  static constexpr int kParts = 3;
  static constexpr int kRankSteps = 2;
  static constexpr int64_t kBlocks = 2;
  static constexpr int64_t kFewRows = 0;  // tiles throughout

  static void lanes(const void* in, DType, const int64_t* starts, int64_t rows, int64_t columns,
                    uint32_t* pair) {
    const __m512i ramp = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    // Word pairs (i, 32 + i): a word of the first row beside the same word of the second.
    const __m512i low =
        _mm512_or_si512(ramp, _mm512_slli_epi32(_mm512_add_epi32(ramp, _mm512_set1_epi32(32)), 16));
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    const __mmask32 mask = mask32(columns);
    const uint16_t* p = static_cast<const uint16_t*>(in);
    for (int64_t i = 0; i < 32; i += 2, pair += 16) {
      const __m512i a =
          i < rows ? _mm512_maskz_loadu_epi16(mask, p + starts[i]) : _mm512_setzero_si512();
      const __m512i b =
          i + 1 < rows ? _mm512_maskz_loadu_epi16(mask, p + starts[i + 1]) : _mm512_setzero_si512();
      _mm512_storeu_si512(pair, _mm512_permutex2var_epi16(a, low, b));
      _mm512_storeu_si512(pair + kTile, _mm512_permutex2var_epi16(a, high, b));
    }
  }

  static void turned(const void* in, DType, const int64_t* starts, int64_t rows, int64_t n,
                     uint32_t* tile) {
    const __mmask32 mask = mask32(n);
    const uint16_t* p = static_cast<const uint16_t*>(in);
    __m512i lines[16];
    for (int i = 0; i < 16; ++i) {
      lines[i] = i < rows ? _mm512_maskz_loadu_epi16(mask, p + starts[i]) : _mm512_setzero_si512();
    }
    store_transposed_rows(lines, tile);
  }

  static void store(void* out, DType, int64_t i, const F32x16& a, const F32x16& b, int64_t n) {
    const __m512i values = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b.v, a.v));
    _mm512_mask_storeu_epi16(static_cast<uint16_t*>(out) + i, mask32(n), values);
  }

  // Two parts as a pair of tiles, the third `third` dwords further.
  static void store_parts(const __m512i (&lines)[3][16], uint32_t* out, int64_t third) {
    for (int part = 0; part < 3; ++part) {
      uint32_t* tile = out + (part < 2 ? part * kTile : third);
      transpose_tile(reinterpret_cast<const uint32_t*>(lines[part]), 16, tile);
    }
  }

  static void shrink_lanes(const float* blocks, uint32_t* out, int64_t third) {
    __m512i lines[3][16];
    for (int i = 0; i < 16; ++i) {
      __m512 a = _mm512_loadu_ps(blocks + 16 * i), b = _mm512_loadu_ps(blocks + kTile + 16 * i);
      for (int part = 0; part < 3; ++part) {
        const __m512i half = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a));
        lines[part][i] = half;
        a = remainder(a, _mm512_cvtepu16_epi32(_mm512_castsi512_si256(half)));
        b = remainder(b, _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(half, 1)));
      }
    }
    store_parts(lines, out, third);
  }

  static void expand_lanes(const float* block, uint32_t* out) {
    for (int i = 0; i < 16; ++i) {
      const __m512 x = _mm512_loadu_ps(block + 16 * i);
      const __m512i upper = upper_half(x), lower = upper_half(remainder(x, upper));
      _mm512_storeu_si512(out + 16 * i, pair_up(upper, upper));
      _mm512_storeu_si512(out + kPair + 16 * i, pair_up(lower, lower));
    }
  }

  static void expand_row(const F32x16& s, uint32_t* out) {
    const __m512i upper = upper_half(s.v), lower = upper_half(remainder(s.v, upper));
    _mm512_storeu_si512(out, pair_up(upper, lower));
    _mm512_storeu_si512(out + kPair, pair_up(upper, lower));
  }

  // s[32][16]
  static void outer_rows(const float* s, uint32_t* out, int64_t third) {
    __m512i lines[3][16];
    for (int i = 0; i < 16; ++i) {
      __m512 a = _mm512_loadu_ps(s + 32 * i), b = _mm512_loadu_ps(s + 32 * i + 16);
      for (int part = 0; part < 3; ++part) {
        const __m512i half_a = upper_half(a), half_b = upper_half(b);
        lines[part][i] = pair_up(half_a, half_b);
        a = remainder(a, half_a), b = remainder(b, half_b);
      }
    }
    store_parts(lines, out, third);
  }
};

}  // namespace grouped
}  // namespace
}  // namespace peftkern
