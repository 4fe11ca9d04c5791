// bfloat16 panels and dot products for the instruction sets with bfloat16 products (AVX512-BF16 and
// AMX). A dword holds two weights that are neighbors along the reduction.
#pragma once

#include "nf4_axpy.h"

namespace peftkern {
namespace {

inline __m512i load_bytes(const uint8_t* p, int64_t n) {
  if (n >= 64) return _mm512_loadu_si512(p);
  return _mm512_maskz_loadu_epi8((__mmask64{1} << n) - 1, p);
}
inline __mmask32 mask32(int64_t n) {
  return n >= 32 ? ~__mmask32{0} : (n <= 0 ? 0 : (__mmask32{1} << n) - 1);
}

// The bfloat16 values of two 64-blocks with these absmax.
inline __m512i bf16_tables(float low, float high) {
  const __m512 code = _mm512_loadu_ps(kNF4Code);
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(_mm512_mul_ps(code, _mm512_set1_ps(high)),
                                                       _mm512_mul_ps(code, _mm512_set1_ps(low))));
}

inline bool whole_blocks(const NF4View& w, int64_t element) {
  return element % 64 == 0 && w.blocksize >= 64;
}

// Stream v, 0 <= v < 4, of packed words: elements 4 t + v, the order in which shifting the words
// yields them. vpermw reads five index bits: four are the nibble, and the fifth, given by `second`,
// chooses between the tables of two blocks in the low and the high half.
inline __m512i bf16_stream(__m512i words, __m512i table, int v, __m512i second) {
  constexpr int kAndOr = 0xea;  // (a & b) | c
  const __m512i shifted = v == 1 ? words : _mm512_srli_epi16(words, v == 0 ? 4 : v == 2 ? 12 : 8);
  return _mm512_permutexvar_epi16(
      _mm512_ternarylogic_epi64(shifted, _mm512_set1_epi16(15), second, kAndOr), table);
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
inline RowPair row_pair(const uint8_t* first, const uint8_t* second, float low, float high) {
  const __m512i ramp = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i alternating =
      _mm512_or_si512(ramp, _mm512_slli_epi32(_mm512_add_epi32(ramp, _mm512_set1_epi32(16)), 16));
  const __m512i rows = join(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(first)),
                            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(second)));
  return {_mm512_permutexvar_epi16(alternating, rows), bf16_tables(low, high)};
}

// Runs emit(i, v) for every 128 of n weights from `element` on; weights past the n-th are zero.
// They come as four streams, number t of v[j] being element i + 4 t + j.
template <class Emit>
inline void decode_streams(const NF4View& w, const Absmax& absmax, int64_t element, int64_t n,
                           const Emit& emit) {
  __m512i v[4];
  if (!whole_blocks(w, element)) {
    for (int64_t i = 0; i < n; i += 128) {
      alignas(64) uint16_t values[128] = {};
      for (int64_t j = 0; j < min64(n - i, 128); ++j) {
        values[j % 4 * 32 + j / 4] =
            bf16_from_float(weight_at(w, absmax, element + i + j, DType::kFloat32));
      }
      for (int j = 0; j < 4; ++j) v[j] = _mm512_load_si512(values + 32 * j);
      emit(i, v);
    }
    return;
  }
  const uint8_t* packed = w.packed + element / 2;
  const int shift = absmax.log2 - 6;
  const int64_t block = element >> 6;
  const auto scale = [&](int64_t b) { return absmax.values[(b >> shift) - absmax.first]; };
  const auto decode = [&](int64_t i, __m512i bytes, float low, float high) {
    const __m512i table = bf16_tables(low, high);
    for (int j = 0; j < 4; ++j) v[j] = bf16_stream(bytes, table, j);
    if (n - i < 128) {
      for (int j = 0; j < 4; ++j) v[j] = _mm512_maskz_mov_epi16(mask32((n - i - j + 3) / 4), v[j]);
    }
    emit(i, v);
  };
  int64_t i = 0;
  for (int64_t b = block; i + 128 <= n; i += 128, b += 2) {
    __builtin_prefetch(packed + i / 2 + kStreamAhead);
    decode(i, _mm512_loadu_si512(packed + i / 2), scale(b), scale(b + 1));
  }
  if (i < n) {
    const int64_t b = block + i / 64;
    decode(i, load_bytes(packed + i / 2, (n - i + 1) / 2), scale(b),
           n - i > 64 ? scale(b + 1) : 0.0f);
  }
}

struct BFloat16Panels {
  static constexpr int64_t kStep = 32;
  static constexpr int64_t kOrder = 128;  // each stream fills a tile row
  static constexpr int64_t kColumns = 64;

  static void load_dwords(const void* in, DType, int64_t i, int64_t n, uint32_t* out) {
    const uint16_t* p = static_cast<const uint16_t*>(in) + i;
    _mm512_storeu_si512(out, _mm512_maskz_loadu_epi16(mask32(n), p));
  }

  // n of 128 elements, the rest zero, in the order of decode_streams.
  static void load_ordered(const void* in, DType, int64_t i, int64_t n, uint32_t* out) {
    const uint16_t* p = static_cast<const uint16_t*>(in) + i;
    const __m512i ramp = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m256i fourth = _mm512_cvtepi32_epi16(_mm512_slli_epi32(ramp, 2));
    __m512i x[4];
    for (int j = 0; j < 4; ++j) {
      x[j] = _mm512_maskz_loadu_epi16(mask32(n - 32 * j), n > 32 * j ? p + 32 * j : p);
    }
    for (int j = 0; j < 4; ++j) {
      const __m512i index = _mm512_castsi256_si512(
          _mm256_add_epi16(fourth, _mm256_set1_epi16(static_cast<int16_t>(j))));
      const __m512i low = _mm512_permutex2var_epi16(x[0], index, x[1]);
      const __m512i high = _mm512_permutex2var_epi16(x[2], index, x[3]);
      _mm512_storeu_si512(out + 16 * j,
                          join(_mm512_castsi512_si256(low), _mm512_castsi512_si256(high)));
    }
  }

  static void decode_row(const NF4View& w, const Absmax& absmax, int64_t element, int64_t n, DType,
                         uint32_t* out, int64_t stride) {
    decode_streams(w, absmax, element, n, [&](int64_t, const __m512i v[4]) {
      for (int j = 0; j < 4; ++j, out += stride) _mm512_storeu_si512(out, v[j]);
    });
  }

  // Tile v of each 64 columns holds every fourth, from v on.
  static void decode_lanes(const NF4View& w, const Absmax& absmax, RowsAhead& ahead, int64_t K,
                           int64_t n0, int64_t rows, int64_t k0, DType, uint32_t* out,
                           int64_t stride) {
    int64_t i = 0;
    if (K % 64 == 0 && w.blocksize >= 64) {
      i = K - k0 >= 128 ? decode_whole<2>(w, absmax, ahead, K, n0, rows, k0, out, stride)
                        : decode_whole<1>(w, absmax, ahead, K, n0, rows, k0, out, stride);
    }
    for (; i < round_up(rows, 32); i += 2) {
      uint32_t* line = out + i / 32 * kPair + i % 32 / 2 * 16;
      for (int64_t k = k0; k < k0 + 128; k += 64, line += 2 * stride) {
        decode_pair(w, absmax, (n0 + i) * K + k, K, min64(2, rows - i), min64(64, K - k), line,
                    line + stride);
      }
    }
  }

  // Pairs of rows over kGroups 64 columns of whole blocks. Returns the number of rows.
  template <int kGroups>
  static int64_t decode_whole(const NF4View& w, const Absmax& absmax, RowsAhead& ahead, int64_t K,
                              int64_t n0, int64_t rows, int64_t k0, uint32_t* out, int64_t stride) {
    int64_t element = n0 * K + k0, i = 0;
    for (; i + 2 <= rows; i += 2, element += 2 * K) {
      ahead.next();
      ahead.next();
      const uint8_t* packed = w.packed + element / 2;
      uint32_t* line = out + i / 32 * kPair + i % 32 / 2 * 16;
#pragma GCC unroll 2
      for (int g = 0; g < kGroups; ++g, line += 2 * stride) {
        const RowPair pair = row_pair(packed + 32 * g, packed + 32 * g + K / 2,
                                      absmax.at(element + 64 * g), absmax.at(element + 64 * g + K));
        _mm512_storeu_si512(line, pair.at(0));
        _mm512_storeu_si512(line + kTile, pair.at(1));
        _mm512_storeu_si512(line + stride, pair.at(2));
        _mm512_storeu_si512(line + stride + kTile, pair.at(3));
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
    for (uint32_t* line : lines) std::memset(line, 0, kSide * 4);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t c = 0; c < columns; ++c) {
        const float value = weight_at(w, absmax, element + i * K + c, DType::kFloat32);
        lines[c % 4][c / 4] |= static_cast<uint32_t>(bf16_from_float(value)) << 16 * i;
      }
    }
  }

  // Four tiles of sums of 64 columns as decode_lanes orders them: after this in order.
  static void arrange(float* const tiles[4]) {
    const __m512i lanes = _mm512_set_epi32(0, 0, 19, 3, 0, 0, 18, 2, 0, 0, 17, 1, 0, 0, 16, 0);
    for (int64_t i = 0; i < kSide; ++i) {
      __m512 c[4];
      for (int v = 0; v < 4; ++v) c[v] = _mm512_loadu_ps(tiles[v] + kSide * i);
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

// Dot products of few rows over groups of 128 weights, of which the last may be a half.
struct BFloat16Dots {
  static constexpr int64_t kColumns = 128;
  using Vector = __m512;
  static constexpr int weight_rows(int m) { return m <= 4 ? 4 : 2; }
  static Vector load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Vector v) { _mm512_storeu_ps(p, v); }
  static Vector fma(Vector a, Vector b, Vector c) {
    return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
  static Vector narrow(F32x16 x) { return x.v; }
  static float sum(Vector v) { return _mm512_reduce_add_ps(v); }
  static void load_group(const void* in, DType dtype, int64_t i, int64_t n, float* out) {
    BFloat16Panels::load_ordered(in, dtype, i, n, reinterpret_cast<uint32_t*>(out));
  }

  struct Weights {
    __m512i words, table;
    Vector at(int v) const { return _mm512_castsi512_ps(bf16_stream(words, table, v)); }
  };
  static Weights weights(const uint8_t* packed, const float* absmax) {
    return {_mm512_loadu_si512(packed), bf16_tables(absmax[0], absmax[1])};
  }
};

// Sums of weight rows, two at a time.
struct BFloat16Axpy {
  static constexpr int kPart = 2, kMaxRows = 16, kSums = 16;
  using Vector = __m512;
  static Vector load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Vector v) { _mm512_storeu_ps(p, v); }
  static Vector fma(Vector a, Vector b, Vector c) { return BFloat16Dots::fma(a, b, c); }
  static Vector broadcast(const float* p) { return _mm512_set1_ps(*p); }
  static Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }

  struct Weights {
    RowPair pair;
    Vector at(int v) const { return _mm512_castsi512_ps(pair.at(v)); }
  };
  static Weights weights(const NF4View& w, const Absmax& absmax, int64_t element, int64_t K,
                         int64_t rows) {
    const int64_t second = rows > 1 ? element + K : element;
    return {row_pair(w.packed + element / 2, w.packed + second / 2, absmax.at(element),
                     rows > 1 ? absmax.at(second) : 0.0f)};
  }
  static void load_row(const void* dy, DType, int64_t i, int64_t n, float* out, int64_t stride) {
    const uint16_t* p = static_cast<const uint16_t*>(dy) + i;
    for (int64_t j = 0; j < n; j += 2) {
      const uint32_t low = p[j], high = j + 1 < n ? p[j + 1] : 0;
      out[j / 2 * stride] = bits_float(low | high << 16);
    }
  }
  static int64_t place(int64_t c) { return c % 4 * 16 + c / 4; }
};

}  // namespace
}  // namespace peftkern
