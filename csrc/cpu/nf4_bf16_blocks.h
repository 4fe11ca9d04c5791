// Packed weights as vectors of bfloat16, for the instruction sets with bfloat16 products: 128
// weights of a row, or 64 each of two rows, as four streams. Stream v holds every fourth weight: of
// a packed word the one that shifting it yields, which is number v of its four where high nibbles
// come first, and v ^ 1 where low ones do.
//
// Blocks of 64 weights and more have tables of their values, two in a register (vpermw reads five
// index bits: four are the nibble, the fifth chooses the table). Shorter blocks would need more
// tables than that. Their scales are spread over the lanes instead, and meet the codes as float32,
// or, where codes are e2m1, in integers: such a code is 1 or 1.5 times a power of two, so that
// rounding s and 1.5 s rounds all values of a block, and the power is added to the exponent. All
// round once to bfloat16; instructions for 128 weights (gcc 12): tables 21, e2m1 with scales that
// are powers of two 21, with others 34, float32 47.
#pragma once

#include "nf4_panel.h"

namespace peftkern {
namespace {

inline __m512i load_bytes(const uint8_t* p, int64_t n) {
  if (n >= 64) return _mm512_loadu_si512(p);
  return _mm512_maskz_loadu_epi8((__mmask64{1} << n) - 1, p);
}
inline __mmask32 mask32(int64_t n) {
  return n >= 32 ? ~__mmask32{0} : (n <= 0 ? 0 : (__mmask32{1} << n) - 1);
}

// The order of words of both rows, one after the other, in which they alternate.
inline __m512i alternate(const uint8_t* first, const uint8_t* second) {
  const __m512i ramp = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i alternating =
      _mm512_or_si512(ramp, _mm512_slli_epi32(_mm512_add_epi32(ramp, _mm512_set1_epi32(16)), 16));
  const __m512i rows = join(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(first)),
                            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(second)));
  return _mm512_permutexvar_epi16(alternating, rows);
}

inline __m512i stream_words(__m512i words, int v) {
  return v == 1 ? words : _mm512_srli_epi16(words, v == 0 ? 4 : v == 2 ? 12 : 8);
}

// ---- tables

// kZero: of blocks that have zeros.
template <bool kZero>
struct BF16Tables {
  const NF4View& w;
  const Absmax& absmax;
  const __m512 codes;
  BF16Tables(const NF4View& view, const Absmax& scales)
      : w(view), absmax(scales), codes(_mm512_loadu_ps(codes_of(view))) {}

  __m512 values(int64_t element, float scale) const {
    if (!kZero) return _mm512_mul_ps(codes, _mm512_set1_ps(scale));
    const __m512 zero = _mm512_set1_ps(w.zero[element >> absmax.log2]);
    return _mm512_mul_ps(_mm512_sub_ps(codes, zero), _mm512_set1_ps(scale));
  }
  // The values of the blocks of two elements, with these scales.
  __m512i of(int64_t first, float low, int64_t second, float high) const {
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(values(second, high), values(first, low)));
  }
};

// `second` has the fifth index bit of each word.
inline __m512i bf16_stream(__m512i words, __m512i table, int v, __m512i second) {
  constexpr int kAndOr = 0xea;  // (a & b) | c
  return _mm512_permutexvar_epi16(
      _mm512_ternarylogic_epi64(stream_words(words, v), _mm512_set1_epi16(15), second, kAndOr),
      table);
}

// Of 128 weights, those of the second 64-block in the high half.
inline __m512i bf16_stream(__m512i words, __m512i table, int v) {
  return bf16_stream(words, table, v,
                     _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1));
}

// 64 weights each of two rows, both whole blocks: dword t of stream v is a pair of elements 4 t +
// v.
struct RowPair {
  __m512i words, table;
  __m512i at(int v) const { return bf16_stream(words, table, v, _mm512_set1_epi32(16 << 16)); }
};

template <bool kZero>
struct TablePairs {
  const BF16Tables<kZero> tables;
  const int64_t K;
  TablePairs(const NF4View& w, const Absmax& absmax, int64_t columns)
      : tables(w, absmax), K(columns) {}
  void operator()(int64_t element, __m512i v[4]) const {
    const uint8_t* packed = tables.w.packed + element / 2;
    const RowPair pair = {
        alternate(packed, packed + K / 2),
        tables.of(element, tables.absmax.at(element), element + K, tables.absmax.at(element + K))};
    for (int j = 0; j < 4; ++j) v[j] = pair.at(j);
  }
};

// ---- scales spread over the lanes

// Of the eight scales that a register holds: those of a row's 128 weights, or of two rows' 64, four
// each. By dword of packed weights, by word of a stream, and the words of a stream among those of
// its low and its high halves.
struct alignas(64) ScaleLanes {
  int32_t dword[16];
  uint16_t word[32], order[32];
};
constexpr ScaleLanes scale_lanes(bool pairs, int log2) {
  ScaleLanes lanes = {};
  for (int d = 0; d < 16; ++d) {
    lanes.dword[d] = pairs ? d / 8 * 4 + (d % 8 * 8 >> log2) : d * 8 >> log2;
  }
  for (int t = 0; t < 32; ++t) {
    const int word = pairs ? t / 2 : t, row = pairs ? t % 2 : 0;
    lanes.word[t] = static_cast<uint16_t>(row * 4 + (word * 4 >> log2));
    lanes.order[t] = static_cast<uint16_t>(word % 2 * 16 + row * 8 + word / 2);
  }
  return lanes;
}
constexpr ScaleLanes kScaleLanes[2][3] = {
    {scale_lanes(false, 4), scale_lanes(false, 5), scale_lanes(false, 6)},
    {scale_lanes(true, 4), scale_lanes(true, 5), scale_lanes(true, 6)}};

// Eight scales, of which `used` are there, and their zeros.
struct ScaleGroup {
  __m256 scale, zero;
  __mmask8 used;
};

// Codes times scales as float32, rounded.
struct WideGroup {
  __m512i words;  // of two rows: one after the other
  __m512 codes, scale, bias;
  __m512i order;
  __m512i at(int v) const {
    const int shift = v == 1 ? 0 : v == 0 ? 4 : v == 2 ? 12 : 8;
    const auto half = [&](int by) {
      const __m512 code = _mm512_permutexvar_ps(_mm512_srli_epi32(words, by), codes);
      return _mm512_fmadd_ps(code, scale, bias);
    };
    return _mm512_permutexvar_epi16(
        order, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(half(shift + 16), half(shift))));
  }
};

// What is added to the bits of a scale: `kBias` moves those of ordinary scales below all others,
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

// kPowers: of scales that are powers of two.
template <bool kPowers>
struct E2M1Group {
  __m512i words, shifts, once, half_more;  // of two rows: words alternate
  E2M1Group(__m512i packed, const ScaleLanes& lanes, __m256 scale)
      : words(packed), shifts(_mm512_load_si512(kE2M1Shifts[kPowers].of)) {
    const __m512i word = _mm512_load_si512(lanes.word);
    const __m512 both = _mm512_mul_ps(
        _mm512_broadcast_f32x8(scale),
        _mm512_set_ps(1.5f, 1.5f, 1.5f, 1.5f, 1.5f, 1.5f, 1.5f, 1.5f, 1, 1, 1, 1, 1, 1, 1, 1));
    const __m256i bias = _mm256_set_m128i(_mm_set1_epi16(kE2M1Bias - 1), _mm_set1_epi16(kE2M1Bias));
    const __m512i bits = _mm512_castsi256_si512(
        _mm256_add_epi16(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(both)), bias));
    once = _mm512_permutexvar_epi16(word, bits);
    half_more = kPowers
                    ? once
                    : _mm512_permutexvar_epi16(_mm512_or_si512(word, _mm512_set1_epi16(8)), bits);
  }
  __m512i at(int v) const {
    const __m512i shift = _mm512_permutexvar_epi16(stream_words(words, v), shifts);
    if (kPowers) return _mm512_adds_epi16(once, shift);
    const __mmask32 more = _mm512_test_epi16_mask(shift, _mm512_set1_epi16(1));
    return _mm512_adds_epi16(_mm512_mask_mov_epi16(once, more, half_more), shift);
  }
};

// Scales for which all that holds: from 2^-125 to 2^125.
inline bool ordinary(const ScaleGroup& group) {
  const __m256i least = _mm256_set1_epi32(2 << 23), range = _mm256_set1_epi32(250 << 23);
  const __m256i above = _mm256_sub_epi32(_mm256_castps_si256(group.scale), least);
  return _mm256_mask_cmpgt_epu32_mask(group.used, above, range) == 0;
}

// How the weights of such blocks are decoded.
enum class ShortBlocks { kWide, kE2M1, kE2M1Powers };

struct BlockDecoder {
  const NF4View& w;
  const Absmax& absmax;
  const int log2;
  const ScaleLanes& lanes;
  BlockDecoder(const NF4View& view, const Absmax& scales, bool pairs)
      : w(view),
        absmax(scales),
        log2(absmax.log2 < 6 ? absmax.log2 : 6),
        lanes(kScaleLanes[pairs][log2 - 4]) {}

  // Those of a row's 128 weights from `element` on, of which n are there.
  ScaleGroup row(int64_t element, int64_t n) const {
    const __mmask8 used = used_of(n);
    const int64_t block = element >> absmax.log2;
    return {_mm256_maskz_loadu_ps(used, absmax.of(element)),
            w.zero ? _mm256_maskz_loadu_ps(used, w.zero + block) : _mm256_setzero_ps(), used};
  }
  // Those of 64 weights each of two rows; without a second, its scales are zero.
  ScaleGroup rows(int64_t first, int64_t second, bool both) const {
    const __mmask8 one = used_of(64), other = both ? one : __mmask8{0};
    const auto load = [&](const float* low, const float* high) {
      return _mm256_set_m128(_mm_maskz_loadu_ps(other, high), _mm_maskz_loadu_ps(one, low));
    };
    const __m256 zero =
        w.zero ? load(w.zero + (first >> absmax.log2), w.zero + (second >> absmax.log2))
               : _mm256_setzero_ps();
    return {load(absmax.of(first), absmax.of(second)), zero,
            static_cast<__mmask8>(one | other << 4)};
  }
  WideGroup wide(__m512i words, const ScaleGroup& group) const {
    const __m512i dword = _mm512_load_si512(lanes.dword);
    const auto spread = [&](__m256 values) {
      return _mm512_permutexvar_ps(dword, _mm512_castps256_ps512(values));
    };
    const __m512 scale = spread(group.scale);
    const __m512 bias = w.zero ? _mm512_fnmadd_ps(spread(group.zero), scale, _mm512_setzero_ps())
                               : _mm512_setzero_ps();
    return {words, _mm512_loadu_ps(codes_of(w)), scale, bias, _mm512_load_si512(lanes.order)};
  }

 private:
  __mmask8 used_of(int64_t n) const {
    return static_cast<__mmask8>((1u << ((n + (int64_t{1} << log2) - 1) >> log2)) - 1);
  }
};

template <class Group>
inline void all_streams(const Group& group, __m512i v[4]) {
  for (int j = 0; j < 4; ++j) v[j] = group.at(j);
}

template <ShortBlocks kKind>
struct ShortPairs {
  const BlockDecoder blocks;
  const int64_t K;
  ShortPairs(const NF4View& w, const Absmax& absmax, int64_t columns)
      : blocks(w, absmax, true), K(columns) {}
  void operator()(int64_t element, __m512i v[4]) const {
    const uint8_t *first = blocks.w.packed + element / 2, *second = first + K / 2;
    const ScaleGroup group = blocks.rows(element, element + K, true);
    if (kKind != ShortBlocks::kWide && ordinary(group)) {
      constexpr bool kPowers = kKind == ShortBlocks::kE2M1Powers;
      return all_streams(E2M1Group<kPowers>(alternate(first, second), blocks.lanes, group.scale),
                         v);
    }
    all_streams(blocks.wide(one_after_other(first, second), group), v);
  }
  static __m512i one_after_other(const uint8_t* first, const uint8_t* second) {
    return join(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(first)),
                _mm256_loadu_si256(reinterpret_cast<const __m256i*>(second)));
  }
};

// ---- rows

// v without what is past the first n of 128 weights.
inline void cut_streams(__m512i v[4], int64_t n) {
  for (int j = 0; j < 4; ++j) v[j] = _mm512_maskz_mov_epi16(mask32((n - j + 3) / 4), v[j]);
}

template <bool kZero, class Emit>
inline void decode_whole_blocks(const NF4View& w, const Absmax& absmax, int64_t element, int64_t n,
                                const Emit& emit) {
  const BF16Tables<kZero> tables(w, absmax);
  const uint8_t* packed = w.packed + element / 2;
  const auto decode = [&](int64_t i, __m512i bytes, int64_t second) {
    const int64_t first = element + i;
    const __m512i table = tables.of(first, absmax.at(first), second, absmax.at(second));
    __m512i v[4];
    for (int j = 0; j < 4; ++j) v[j] = bf16_stream(bytes, table, j);
    if (n - i < 128) cut_streams(v, n - i);
    emit(i, v);
  };
  int64_t i = 0;
  for (; i + 128 <= n; i += 128) {
    __builtin_prefetch(packed + i / 2 + kStreamAhead);
    decode(i, _mm512_loadu_si512(packed + i / 2), element + i + 64);
  }
  if (i < n) {
    decode(i, load_bytes(packed + i / 2, (n - i + 1) / 2), element + i + (n - i > 64 ? 64 : 0));
  }
}

template <ShortBlocks kKind, class Emit>
inline void decode_short_blocks(const NF4View& w, const Absmax& absmax, int64_t element, int64_t n,
                                const Emit& emit) {
  const BlockDecoder blocks(w, absmax, false);
  const uint8_t* packed = w.packed + element / 2;
  for (int64_t i = 0; i < n; i += 128) {
    const int64_t count = min64(128, n - i);
    __builtin_prefetch(packed + i / 2 + kStreamAhead);
    const __m512i words = load_bytes(packed + i / 2, (count + 1) / 2);
    const ScaleGroup group = blocks.row(element + i, count);
    __m512i v[4];
    if (kKind != ShortBlocks::kWide && ordinary(group)) {
      constexpr bool kPowers = kKind == ShortBlocks::kE2M1Powers;
      all_streams(E2M1Group<kPowers>(words, blocks.lanes, group.scale), v);
    } else {
      all_streams(blocks.wide(words, group), v);
    }
    if (count < 128) cut_streams(v, count);
    emit(i, v);
  }
}

// One weight at a time: of rows that begin inside a block's byte or word.
template <class Emit>
inline void decode_elements(const NF4View& w, const Absmax& absmax, int64_t element, int64_t n,
                            const Emit& emit) {
  const int64_t swap = w.low_first() ? 1 : 0;
  for (int64_t i = 0; i < n; i += 128) {
    alignas(64) uint16_t values[128] = {};
    for (int64_t j = 0; j < min64(n - i, 128); ++j) {
      values[(j % 4 ^ swap) * 32 + j / 4] =
          bf16_from_float(weight_at(w, absmax, element + i + j, DType::kFloat32));
    }
    __m512i v[4];
    for (int j = 0; j < 4; ++j) v[j] = _mm512_load_si512(values + 32 * j);
    emit(i, v);
  }
}

// Runs emit(i, v) for every 128 of n weights from `element` on; weights past the n-th are zero.
// They come as four streams: number t of v[j] is element i + 4 t + j, or with low nibbles first
// element i + 4 t + (j ^ 1).
template <class Emit>
inline void decode_streams(const NF4View& w, const Absmax& absmax, int64_t element, int64_t n,
                           const Emit& emit) {
  if (element % 64 == 0 && w.blocksize >= 64) {
    if (w.zero) return decode_whole_blocks<true>(w, absmax, element, n, emit);
    return decode_whole_blocks<false>(w, absmax, element, n, emit);
  }
  if (w.blocksize >= 64 || element % w.blocksize != 0) {
    return decode_elements(w, absmax, element, n, emit);
  }
  if (w.format == Format::kMXFP4) {
    return decode_short_blocks<ShortBlocks::kE2M1Powers>(w, absmax, element, n, emit);
  }
  if (w.format == Format::kNVFP4) {
    return decode_short_blocks<ShortBlocks::kE2M1>(w, absmax, element, n, emit);
  }
  decode_short_blocks<ShortBlocks::kWide>(w, absmax, element, n, emit);
}

}  // namespace
}  // namespace peftkern
