// The scales of blocks shorter than 64 weights in AVX-512's lanes, and e2m1 codes times them in
// integers: such a code is 1 or 1.5 times a power of two, so that rounding s and 1.5 s to bfloat16
// rounds all values of a block, and the power is added to the exponent.
#pragma once

#include "nf4_decode.h"

#if defined(__AVX512F__)

namespace peftkern {
namespace {

inline __m512i load_bytes(const uint8_t* p, int64_t n) {
  if (n >= 64) return _mm512_loadu_si512(p);
  return _mm512_maskz_loadu_epi8((__mmask64{1} << n) - 1, p);
}

// Stream v of packed words: of each the weight that shifting it yields.
inline __m512i stream_words(__m512i words, int v) {
  return v == 1 ? words : _mm512_srli_epi16(words, v == 0 ? 4 : v == 2 ? 12 : 8);
}

// Where packed weights come from: 128 of a row, 64 each of two rows, or 128 of a row in decode128's
// order of dwords.
enum class PackedOrder { kRow, kPair, kSpread };

// Which of eight scales belongs where: those of a row's 128 weights, or of two rows' 64, four each.
// By dword of packed weights, by word of a stream, and a stream's words among those of its low and
// its high halves.
struct alignas(64) ScaleLanes {
  int32_t dword[16];
  uint16_t word[32], order[32];
};
constexpr ScaleLanes scale_lanes(PackedOrder order, int log2) {
  ScaleLanes lanes = {};
  const bool pair = order == PackedOrder::kPair;
  for (int d = 0; d < 16; ++d) {
    lanes.dword[d] = pair ? d / 8 * 4 + (d % 8 * 8 >> log2) : d * 8 >> log2;
  }
  for (int t = 0; t < 32; ++t) {
    const int row = pair ? t % 2 : 0, word = pair ? t / 2 : t;
    const int dword = order == PackedOrder::kSpread ? t / 2 % 4 * 4 + t / 8 : word / 2;
    lanes.word[t] = static_cast<uint16_t>(row * 4 + ((dword * 2 + word % 2) * 4 >> log2));
    lanes.order[t] = static_cast<uint16_t>(word % 2 * 16 + row * 8 + word / 2);
  }
  return lanes;
}
constexpr ScaleLanes kScaleLanes[3][3] = {
    {scale_lanes(PackedOrder::kRow, 4), scale_lanes(PackedOrder::kRow, 5),
     scale_lanes(PackedOrder::kRow, 6)},
    {scale_lanes(PackedOrder::kPair, 4), scale_lanes(PackedOrder::kPair, 5),
     scale_lanes(PackedOrder::kPair, 6)},
    {scale_lanes(PackedOrder::kSpread, 4), scale_lanes(PackedOrder::kSpread, 5),
     scale_lanes(PackedOrder::kSpread, 6)}};
inline const ScaleLanes& lanes_of(PackedOrder order, int log2) {
  return kScaleLanes[static_cast<int>(order)][log2 - 4];
}

// Whether all used scales are from 2^-125 to 2^125, for which E2M1Group holds.
inline bool ordinary(__m256 scale, __mmask8 used) {
  const __m256i least = _mm256_set1_epi32(2 << 23), range = _mm256_set1_epi32(250 << 23);
  const __m256i above = _mm256_sub_epi32(_mm256_castps_si256(scale), least);
  return _mm256_mask_cmpgt_epu32_mask(used, above, range) == 0;
}

inline __m256i bf16_words(__m512 x) {
#if defined(__AVX512BF16__)
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x));
#else
  return _mm512_cvtepi32_epi16(bf16_bits(x));
#endif
}

// What is added to the bits of a scale: kE2M1Bias moves those of ordinary scales below all others,
// and every code but zero's moves them back, with its power of two and its sign; zero's goes beyond
// the least number, which stays there as -0. 1.5's is one more, to tell it by, than it should be,
// and its scale one less; or it is all of it where scales are powers of two.
struct alignas(64) E2M1Shifts {
  int16_t of[32];
};
constexpr int kE2M1Bias = 512 - 32768;
constexpr E2M1Shifts e2m1_shifts(bool powers) {
  E2M1Shifts shifts = {};
  for (int i = 0; i < 32; ++i) {
    const int code = i % 8, exponent = code < 2 ? -1 : code / 2 - 1;
    const bool three_halves = code > 1 && code % 2;
    const int own = exponent * 128 + (three_halves ? powers ? 64 : 1 : 0);
    const int back = i % 16 < 8 ? -kE2M1Bias : -512;
    shifts.of[i] = static_cast<int16_t>(code == 0 ? -32768 : own + back);
  }
  return shifts;
}
constexpr E2M1Shifts kE2M1Shifts[2] = {e2m1_shifts(false), e2m1_shifts(true)};

// Four streams of bfloat16 weights. kPowers: of scales that are powers of two.
template <bool kPowers>
struct E2M1Group {
  __m512i words, shifts, once, half_more;
  E2M1Group(__m512i packed, const ScaleLanes& lanes, __m256 scale)
      : words(packed), shifts(_mm512_load_si512(kE2M1Shifts[kPowers].of)) {
    const __m512i word = _mm512_load_si512(lanes.word);
    const __m512 one = _mm512_set1_ps(1.0f);
    const __m512 both = _mm512_mul_ps(_mm512_broadcast_f32x8(scale),
                                      _mm512_mask_mov_ps(one, 0xff00, _mm512_set1_ps(1.5f)));
    const __m256i bias = _mm256_set_m128i(_mm_set1_epi16(static_cast<int16_t>(kE2M1Bias - 1)),
                                          _mm_set1_epi16(static_cast<int16_t>(kE2M1Bias)));
    const __m512i bits = _mm512_castsi256_si512(_mm256_add_epi16(bf16_words(both), bias));
    once = _mm512_permutexvar_epi16(word, bits);
    half_more = kPowers
                    ? once
                    : _mm512_permutexvar_epi16(_mm512_or_si512(word, _mm512_set1_epi16(8)), bits);
  }
  // +0 is -0.
  __m512i at(int v) const {
    const __m512i shift = shift_of(v);
    return _mm512_adds_epi16(scale_of(shift), shift);
  }
  // Bit for bit.
  __m512i exact_at(int v) const {
    const int nibble = 15 << (v == 1 ? 0 : v == 0 ? 4 : v == 2 ? 12 : 8);
    const __mmask32 some =
        _mm512_test_epi16_mask(words, _mm512_set1_epi16(static_cast<int16_t>(nibble)));
    const __m512i shift = shift_of(v);
    return _mm512_maskz_adds_epi16(some, scale_of(shift), shift);
  }

 private:
  __m512i shift_of(int v) const { return _mm512_permutexvar_epi16(stream_words(words, v), shifts); }
  __m512i scale_of(__m512i shift) const {
    if (kPowers) return once;
    const __mmask32 more = _mm512_test_epi16_mask(shift, _mm512_set1_epi16(1));
    return _mm512_mask_mov_epi16(once, more, half_more);
  }
};

}  // namespace
}  // namespace peftkern

#endif
