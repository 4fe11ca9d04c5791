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

// 128 weights from `element` on, of which n exist; the others are zero.
inline void decode_chunk(const NF4View& w, const Absmax& absmax, int64_t element, int64_t n,
                         __m512i out[4]) {
  if (whole_blocks(w, element)) {
    decode128(load_bytes(w.packed + element / 2, (n + 1) / 2),
              bf16_tables(absmax.at(element), n > 64 ? absmax.at(element + 64) : 0.0f), out);
    if (n < 128) {
      for (int j = 0; j < 4; ++j) out[j] = _mm512_maskz_mov_epi16(mask32(n - 32 * j), out[j]);
    }
    return;
  }
  uint16_t values[128] = {};
  for (int64_t j = 0; j < min64(n, 128); ++j) {
    values[j] = bf16_from_float(weight_at(w, absmax, element + j, DType::kFloat32));
  }
  for (int j = 0; j < 4; ++j) out[j] = _mm512_loadu_si512(values + 32 * j);
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

  static void decode_lanes(const NF4View& w, const Absmax& absmax, int64_t N, int64_t K, int64_t n0,
                           int64_t rows, int64_t k0, DType, uint32_t* out, int64_t stride) {
    const __m512i ramp = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    // Word pairs (i, 32 + i): a word of the first row beside the same word of the second.
    const __m512i low =
        _mm512_or_si512(ramp, _mm512_slli_epi32(_mm512_add_epi32(ramp, _mm512_set1_epi32(32)), 16));
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    const int64_t columns = min64(128, K - k0);
    for (int64_t i = 0; i < round_up(rows, 32); i += 2) {
      __m512i v[2][4] = {};
      for (int64_t p = 0; p < 2; ++p) {
        const int64_t n = n0 + i + p;
        if (i + p >= rows) continue;
        prefetch_row(w, N, K, n, k0);
        decode_chunk(w, absmax, n * K + k0, columns, v[p]);
      }
      uint32_t* line = out + i / 32 * kPair + i % 32 / 2 * 16;
      for (int j = 0; j < 4; ++j, line += stride) {
        _mm512_storeu_si512(line, _mm512_permutex2var_epi16(v[0][j], low, v[1][j]));
        _mm512_storeu_si512(line + kTile, _mm512_permutex2var_epi16(v[0][j], high, v[1][j]));
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
  static constexpr int kPart = 2, kMaxRows = 16, kSums = 24;
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
