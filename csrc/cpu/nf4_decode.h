// Tables of the sixteen values that a block can take, and lookups in them; compiled once per
// instruction set.
#pragma once

#include "load_store.h"
#include "peftkern/nf4.h"

namespace peftkern {
namespace {

// Codes of int4 minus 8, which is the zero of blocks that have none.
constexpr float kCenteredInt4[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
constexpr const float* kCodes[kFormatCount] = {kNF4Code, kFP4Code, kE2M1Code, kE2M1Code,
                                               kUInt4Code};

// What a block's scale multiplies, once its zero is subtracted.
inline const float* codes_of(const NF4View& w) {
  const bool centered = w.format == Format::kINT4 && !w.zero;
  return centered ? kCenteredInt4 : kCodes[static_cast<int>(w.format)];
}

inline F32x16 round_to(F32x16 x, DType dtype) {
  if (dtype == DType::kBFloat16) return f32_round_bf16(x);
  if (dtype == DType::kFloat16) return f32_round_fp16(x);
  return x;
}

// The values of blocks as float32, or as the values they have in a smaller type.
struct BlockTables {
  const F32x16 codes;
  const float* zero;  // of blocks by their number; null: none
  DType dtype;
  BlockTables(const NF4View& w, DType type)
      : codes(f32_load(codes_of(w))), zero(w.zero), dtype(type) {}
  F32x16 of(int64_t block, float scale) const {
    const F32x16 values = zero ? f32_add(codes, f32_set1(-zero[block])) : codes;
    return round_to(f32_mul(values, f32_set1(scale)), dtype);
  }
};

#if defined(__AVX512F__)

inline __m256i table16(__m512 codes, float scale, DType dtype) {  // sixteen 16-bit values
  const __m512 table = _mm512_mul_ps(codes, _mm512_set1_ps(scale));
  if (dtype == DType::kBFloat16) return _mm512_cvtepi32_epi16(bf16_bits(table));
  return _mm512_cvtps_ph(table, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

// 128 weights of a 16-bit type, in order, from 64 packed bytes. `table` holds the values of the
// first 64 weights in its low half and those of the last 64 in its high half. vpermw reads five
// index bits: four are the nibble, the fifth says which half.
template <bool kLowFirst>
inline void decode128(__m512i packed, __m512i table, __m512i out[4]) {
  // Source dword 4j + lane goes to dword j of each lane, so that the unpacks below end in order.
  const __m512i spread = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
  const __m512i half = _mm512_set4_epi32(0x00100010, 0x00100010, 0, 0);
  const __m512i nibble = _mm512_set1_epi16(15);
  const __m512i w = _mm512_permutexvar_epi32(spread, packed);
  constexpr int kAndOr = 0xea;  // (a & b) | c
  const auto value = [&](__m512i shifted) {
    return _mm512_permutexvar_epi16(_mm512_ternarylogic_epi64(shifted, nibble, half, kAndOr),
                                    table);
  };
  const __m512i low0 = value(w), low1 = value(_mm512_srli_epi16(w, 8));
  const __m512i high0 = value(_mm512_srli_epi16(w, 4)), high1 = value(_mm512_srli_epi16(w, 12));
  const __m512i v0 = kLowFirst ? low0 : high0, v1 = kLowFirst ? high0 : low0;
  const __m512i v2 = kLowFirst ? low1 : high1, v3 = kLowFirst ? high1 : low1;
  const __m512i low01 = _mm512_unpacklo_epi16(v0, v1), high01 = _mm512_unpackhi_epi16(v0, v1);
  const __m512i low23 = _mm512_unpacklo_epi16(v2, v3), high23 = _mm512_unpackhi_epi16(v2, v3);
  out[0] = _mm512_unpacklo_epi32(low01, low23);
  out[1] = _mm512_unpackhi_epi32(low01, low23);
  out[2] = _mm512_unpacklo_epi32(high01, high23);
  out[3] = _mm512_unpackhi_epi32(high01, high23);
}

inline __m512i join(__m256i low, __m256i high) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

#endif

}  // namespace
}  // namespace peftkern
