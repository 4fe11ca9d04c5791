// Packed weights as vectors of bfloat16, for the instruction sets with bfloat16 products: 128
// weights of a row, or 64 each of two rows, as four streams. Stream v holds every fourth weight: of
// a packed word the one that shifting it yields, which is number v of its four where high nibbles
// come first, and v ^ 1 where low ones do.
//
// Blocks of 64 weights and more have tables of their values, two in a register (vpermw reads five
// index bits: four are the nibble, the fifth chooses the table). Shorter blocks of a row have
// tables of bytes, one for each 128 bits, which vpshufb reads. Those of two rows would need more
// tables than that: their scales are spread over the lanes instead, and meet the codes in integers
// (nf4_scale_lanes.h), or else as float32. All round once to bfloat16.
#pragma once

#include "nf4_panel.h"
#include "nf4_scale_lanes.h"

namespace peftkern {
namespace {

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

// Eight scales, of which `used` are there, and their zeros.
struct ScaleGroup {
  __m256 scale, zero;
  __mmask8 used;
};

// Codes times scales as float32, rounded.
struct WideGroup {
  __m512i words;  // of two rows: one after the other
  __m512 codes, scale, zero;
  __m512i order;
  __m512i at(int v) const {
    const int shift = v == 1 ? 0 : v == 0 ? 4 : v == 2 ? 12 : 8;
    const auto half = [&](int by) {
      const __m512 code = _mm512_permutexvar_ps(_mm512_srli_epi32(words, by), codes);
      return _mm512_mul_ps(_mm512_sub_ps(code, zero), scale);
    };
    return _mm512_permutexvar_epi16(
        order, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(half(shift + 16), half(shift))));
  }
};

// How the weights of such blocks are decoded.
enum class ShortBlocks { kWide, kE2M1, kE2M1Powers };

struct BlockDecoder {
  const NF4View& w;
  const Absmax& absmax;
  const int log2;
  const ScaleLanes& lanes;
  BlockDecoder(const NF4View& view, const Absmax& scales, PackedOrder order)
      : w(view),
        absmax(scales),
        log2(absmax.log2 < 6 ? absmax.log2 : 6),
        lanes(lanes_of(order, log2)) {}

  // Those of 64 weights each of two rows; without a second, its scales are zero.
  ScaleGroup rows(int64_t first, int64_t second, bool both) const {
    const __mmask8 one = static_cast<__mmask8>((1u << (64 >> log2)) - 1),
                   other = both ? one : __mmask8{0};
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
    return {words, _mm512_loadu_ps(codes_of(w)), spread(group.scale), spread(group.zero),
            _mm512_load_si512(lanes.order)};
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
      : blocks(w, absmax, PackedOrder::kPair), K(columns) {}
  void operator()(int64_t element, __m512i v[4]) const {
    const uint8_t *first = blocks.w.packed + element / 2, *second = first + K / 2;
    const ScaleGroup group = blocks.rows(element, element + K, true);
    if (kKind != ShortBlocks::kWide && ordinary(group.scale, group.used)) {
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

// `count` rows of n weights each, the first from `element` on and K apart, and where they go: tiles
// `stride` dwords apart.
struct WeightRows {
  const NF4View& w;
  const Absmax& absmax;
  const int64_t element, K, count, n;
  uint32_t* const out;
  const int64_t stride;
  const int64_t number = 0;  // of the first row

  int64_t begin(int64_t row) const { return element + row * K; }
  uint32_t* line(int64_t row) const { return out + row * kSide; }
  // The next 128 weights. They come as four streams: number t of v[j] is column 4 t + j of them, or
  // with low nibbles first 4 t + (j ^ 1). What is past the n-th of a row is zero.
  uint32_t* store(uint32_t* line, const __m512i v[4]) const {
    for (int j = 0; j < 4; ++j, line += stride) _mm512_storeu_si512(line, v[j]);
    return line;
  }
};

// v without what is past the first n of 128 weights.
inline void cut_streams(__m512i v[4], int64_t n) {
  for (int j = 0; j < 4; ++j) v[j] = _mm512_maskz_mov_epi16(mask32((n - j + 3) / 4), v[j]);
}

// The functions below run before(number) ahead of each row. They are inlined, and WeightRows only
// refers to what is large: decoding then overlaps the products before it. A call for which structs
// are copied on the stack waits for all stores ahead of it, those of tiles among them (28 % of a
// product with 16 rows).
template <bool kZero, class Before>
[[gnu::always_inline]] inline void decode_whole_blocks(const WeightRows& given,
                                                       const Before& before) {
  const WeightRows rows = given;
  const Absmax absmax = rows.absmax;
  const BF16Tables<kZero> tables(rows.w, absmax);
  for (int64_t row = 0; row < rows.count; ++row) {
    before(rows.number + row);
    const int64_t element = rows.begin(row), n = rows.n;
    const uint8_t* packed = rows.w.packed + element / 2;
    uint32_t* line = rows.line(row);
    __m512i v[4];
    const auto decode = [&](int64_t i, __m512i bytes, int64_t second) {
      const int64_t first = element + i;
      const __m512i table = tables.of(first, absmax.at(first), second, absmax.at(second));
      for (int j = 0; j < 4; ++j) v[j] = bf16_stream(bytes, table, j);
    };
    int64_t i = 0;
    for (; i + 128 <= n; i += 128) {
      __builtin_prefetch(packed + i / 2 + kStreamAhead);
      decode(i, _mm512_loadu_si512(packed + i / 2), element + i + 64);
      line = rows.store(line, v);
    }
    if (i == n) continue;
    decode(i, load_bytes(packed + i / 2, (n - i + 1) / 2), element + i + (n - i > 64 ? 64 : 0));
    cut_streams(v, n - i);
    rows.store(line, v);
  }
}

// The bytes of sixteen values for each 128 bits of packed weights, which vpshufb looks up there: of
// a block of 32, or the magnitudes of two blocks of 16.
struct LaneTables {
  __m512i low, high;
};

// Of the words of entries 0 to 7, and of 8 to 15.
inline LaneTables lane_tables(__m512i first, __m512i second) {
  const __m512i byte = _mm512_set1_epi16(255);
  return {_mm512_packus_epi16(_mm512_and_si512(first, byte), _mm512_and_si512(second, byte)),
          _mm512_packus_epi16(_mm512_srli_epi16(first, 8), _mm512_srli_epi16(second, 8))};
}

template <ShortBlocks kKind>
inline LaneTables tables_of(const float* codes, __m256 scales, __m256 zeros) {
  const auto spread = [](__m256 values, int first, int second) {
    const __m512i index = join(_mm256_set1_epi32(first), _mm256_set1_epi32(second));
    return _mm512_permutexvar_ps(index, _mm512_castps256_ps512(values));
  };
  // Eight values each of four blocks.
  const auto words = [&](const float* eight, int b0, int b1, int b2, int b3) {
    const __m512 code = _mm512_broadcast_f32x8(_mm256_loadu_ps(eight));
    const auto values = [&](int first, int second) {
      constexpr bool kZeros = kKind == ShortBlocks::kWide;
      return _mm512_mul_ps(kZeros ? _mm512_sub_ps(code, spread(zeros, first, second)) : code,
                           spread(scales, first, second));
    };
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(values(b2, b3), values(b0, b1)));
  };
  if (kKind == ShortBlocks::kE2M1) {
    return lane_tables(words(codes, 0, 2, 4, 6), words(codes, 1, 3, 5, 7));
  }
  const __m512i first = words(codes, 0, 1, 2, 3);
  if (kKind == ShortBlocks::kE2M1Powers) {  // the last eight codes are the first's negatives
    return lane_tables(first, _mm512_xor_si512(first, _mm512_set1_epi16(-32768)));
  }
  return lane_tables(first, words(codes + 8, 0, 1, 2, 3));
}

// Streams of 128 weights. Even bytes of the packed ones go to the first half of their lane, so that
// unpacking the bytes of values puts the words of a stream in order.
template <ShortBlocks kKind>
inline void look_up(__m512i packed, const LaneTables& tables, __m512i v[4]) {
  const __m512i even_first =
      _mm512_broadcast_i32x4(_mm_set_epi8(15, 13, 11, 9, 7, 5, 3, 1, 14, 12, 10, 8, 6, 4, 2, 0));
  const __m512i bytes = _mm512_shuffle_epi8(packed, even_first);
  // Of the nibbles at the low end; the other end's highest bit is the sign.
  const auto streams = [&](__m512i nibbles, __m512i signs, __m512i* even, __m512i* odd) {
    constexpr int kAndOr = 0xea, kXorAnd = 0x78;  // (a & b) | c; a ^ (b & c)
    __m512i index = _mm512_and_si512(nibbles, _mm512_set1_epi8(15)), high;
    if (kKind == ShortBlocks::kE2M1) {
      const __m512i second_block = _mm512_set1_epi64(0x0808080800000000);
      index = _mm512_ternarylogic_epi64(nibbles, _mm512_set1_epi8(7), second_block, kAndOr);
    }
    high = _mm512_shuffle_epi8(tables.high, index);
    if (kKind == ShortBlocks::kE2M1) {
      high = _mm512_ternarylogic_epi64(high, signs, _mm512_set1_epi8(-128), kXorAnd);
    }
    const __m512i low = _mm512_shuffle_epi8(tables.low, index);
    *even = _mm512_unpacklo_epi8(low, high);
    *odd = _mm512_unpackhi_epi8(low, high);
  };
  streams(bytes, _mm512_slli_epi16(bytes, 4), v + 1, v + 3);
  streams(_mm512_srli_epi16(bytes, 4), bytes, v, v + 2);
}

template <ShortBlocks kKind, class Before>
[[gnu::always_inline]] inline void decode_short_blocks(const WeightRows& given,
                                                       const Before& before) {
  const WeightRows rows = given;
  constexpr int64_t kScales = kKind == ShortBlocks::kE2M1 ? 8 : 4;  // of 128 weights
  const float *codes = codes_of(rows.w), *zeros = rows.w.zero;
  const auto load = [](const float* p) {
    return kScales == 8 ? _mm256_loadu_ps(p) : _mm256_castps128_ps256(_mm_loadu_ps(p));
  };
  for (int64_t row = 0; row < rows.count; ++row) {
    before(rows.number + row);
    const int64_t element = rows.begin(row);
    const uint8_t* packed = rows.w.packed + element / 2;
    const float* scale = rows.absmax.of(element);
    const float* zero = zeros ? zeros + (element >> rows.absmax.log2) : nullptr;
    uint32_t* line = rows.line(row);
    __m512i v[4];
    int64_t i = 0;
    for (; i + 128 <= rows.n; i += 128, packed += 64, scale += kScales) {
      __builtin_prefetch(packed + kStreamAhead);
      const __m256 z = zero ? load(zero) : _mm256_setzero_ps();
      if (zero) zero += kScales;
      look_up<kKind>(_mm512_loadu_si512(packed), tables_of<kKind>(codes, load(scale), z), v);
      line = rows.store(line, v);
    }
    if (i == rows.n) continue;
    const int64_t rest = rows.n - i;
    const __mmask8 used = static_cast<__mmask8>((1u << ceil_div(rest * kScales, 128)) - 1);
    const __m256 s = _mm256_maskz_loadu_ps(used, scale);
    const __m256 z = zero ? _mm256_maskz_loadu_ps(used, zero) : _mm256_setzero_ps();
    look_up<kKind>(load_bytes(packed, (rest + 1) / 2), tables_of<kKind>(codes, s, z), v);
    cut_streams(v, rest);
    rows.store(line, v);
  }
}

// One weight at a time: of rows that begin inside a block's byte or word.
template <class Before>
inline void decode_elements(const WeightRows& given, const Before& before) {
  const WeightRows rows = given;
  const int64_t swap = rows.w.low_first() ? 1 : 0;
  for (int64_t row = 0; row < rows.count; ++row) {
    before(rows.number + row);
    uint32_t* line = rows.line(row);
    for (int64_t i = 0; i < rows.n; i += 128) {
      alignas(64) uint16_t values[128] = {};
      for (int64_t j = 0; j < min64(rows.n - i, 128); ++j) {
        const int64_t element = rows.begin(row) + i + j;
        values[(j % 4 ^ swap) * 32 + j / 4] =
            bf16_from_float(weight_at(rows.w, rows.absmax, element, DType::kFloat32));
      }
      __m512i v[4];
      for (int j = 0; j < 4; ++j) v[j] = _mm512_load_si512(values + 32 * j);
      line = rows.store(line, v);
    }
  }
}

template <class Before>
inline void decode_streams(const WeightRows& rows, const Before& before) {
  const NF4View& w = rows.w;
  const int64_t unit = min64(w.blocksize, 64);
  if (rows.count > 1 && rows.K % unit != 0) {  // some of them begin where a unit does
    for (int64_t i = 0; i < rows.count; ++i) {
      decode_streams(WeightRows{w, rows.absmax, rows.begin(i), rows.K, 1, rows.n, rows.line(i),
                                rows.stride, i},
                     before);
    }
    return;
  }
  if (rows.element % unit != 0) return decode_elements(rows, before);
  if (w.blocksize >= 64) {
    if (w.zero) return decode_whole_blocks<true>(rows, before);
    return decode_whole_blocks<false>(rows, before);
  }
  if (w.format == Format::kMXFP4) {
    return decode_short_blocks<ShortBlocks::kE2M1Powers>(rows, before);
  }
  if (w.format == Format::kNVFP4) return decode_short_blocks<ShortBlocks::kE2M1>(rows, before);
  decode_short_blocks<ShortBlocks::kWide>(rows, before);
}

}  // namespace
}  // namespace peftkern
