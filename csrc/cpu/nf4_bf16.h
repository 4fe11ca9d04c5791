// bfloat16 panels and dot products for the instruction sets with bfloat16 products (AVX512-BF16 and
// AMX). A dword holds two weights that are neighbors along the reduction.
#pragma once

#include "nf4_axpy.h"
#include "nf4_bf16_blocks.h"

namespace peftkern {
namespace {

struct BFloat16Panels {
  using ByteTables = peftkern::ByteTables;
  static constexpr int64_t kStep = 32;
  static constexpr int64_t kOrder = 128;  // each stream fills a tile row
  static constexpr int64_t kColumns = 64;

  static void load_dwords(const void* in, DType, int64_t i, int64_t n, uint32_t* out) {
    const uint16_t* p = static_cast<const uint16_t*>(in) + i;
    _mm512_storeu_si512(out, _mm512_maskz_loadu_epi16(mask32(n), p));
  }

  // n of 128 elements, the rest zero, in the order of decode_streams.
  static void load_ordered(const void* in, DType, int64_t i, int64_t n, bool low_first,
                           uint32_t* out) {
    const uint16_t* p = static_cast<const uint16_t*>(in) + i;
    const __m512i ramp = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m256i fourth = _mm512_cvtepi32_epi16(_mm512_slli_epi32(ramp, 2));
    __m512i x[4];
    for (int j = 0; j < 4; ++j) {
      x[j] = _mm512_maskz_loadu_epi16(mask32(n - 32 * j), n > 32 * j ? p + 32 * j : p);
    }
    for (int j = 0; j < 4; ++j) {
      const __m512i index = _mm512_castsi256_si512(
          _mm256_add_epi16(fourth, _mm256_set1_epi16(static_cast<int16_t>(j ^ int{low_first}))));
      const __m512i low = _mm512_permutex2var_epi16(x[0], index, x[1]);
      const __m512i high = _mm512_permutex2var_epi16(x[2], index, x[3]);
      _mm512_storeu_si512(out + 16 * j,
                          join(_mm512_castsi512_si256(low), _mm512_castsi512_si256(high)));
    }
  }

  template <class Before>
  [[gnu::always_inline]] static void decode_rows(const NF4View& w, const Absmax& absmax,
                                                 int64_t element, int64_t K, int64_t rows,
                                                 int64_t n, DType, uint32_t* out, int64_t stride,
                                                 const Before& before) {
    decode_streams({w, absmax, element, K, rows, n, out, stride}, before);
  }

  // Tile v of each 64 columns holds every fourth, from v on, or from v ^ 1.
  static void decode_lanes(const NF4View& w, const Absmax& absmax, RowsAhead& ahead, int64_t K,
                           int64_t n0, int64_t rows, int64_t k0, DType, uint32_t* out,
                           int64_t stride) {
    int64_t i = 0;
    if (K % 64 == 0) {
      const auto decode = [&](const auto& pairs) {
        i = K - k0 >= 128 ? decode_whole<2>(pairs, ahead, K, n0, rows, k0, out, stride)
                          : decode_whole<1>(pairs, ahead, K, n0, rows, k0, out, stride);
      };
      with_pairs(w, absmax, K, decode);
    }
    for (; i < round_up(rows, 32); i += 2) {
      uint32_t* line = out + i / 32 * kPair + i % 32 / 2 * 16;
      for (int64_t k = k0; k < k0 + 128; k += 64, line += 2 * stride) {
        decode_pair(w, absmax, (n0 + i) * K + k, K, min64(2, rows - i), min64(64, K - k), line,
                    line + stride);
      }
    }
  }

  // Runs fn with what decodes 64 weights each of two rows, of K columns, a multiple of 64.
  template <class Fn>
  static void with_pairs(const NF4View& w, const Absmax& absmax, int64_t K, const Fn& fn) {
    if (w.blocksize >= 64) {
      if (w.zero) return fn(TablePairs<true>(w, absmax, K));
      return fn(TablePairs<false>(w, absmax, K));
    }
    if (w.format == Format::kMXFP4) return fn(E2M1Pairs<5>(w, absmax, K));
    if (w.format == Format::kNVFP4) return fn(E2M1Pairs<4>(w, absmax, K));
    if (w.zero) return fn(FloatPairs<true>(w, absmax, K));
    fn(FloatPairs<false>(w, absmax, K));
  }

  // Pairs of rows over kGroups 64 columns of whole blocks. Returns the number of rows.
  template <int kGroups, class Pairs>
  static int64_t decode_whole(const Pairs& pairs, RowsAhead& ahead, int64_t K, int64_t n0,
                              int64_t rows, int64_t k0, uint32_t* out, int64_t stride) {
    int64_t element = n0 * K + k0, i = 0;
    for (; i + 2 <= rows; i += 2, element += 2 * K) {
      ahead.next();
      ahead.next();
      uint32_t* line = out + i / 32 * kPair + i % 32 / 2 * 16;
#pragma GCC unroll 2
      for (int g = 0; g < kGroups; ++g, line += 2 * stride) {
        __m512i v[4];
        pairs(element + 64 * g, v);
        _mm512_storeu_si512(line, v[0]);
        _mm512_storeu_si512(line + kTile, v[1]);
        _mm512_storeu_si512(line + stride, v[2]);
        _mm512_storeu_si512(line + stride + kTile, v[3]);
      }
      for (int64_t j = 0; kGroups == 1 && j < 4; ++j) {
        std::memset(line + j / 2 * stride + j % 2 * kTile, 0, kSide * 4);
      }
    }
    return i;
  }

  // `columns` of 64 weights from `element` on, and those of the row below, of which `rows` exist.
  static void decode_pair(const NF4View& w, const Absmax& absmax, int64_t element, int64_t K,
                          int64_t rows, int64_t columns, uint32_t* low, uint32_t* high) {
    uint32_t* const lines[4] = {low, low + kTile, high, high + kTile};
    const int64_t swap = w.low_first() ? 1 : 0;
    for (uint32_t* line : lines) std::memset(line, 0, kSide * 4);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t c = 0; c < columns; ++c) {
        const float value = weight_at(w, absmax, element + i * K + c, DType::kFloat32);
        lines[c % 4 ^ swap][c / 4] |= static_cast<uint32_t>(bf16_from_float(value)) << 16 * i;
      }
    }
  }

  // Four tiles of sums of 64 columns as decode_lanes orders them: after this in order.
  static void arrange(float* const tiles[4], bool low_first) {
    const __m512i lanes = _mm512_set_epi32(0, 0, 19, 3, 0, 0, 18, 2, 0, 0, 17, 1, 0, 0, 16, 0);
    for (int64_t i = 0; i < kSide; ++i) {
      __m512 c[4];
      for (int v = 0; v < 4; ++v) c[v] = _mm512_loadu_ps(tiles[v ^ int{low_first}] + kSide * i);
      for (int v = 0; v < 4; ++v) {  // columns 16 v to 16 v + 15: lanes 4 v to 4 v + 3 of all four
        const __m512i low = _mm512_add_epi32(lanes, _mm512_set1_epi32(4 * v));
        const __m512i high = _mm512_shuffle_epi32(low, _MM_PERM_BADC);
        const __m512 left = _mm512_permutex2var_ps(c[0], low, c[1]);
        const __m512 right = _mm512_permutex2var_ps(c[2], high, c[3]);
        _mm512_storeu_ps(tiles[v] + kSide * i, _mm512_mask_mov_ps(left, 0xcccc, right));
      }
    }
  }
};

// Dot products of few rows over groups of 128 weights, of which the last may be a half. kShort: of
// formats whose codes bfloat16 holds, by blocks of any size; scales multiply sums of products.
template <bool kShort>
struct BFloat16Dots {
  static constexpr int64_t kColumns = 128;
  static int unit_log2(const NF4View& w) {
    return kShort && w.blocksize < 64 ? w.blocksize_log2() : 6;
  }
  static bool serves(const NF4View& w) { return kShort == w.low_first(); }

  using Vector = __m512;
  static constexpr int weight_rows(int m) { return m <= (kShort ? 1 : 4) ? 4 : 2; }
  static constexpr bool factored(int) { return kShort; }
  static Vector load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Vector v) { _mm512_storeu_ps(p, v); }
  static Vector fma(Vector a, Vector b, Vector c) {
    return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
  static Vector product(Vector a, Vector b) { return fma(a, b, _mm512_setzero_ps()); }
  static Vector narrow(F32x16 x) { return x.v; }
  static float sum(Vector v) { return _mm512_reduce_add_ps(v); }
  static void load_group(const void* in, DType dtype, int64_t i, int64_t n, bool low_first,
                         float* out) {
    BFloat16Panels::load_ordered(in, dtype, i, n, low_first, reinterpret_cast<uint32_t*>(out));
  }

  struct Codes {
    __m512 values;
    __m512i table, place;  // twice the codes; of a lane's scale
    __mmask8 valid;
    Codes(const float* codes, int log2)
        : values(_mm512_loadu_ps(codes)),
          table(reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(values, values))),
          place(_mm512_load_si512(lanes_of(PackedOrder::kRow, log2).dword)),
          valid(static_cast<__mmask8>((1u << (128 >> log2)) - 1)) {}
  };
  struct Weights {
    __m512i words, table;
    Vector scale;
    // No mask where the table is there twice: vpermw reads five bits.
    Vector code(int v) const {
      return _mm512_castsi512_ps(_mm512_permutexvar_epi16(stream_words(words, v), table));
    }
    Vector at(int v) const {
      return kShort ? code(v) : _mm512_castsi512_ps(bf16_stream(words, table, v));
    }
  };
  static Weights weights(const Codes& codes, const uint8_t* packed, const float* scales) {
    const __m512i words = _mm512_loadu_si512(packed);
    if (kShort) {
      const __m256 units = _mm256_maskz_loadu_ps(codes.valid, scales);
      return {words, codes.table,
              _mm512_permutexvar_ps(codes.place, _mm512_castps256_ps512(units))};
    }
    const __m512i tables = reinterpret_cast<__m512i>(
        _mm512_cvtne2ps_pbh(_mm512_mul_ps(codes.values, _mm512_set1_ps(scales[1])),
                            _mm512_mul_ps(codes.values, _mm512_set1_ps(scales[0]))));
    return {words, tables, codes.values};
  }
  static Vector add_scaled(Vector sum, const Weights& w, Vector acc) {
    return _mm512_fmadd_ps(sum, w.scale, acc);
  }
};

// Sums of weight rows, two at a time. kShort: of blocks of any size, with zeros or without.
template <bool kShort>
struct BFloat16Axpy {
  static constexpr int kPart = 2, kMaxRows = 16, kSums = 16;
  static constexpr bool kDecodesAll = false;
  using Dots = BFloat16Dots<false>;
  using Vector = __m512;
  static int unit_log2(const NF4View& w) { return min64(w.blocksize_log2(), 6); }
  static bool serves(const NF4View& w) { return kShort == w.low_first(); }
  static Vector load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Vector v) { _mm512_storeu_ps(p, v); }
  static Vector fma(Vector a, Vector b, Vector c) { return Dots::fma(a, b, c); }
  static Vector broadcast(const float* p) { return _mm512_set1_ps(*p); }
  static Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }

  struct Codes {
    Codes(const float*, int) {}
  };
  struct Tables {
    RowPair pair;
    Vector at(int v) const { return _mm512_castsi512_ps(pair.at(v)); }
  };
  struct Scaled {
    WideGroup group;
    Vector at(int v) const { return _mm512_castsi512_ps(group.at(v)); }
  };
  // Without a second row its weights are zero.
  static auto weights(const Codes&, const NF4View& w, const Absmax& absmax, int64_t element,
                      int64_t K, int64_t rows) {
    const int64_t second = rows > 1 ? element + K : element;
    const uint8_t *low = w.packed + element / 2, *high = w.packed + second / 2;
    if constexpr (kShort) {
      const BlockDecoder blocks(w, absmax);
      const __m512i words = one_after_other(low, high);
      return Scaled{blocks.wide(words, blocks.rows(element, second, rows > 1))};
    } else {
      const float none = 0.0f, *scale = rows > 1 ? absmax.of(second) : &none;
      const BF16Tables<false> tables(w, absmax);
      return Tables{{alternate(low, high), tables.of(element, second, scale)}};
    }
  }
  static void load_row(const void* dy, DType, int64_t i, int64_t n, float* out, int64_t stride) {
    const uint16_t* p = static_cast<const uint16_t*>(dy) + i;
    for (int64_t j = 0; j < n; j += 2) {
      const uint32_t low = p[j], high = j + 1 < n ? p[j + 1] : 0;
      out[j / 2 * stride] = bits_float(low | high << 16);
    }
  }
  static int64_t place(int64_t c, bool low_first) { return (c % 4 ^ low_first) * 16 + c / 4; }
};

}  // namespace
}  // namespace peftkern
