// Quantize and dequantize one run of blocks on one thread; compiled once per instruction set.
// Reads 4 (or 2) bytes and writes 0.56 per weight, or the reverse: bound by memory, so the work per
// block is a table of its sixteen possible values, scaled and rounded once.
#pragma once

#include "nf4_scale_lanes.h"
#include "nf4_scales.h"

namespace peftkern {
namespace {

inline void pack_nibbles(const uint8_t* codes, int64_t bytes, uint8_t* packed) {
  int64_t j = 0;
#if defined(__AVX512F__)
  const __m512i weights = _mm512_set1_epi16(0x0110);  // even code * 16 + odd code
  for (; j + 32 <= bytes; j += 32) {
    const __m512i pairs = _mm512_maddubs_epi16(_mm512_loadu_si512(codes + 2 * j), weights);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(packed + j), _mm512_cvtepi16_epi8(pairs));
  }
#elif defined(__AVX2__)
  const __m256i weights = _mm256_set1_epi16(0x0110);
  for (; j + 16 <= bytes; j += 16) {
    const __m256i pairs = _mm256_maddubs_epi16(
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + 2 * j)), weights);
    const __m256i narrow = _mm256_permute4x64_epi64(_mm256_packus_epi16(pairs, pairs), 0xd8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(packed + j), _mm256_castsi256_si128(narrow));
  }
#endif
  for (; j < bytes; ++j) packed[j] = static_cast<uint8_t>(codes[2 * j] << 4 | codes[2 * j + 1]);
}

// Inline: not every file that decodes blocks makes them.
inline void quantize_blocks(const void* src, DType dtype, int64_t begin, int64_t end,
                            int64_t blocksize, uint8_t* packed, float* absmax) {
  uint8_t codes[4096 + 16];
  for (int64_t start = begin; start < end; start += blocksize) {
    const int64_t count = min64(blocksize, end - start);
    F32x16 top = f32_zero();
    for (int64_t i = 0; i < count; i += 16) {
      const int n = static_cast<int>(min64(16, count - i));
      top = f32_maxabs(top, load_any(src, dtype, start + i, n));
    }
    const float scale = f32_absmax(top);
    absmax[start / blocksize] = scale;
    const F32x16 inverse = f32_set1(1.0f / (scale < kAbsmaxFloor ? kAbsmaxFloor : scale));
    for (int64_t i = 0; i < count; i += 16) {
      const int n = static_cast<int>(min64(16, count - i));
      f32_codes(f32_mul(load_any(src, dtype, start + i, n), inverse), codes + i);
    }
    uint8_t* bytes = packed + start / 2;
    pack_nibbles(codes, count / 2, bytes);
    if (count % 2) bytes[count / 2] = static_cast<uint8_t>(codes[count - 1] << 4 | 7);  // 7: zero
  }
}

#if defined(__AVX512F__)

// Blocks of 64 and more; those of formats whose low nibbles come first may have zeros.
template <bool kLowFirst>
int64_t dequantize16_blocks(const NF4View& w, const float* absmax, int64_t begin, int64_t end,
                            uint16_t* out, DType dtype, bool stream) {
  const int log2 = w.blocksize_log2();
  const int64_t first = begin >> log2;
  const __m512 codes = _mm512_loadu_ps(codes_of(w));
  const auto table = [&](int64_t element) {
    const int64_t block = element >> log2;
    const bool offset = kLowFirst && w.zero;
    return table16(offset ? _mm512_sub_ps(codes, _mm512_set1_ps(w.zero[block])) : codes,
                   absmax[block - first], dtype);
  };
  stream = stream && reinterpret_cast<uintptr_t>(out + begin) % 64 == 0;
  int64_t i = begin;
  for (; i + 128 <= end; i += 128) {
    const __m512i tables = join(table(i), table(i + 64));
    __m512i v[4];
    decode128<kLowFirst>(_mm512_loadu_si512(w.packed + i / 2), tables, v);
    __m512i* p = reinterpret_cast<__m512i*>(out + i);
    for (int j = 0; j < 4; ++j) {
      stream ? _mm512_stream_si512(p + j, v[j]) : _mm512_storeu_si512(p + j, v[j]);
    }
  }
  return i;
}

// e2m1 codes as bfloat16, up to the first 128 weights whose scales are out of the ordinary.
template <bool kPowers>
int64_t dequantize_e2m1(const NF4View& w, const float* scales, int64_t begin, int64_t end,
                        uint16_t* out, bool stream) {
  const int log2 = w.blocksize_log2();
  const int64_t first = begin >> log2;
  const ScaleLanes& lanes = lanes_of(PackedOrder::kSpread, log2);
  const __mmask8 used = static_cast<__mmask8>((1u << (128 >> log2)) - 1);
  stream = stream && reinterpret_cast<uintptr_t>(out + begin) % 64 == 0;
  int64_t i = begin;
  for (; i + 128 <= end; i += 128) {
    const __m256 scale = _mm256_maskz_loadu_ps(used, scales + (i >> log2) - first);
    if (!ordinary(scale, used)) break;
    const E2M1Group<kPowers> group(spread_dwords(_mm512_loadu_si512(w.packed + i / 2)), lanes,
                                   scale);
    __m512i v[4];
    put_in_order(group.exact_at(1), group.exact_at(0), group.exact_at(3), group.exact_at(2), v);
    __m512i* p = reinterpret_cast<__m512i*>(out + i);
    for (int j = 0; j < 4; ++j) {
      stream ? _mm512_stream_si512(p + j, v[j]) : _mm512_storeu_si512(p + j, v[j]);
    }
  }
  return i;
}

// Blocks of 16 or 32: 32 weights at a time, with the tables of two blocks or of one.
int64_t dequantize16_short(const NF4View& w, const float* absmax, int64_t begin, int64_t end,
                           uint16_t* out, DType dtype, bool stream) {
  const int log2 = w.blocksize_log2();
  const int64_t first = begin >> log2;
  if (dtype == DType::kBFloat16 && w.format == Format::kMXFP4) {
    begin = dequantize_e2m1<true>(w, absmax, begin, end, out, stream);
  } else if (dtype == DType::kBFloat16 && w.format == Format::kNVFP4) {
    begin = dequantize_e2m1<false>(w, absmax, begin, end, out, stream);
  }
  const __m512 codes = _mm512_loadu_ps(codes_of(w));
  const auto table = [&](int64_t block) {
    return table16(w.zero ? _mm512_sub_ps(codes, _mm512_set1_ps(w.zero[block])) : codes,
                   absmax[block - first], dtype);
  };
  // A byte in a dword: its nibbles in two words, of which one is clean and one has both.
  const __m512i right = _mm512_set1_epi32(w.low_first() ? 0 : 4);
  const __m512i left = _mm512_set1_epi32(w.low_first() ? 12 : 16);
  const __m512i nibble = _mm512_set1_epi16(15);
  const __m512i half = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
  constexpr int kAndOr = 0xea;  // (a & b) | c
  stream = stream && reinterpret_cast<uintptr_t>(out + begin) % 64 == 0;
  int64_t i = begin;
  for (; i + 32 <= end; i += 32) {
    const __m256i low = table(i >> log2), high = log2 == 4 ? table((i >> log2) + 1) : low;
    const __m512i bytes =
        _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w.packed + i / 2)));
    const __m512i words =
        _mm512_or_si512(_mm512_srlv_epi32(bytes, right), _mm512_sllv_epi32(bytes, left));
    const __m512i v = _mm512_permutexvar_epi16(
        _mm512_ternarylogic_epi64(words, nibble, half, kAndOr), join(low, high));
    __m512i* p = reinterpret_cast<__m512i*>(out + i);
    stream ? _mm512_stream_si512(p, v) : _mm512_storeu_si512(p, v);
  }
  return i;
}

#elif defined(__AVX2__)

// Sixteen values of a 16-bit type as the bytes of each, in both halves.
struct ByteTable {
  __m256i low, high;
};

inline ByteTable byte_table(F32x16 x, DType dtype) {
  const __m256i words =
      dtype == DType::kBFloat16 ? bf16_words(x) : _mm256_set_m128i(fp16_bits(x.b), fp16_bits(x.a));
  const __m256i apart = _mm256_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15, 0, 2,
                                         4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
  const __m256i bytes = _mm256_shuffle_epi8(words, apart);
  return {_mm256_permute4x64_epi64(bytes, 0x88), _mm256_permute4x64_epi64(bytes, 0xdd)};
}

// 64 weights at a time, of kBlocks blocks, or of a part of one; table(element) is that of a block.
template <int kBlocks, class Table>
int64_t dequantize16(const NF4View& w, int64_t begin, int64_t end, uint16_t* out,
                     const Table& table) {
  const __m256i order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7), nibble = _mm256_set1_epi8(15);
  const bool low_first = w.low_first();
  int64_t i = begin;
  for (; i + 64 <= end; i += 64) {
    const ByteTable t0 = table(i), t1 = kBlocks > 2 ? table(i + 16) : t0;
    const ByteTable t2 = kBlocks > 1 ? table(i + 32) : t0, t3 = kBlocks > 2 ? table(i + 48) : t2;
    const __m256i packed = _mm256_permutevar8x32_epi32(
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w.packed + i / 2)), order);
    const __m256i low = _mm256_and_si256(packed, nibble);
    const __m256i high = _mm256_and_si256(_mm256_srli_epi16(packed, 4), nibble);
    const __m256i even = low_first ? low : high, odd = low_first ? high : low;
    const __m256i front = _mm256_unpacklo_epi8(even, odd), back = _mm256_unpackhi_epi8(even, odd);
    const auto bytes = [](__m256i half, __m256i codes) { return _mm256_shuffle_epi8(half, codes); };
    const auto store = [&](int j, __m256i words) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i + 16 * j), words);
    };
    store(0, _mm256_unpacklo_epi8(bytes(t0.low, front), bytes(t0.high, front)));
    store(1, _mm256_unpackhi_epi8(bytes(t1.low, front), bytes(t1.high, front)));
    store(2, _mm256_unpacklo_epi8(bytes(t2.low, back), bytes(t2.high, back)));
    store(3, _mm256_unpackhi_epi8(bytes(t3.low, back), bytes(t3.high, back)));
  }
  return i;
}

// By tables of every byte that a scale can be, of which there are fewer than blocks.
int64_t dequantize16_bytes(const NF4View& w, int64_t begin, int64_t end, uint16_t* out,
                           DType dtype) {
  alignas(32) uint8_t halves[256][32];
  float scales[256];
  scales_of_bytes(w, scales);
  const BlockTables tables(w, DType::kFloat32);
  for (int i = 0; i < 256; ++i) {
    const ByteTable t = byte_table(tables.of(0, scales[i]), dtype);
    _mm256_store_si256(reinterpret_cast<__m256i*>(halves[i]),
                       _mm256_blend_epi32(t.low, t.high, 0xf0));
  }
  const uint8_t* bytes = static_cast<const uint8_t*>(w.absmax);
  const int log2 = w.blocksize_log2();
  const auto table = [&](int64_t element) {
    const __m128i* half = reinterpret_cast<const __m128i*>(halves[bytes[element >> log2]]);
    return ByteTable{_mm256_broadcastsi128_si256(_mm_load_si128(half)),
                     _mm256_broadcastsi128_si256(_mm_load_si128(half + 1))};
  };
  return log2 == 4 ? dequantize16<4>(w, begin, end, out, table)
                   : dequantize16<2>(w, begin, end, out, table);
}

int64_t dequantize16_blocks(const NF4View& w, const float* absmax, int64_t begin, int64_t end,
                            uint16_t* out, DType dtype) {
  const int log2 = w.blocksize_log2();
  if (w.byte_scales() && (end - begin) >> log2 >= 256) {
    return dequantize16_bytes(w, begin, end, out, dtype);
  }
  const int64_t first = begin >> log2;
  const BlockTables tables(w, DType::kFloat32);
  const auto table = [&](int64_t element) {
    const int64_t block = element >> log2;
    return byte_table(tables.of(block, absmax[block - first]), dtype);
  };
  return log2 == 4   ? dequantize16<4>(w, begin, end, out, table)
         : log2 == 5 ? dequantize16<2>(w, begin, end, out, table)
                     : dequantize16<1>(w, begin, end, out, table);
}

#endif

void dequantize_blocks(const NF4View& w, const float* absmax, int64_t begin, int64_t end, void* out,
                       DType dtype, bool stream) {
  const int log2 = w.blocksize_log2();
  const int64_t first = begin >> log2;
  const BlockTables tables(w, DType::kFloat32);  // stores round
  const NibbleOrder order = nibble_order(w.low_first());
  int64_t i = begin;
#if defined(__AVX512F__)
  const bool streamed = stream;
  if (dtype != DType::kFloat32) {
    const auto kernel = w.blocksize < 64 ? dequantize16_short
                        : w.low_first()  ? dequantize16_blocks<true>
                                         : dequantize16_blocks<false>;
    i = kernel(w, absmax, begin, end, static_cast<uint16_t*>(out), dtype, stream);
  }
  stream = stream && dtype == DType::kFloat32 && reinterpret_cast<uintptr_t>(out) % 64 == 0;
#elif defined(__AVX2__)
  (void)stream;
  if (dtype != DType::kFloat32) {
    i = dequantize16_blocks(w, absmax, begin, end, static_cast<uint16_t*>(out), dtype);
  }
#else
  (void)stream;
#endif
  while (i < end) {
    const int64_t stop = min64(end, ((i >> log2) + 1) << log2);
    const F32x16 table = tables.of(i >> log2, absmax[(i >> log2) - first]);
    for (; i + 16 <= stop; i += 16) {
      const F32x16 x = f32_lookup(w.packed + i / 2, table, order);
#if defined(__AVX512F__)
      if (stream) {
        _mm512_stream_ps(static_cast<float*>(out) + i, x.v);
        continue;
      }
#endif
      store_any(out, dtype, i, x, 16);
    }
    if (i < stop) {
      const int n = static_cast<int>(stop - i);
      store_any(out, dtype, i, f32_lookup_at(w.packed, i, n, table), n);
      i = stop;
    }
  }
#if defined(__AVX512F__)
  if (streamed) _mm_sfence();  // non-temporal stores are not ordered otherwise
#endif
}

}  // namespace
}  // namespace peftkern
