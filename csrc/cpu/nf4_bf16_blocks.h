// Packed weights as vectors of bfloat16, for the instruction sets with bfloat16 products: 128
// weights of a row, or 64 each of two rows, as four streams. Stream v holds every fourth weight: of
// a packed word the one that shifting it yields, which is number v of its four where high nibbles
// come first, and v ^ 1 where low ones do.
//
// Blocks of 64 weights and more have tables of their values, two in a register (vpermw reads five
// index bits: four are the nibble, the fifth chooses the table). Blocks of 32 with float32 scales
// have two such registers. Of e2m1 codes with a byte for a scale there are tables of bytes, one for
// each 128 bits, which vpshufb reads: they are made in advance for every byte of a scale. All
// values are rounded once to bfloat16.
#pragma once

#include "nf4_panel.h"
#include "nf4_scale_lanes.h"

namespace peftkern {
namespace {

inline __mmask32 mask32(int64_t n) {
  return n >= 32 ? ~__mmask32{0} : (n <= 0 ? 0 : (__mmask32{1} << n) - 1);
}

inline __m512i one_after_other(const uint8_t* first, const uint8_t* second) {
  return join(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(first)),
              _mm256_loadu_si256(reinterpret_cast<const __m256i*>(second)));
}

// The order of words of both rows, one after the other, in which they alternate.
inline __m512i alternate(const uint8_t* first, const uint8_t* second) {
  const __m512i ramp = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i alternating =
      _mm512_or_si512(ramp, _mm512_slli_epi32(_mm512_add_epi32(ramp, _mm512_set1_epi32(16)), 16));
  return _mm512_permutexvar_epi16(alternating, one_after_other(first, second));
}

// ---- tables

// Of a block; kZero: one that has a zero.
template <bool kZero>
inline __m512 bf16_values(__m512 codes, const float* scale, const float* zero) {
  return _mm512_mul_ps(kZero ? _mm512_sub_ps(codes, _mm512_set1_ps(*zero)) : codes,
                       _mm512_set1_ps(*scale));
}

inline __m512i bf16_table(__m512 low, __m512 high) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
}

template <bool kZero>
struct BF16Tables {
  const NF4View& w;
  const Absmax absmax;  // a copy, which no store to tiles can change
  const __m512 codes;
  BF16Tables(const NF4View& view, const Absmax& scales)
      : w(view), absmax(scales), codes(_mm512_loadu_ps(codes_of(view))) {}

  __m512 values(int64_t element, const float* scale) const {
    return bf16_values<kZero>(codes, scale, kZero ? w.zero + (element >> absmax.log2) : nullptr);
  }
  // The values of the blocks of two elements, the second with a scale of its own.
  __m512i of(int64_t first, int64_t second, const float* scale) const {
    return bf16_table(values(first, absmax.of(first)), values(second, scale));
  }
  __m512i of(int64_t first, int64_t second) const { return of(first, second, absmax.of(second)); }
};

// `second` has the fifth index bit of each word.
inline __m512i bf16_index(__m512i words, int v, __m512i second) {
  constexpr int kAndOr = 0xea;  // (a & b) | c
  return _mm512_ternarylogic_epi64(stream_words(words, v), _mm512_set1_epi16(15), second, kAndOr);
}
inline __m512i bf16_stream(__m512i words, __m512i table, int v, __m512i second) {
  return _mm512_permutexvar_epi16(bf16_index(words, v, second), table);
}

// Four of them, the second half of whose words have another table.
inline void bf16_streams(__m512i words, __m512i low, __m512i high, __m512i second, __m512i v[4]) {
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i index = bf16_index(words, j, second);
    v[j] = _mm512_mask_permutexvar_epi16(_mm512_permutexvar_epi16(index, low), 0xffff0000, index,
                                         high);
  }
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
    const RowPair pair = {alternate(packed, packed + K / 2), tables.of(element, element + K)};
    for (int j = 0; j < 4; ++j) v[j] = pair.at(j);
  }
};

// ---- bytes of values

// The bytes of sixteen magnitudes for each 128 bits of packed weights, of two blocks or of one
// twice, which vpshufb looks up there.
struct LaneTables {
  __m512i low, high;
};

// What each byte of a scale makes of the magnitudes of e2m1 codes, as bfloat16: eight low bytes and
// eight high ones. Weights of other formats have no such tables.
class ByteTables {
 public:
  explicit ByteTables(const NF4View& w) : there_(w.byte_scales()) {
    if (!there_) return;
    float scales[256];
    scales_of_bytes(w, scales);
    const __m512 codes = _mm512_loadu_ps(kE2M1Code);
    const __m128i low_first = _mm_set_epi8(15, 13, 11, 9, 7, 5, 3, 1, 14, 12, 10, 8, 6, 4, 2, 0);
    for (int i = 0; i < 256; ++i) {
      const __m256i words = bf16_words(_mm512_mul_ps(codes, _mm512_set1_ps(scales[i])));
      _mm_store_si128(reinterpret_cast<__m128i*>(tables_ + 16 * i),
                      _mm_shuffle_epi8(_mm256_castsi256_si128(words), low_first));
    }
  }
  const uint8_t* get() const { return there_ ? tables_ : nullptr; }

 private:
  alignas(64) uint8_t tables_[256 * 16];
  const bool there_;
};

// Of 128 weights, whose blocks two by two have the scales at `at`.
inline LaneTables e2m1_tables(const uint8_t* of_bytes, const uint8_t* scales, const int64_t at[8]) {
  const auto table = [&](int i) {
    return _mm_load_si128(reinterpret_cast<const __m128i*>(of_bytes + 16 * int64_t{scales[at[i]]}));
  };
  const auto every_other = [&](int i) {
    const __m512i first = _mm512_castsi128_si512(table(i));
    const __m512i two = _mm512_mask_broadcast_i64x2(first, 0x0c, table(i + 2));
    const __m512i three = _mm512_mask_broadcast_i64x2(two, 0x30, table(i + 4));
    return _mm512_mask_broadcast_i64x2(three, 0xc0, table(i + 6));
  };
  const __m512i even = every_other(0), odd = every_other(1);
  return {_mm512_unpacklo_epi64(even, odd), _mm512_unpackhi_epi64(even, odd)};
}

// Streams of 128 weights: of a row, or in each 128 bits sixteen each of two. Even bytes of the
// packed ones go to the first half of their lane, so that unpacking the bytes of values puts the
// words of a stream in order; those of two rows alternate.
template <bool kTwoRows>
inline void look_up(__m512i packed, const LaneTables& tables, __m512i v[4]) {
  const __m512i order = _mm512_broadcast_i32x4(
      kTwoRows ? _mm_set_epi8(15, 7, 13, 5, 11, 3, 9, 1, 14, 6, 12, 4, 10, 2, 8, 0)
               : _mm_set_epi8(15, 13, 11, 9, 7, 5, 3, 1, 14, 12, 10, 8, 6, 4, 2, 0));
  const __m512i second = _mm512_set1_epi64(kTwoRows ? 0x0800080008000800 : 0x0808080800000000);
  const __m512i bytes = _mm512_shuffle_epi8(packed, order);
  // Of the nibbles at the low end; the other end's highest bit is the sign.
  const auto streams = [&](__m512i nibbles, __m512i signs, __m512i* even, __m512i* odd) {
    constexpr int kAndOr = 0xea, kXorAnd = 0x78;  // (a & b) | c; a ^ (b & c)
    const __m512i index = _mm512_ternarylogic_epi64(nibbles, _mm512_set1_epi8(7), second, kAndOr);
    const __m512i high = _mm512_ternarylogic_epi64(_mm512_shuffle_epi8(tables.high, index), signs,
                                                   _mm512_set1_epi8(-128), kXorAnd);
    const __m512i low = _mm512_shuffle_epi8(tables.low, index);
    *even = _mm512_unpacklo_epi8(low, high);
    *odd = _mm512_unpackhi_epi8(low, high);
  };
  streams(bytes, _mm512_slli_epi16(bytes, 4), v + 1, v + 3);
  streams(_mm512_srli_epi16(bytes, 4), bytes, v, v + 2);
}

// 64 weights each of two rows, as TablePairs has them.
template <int kLog2>
struct E2M1Pairs {
  const uint8_t *packed, *scales;
  const uint8_t* of_bytes;
  const int64_t K;
  E2M1Pairs(const NF4View& w, const Absmax& absmax, int64_t columns)
      : packed(w.packed),
        scales(static_cast<const uint8_t*>(w.absmax)),
        of_bytes(absmax.of_bytes),
        K(columns) {}
  void operator()(int64_t element, __m512i v[4]) const {
    const uint8_t* first = packed + element / 2;
    const __m512i rows = _mm512_permutexvar_epi64(_mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0),
                                                  one_after_other(first, first + K / 2));
    int64_t at[8];
    for (int i = 0; i < 8; ++i) at[i] = (element + i % 2 * K + i / 2 * 16) >> kLog2;
    look_up<true>(rows, e2m1_tables(of_bytes, scales, at), v);
  }
};

// The same of blocks of 32 whose scales are float32.
template <bool kZero>
struct FloatPairs {
  const BF16Tables<kZero> tables;
  const int64_t K;
  FloatPairs(const NF4View& w, const Absmax& absmax, int64_t columns)
      : tables(w, absmax), K(columns) {}
  void operator()(int64_t element, __m512i v[4]) const {
    const uint8_t* packed = tables.w.packed + element / 2;
    const __m512i second = _mm512_set1_epi32(16 << 16);
    bf16_streams(alternate(packed, packed + K / 2), tables.of(element, element + K),
                 tables.of(element + 32, element + 32 + K), second, v);
  }
};

// ---- scales spread over the lanes, for sums of weight rows

// Eight scales and their zeros.
struct ScaleGroup {
  __m256 scale, zero;
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

struct BlockDecoder {
  const NF4View& w;
  const Absmax& absmax;
  const int log2;
  const ScaleLanes& lanes;
  BlockDecoder(const NF4View& view, const Absmax& scales)
      : w(view),
        absmax(scales),
        log2(absmax.log2 < 6 ? absmax.log2 : 6),
        lanes(lanes_of(PackedOrder::kPair, log2)) {}

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
    return {load(absmax.of(first), absmax.of(second)), zero};
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
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j, line += stride) _mm512_storeu_si512(line, v[j]);
    return line;
  }
};

// v without what is past the first n of 128 weights.
inline void cut_streams(__m512i v[4], int64_t n) {
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) v[j] = _mm512_maskz_mov_epi16(mask32((n - j + 3) / 4), v[j]);
}

// Streams of 128 weights of a row, from whole blocks on, of which `count` are there.
template <bool kZero>
struct LongRows {
  const BF16Tables<kZero> tables;
  LongRows(const NF4View& w, const Absmax& absmax) : tables(w, absmax) {}
  void operator()(int64_t element, __m512i packed, __m512i v[4], int64_t count = 128) const {
    const __m512i table = tables.of(element, element + (count > 64 ? 64 : 0));
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) v[j] = bf16_stream(packed, table, j);
  }
};

// Of short blocks of e2m1 codes with a byte for a scale.
template <int kLog2>
struct E2M1Rows {
  const uint8_t* scales;
  const uint8_t* of_bytes;
  E2M1Rows(const NF4View& w, const Absmax& absmax)
      : scales(static_cast<const uint8_t*>(w.absmax)), of_bytes(absmax.of_bytes) {}
  void operator()(int64_t element, __m512i packed, __m512i v[4], int64_t count = 128) const {
    int64_t at[8];
    for (int64_t i = 0; i < 8; ++i) at[i] = min64(16 * i, count - 1) >> kLog2;
    look_up<false>(packed, e2m1_tables(of_bytes, scales + (element >> kLog2), at), v);
  }
};

// Of blocks of 32 whose scales are float32: four, of which two share a table.
template <bool kZero>
struct FloatRows {
  const Absmax absmax;
  const float* zeros;
  const __m512 codes;
  FloatRows(const NF4View& w, const Absmax& scales)
      : absmax(scales), zeros(w.zero), codes(_mm512_loadu_ps(codes_of(w))) {}
  void operator()(int64_t element, __m512i packed, __m512i v[4], int64_t count = 128) const {
    const auto values = [&](int64_t i) {
      const int64_t block = (element >> 5) + min64(i, (count - 1) >> 5);
      return bf16_values<kZero>(codes, absmax.values + (block - absmax.first),
                                kZero ? zeros + block : nullptr);
    };
    const __m512i second = _mm512_broadcast_i64x4(
        _mm256_inserti128_si256(_mm256_setzero_si256(), _mm_set1_epi16(16), 1));
    bf16_streams(packed, bf16_table(values(0), values(1)), bf16_table(values(2), values(3)), second,
                 v);
  }
};

// The functions below run before(number) ahead of each row. They are inlined, and WeightRows only
// refers to what is large: decoding then overlaps the products before it. A call for which structs
// are copied on the stack waits for all stores ahead of it, those of tiles among them (28 % of a
// product with 16 rows).
template <class Decode, class Before>
[[gnu::always_inline]] inline void decode_blocks(const WeightRows& given, const Before& before) {
  const WeightRows rows = given;
  const Decode decode(rows.w, rows.absmax);
  for (int64_t row = 0; row < rows.count; ++row) {
    before(rows.number + row);
    const int64_t element = rows.begin(row), n = rows.n;
    const uint8_t* packed = rows.w.packed + element / 2;
    uint32_t* line = rows.line(row);
    int64_t i = 0;
    for (; i + 128 <= n; i += 128) {
      __builtin_prefetch(packed + i / 2 + kStreamAhead);
      __m512i v[4];  // not shared with the rest of a row, or gcc keeps it in memory
      decode(element + i, _mm512_loadu_si512(packed + i / 2), v);
      line = rows.store(line, v);
    }
    if (i == n) continue;
    __m512i v[4];
    decode(element + i, load_bytes(packed + i / 2, (n - i + 1) / 2), v, n - i);
    cut_streams(v, n - i);
    rows.store(line, v);
  }
}

// One weight at a time: of rows that begin inside a block's byte or word.
template <class Before>
[[gnu::noinline]] void decode_elements(const WeightRows& given, const Before& before) {
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
[[gnu::always_inline]] inline void decode_alike(const WeightRows& rows, const Before& before) {
  const NF4View& w = rows.w;
  if (rows.element % min64(w.blocksize, 64) != 0) return decode_elements(rows, before);
  if (w.blocksize >= 64) {
    if (w.zero) return decode_blocks<LongRows<true>>(rows, before);
    return decode_blocks<LongRows<false>>(rows, before);
  }
  if (w.format == Format::kMXFP4) return decode_blocks<E2M1Rows<5>>(rows, before);
  if (w.format == Format::kNVFP4) return decode_blocks<E2M1Rows<4>>(rows, before);
  if (w.zero) return decode_blocks<FloatRows<true>>(rows, before);
  decode_blocks<FloatRows<false>>(rows, before);
}

// Rows of which only some begin as a unit does, each for itself.
template <class Before>
[[gnu::noinline]] void decode_unlike(const WeightRows& rows, const Before& before) {
  for (int64_t i = 0; i < rows.count; ++i) {
    decode_alike(WeightRows{rows.w, rows.absmax, rows.begin(i), rows.K, 1, rows.n, rows.line(i),
                            rows.stride, i},
                 before);
  }
}

template <class Before>
[[gnu::always_inline]] inline void decode_streams(const WeightRows& rows, const Before& before) {
  const bool alike = rows.K % min64(rows.w.blocksize, 64) == 0;
  alike ? decode_alike(rows, before) : decode_unlike(rows, before);
}

}  // namespace
}  // namespace peftkern
