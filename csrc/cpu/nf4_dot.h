// y = x W^T + s b^T + bias for few rows of x: dot products of weight rows as they stream by.
// Compiled once per instruction set.
//
// Up to eight rows of x share each decoded weight: kN weight rows times kM rows of x are summed in
// registers, lanes along K, so that a load of x feeds kN products and a decoded weight kM. x lies
// in the order in which a task's weight rows meet it, and they meet 16 KiB of it at a time, which
// stay in the first-level cache. Bytes per weight: 0.52. Instructions for 128 weights (gcc 12):
//
//   rows of x                 1    4    8   of which multiply-adds
//   AVX512-BF16              24   39   67   4 a row
//   AVX-512                  38   72  113   8 a row
//   AVX2                     92  160  242   16 a row
#pragma once

#include "nf4_panel.h"

namespace peftkern {
namespace {

constexpr int64_t kDotRows = 8;          // rows of x that share a decoded weight
constexpr int64_t kDotTaskRows = 32;     // weight rows of a task; a multiple of every kN
constexpr int64_t kDotGroup = 64;        // floats: a group of a row of x is 256 bytes of any type
constexpr int64_t kDotCache = 16 << 10;  // bytes of x in a pass

// float32 codes in a group of 64 weights. Shifting eight packed dwords by one amount yields every
// eighth weight, so element 8 l + j of a group goes to place 8 j + l; where low nibbles come first,
// those of odd and even j change places. AVX2 looks up the bytes of codes, 32 at once, and unpacks
// them: vpermps, of which eight values would take two, takes a Zen 3 2.6 times as long as vpshufb.
// Before it, each half's two quarters are interleaved, so that a lane has one block's weights in
// all vectors. kShort: of blocks of any size, whose scales multiply the weights that they belong
// to, or sums of their products; else a group is one block's.
template <bool kShort>
struct Float32Dots {
  static constexpr int64_t kColumns = 64;
  // log2 of the weights that have a scale of their own.
  static int unit_log2(const NF4View& w) {
    return kShort && w.blocksize < 64 ? w.blocksize_log2() : 6;
  }
  static bool serves(const NF4View& w) { return kShort == (w.blocksize < 64); }

  static void load_group(const void* in, DType dtype, int64_t i, int64_t, bool low_first,
                         float* out) {
    float values[64];
    for (int j = 0; j < 64; j += 16) f32_store(values + j, load_any(in, dtype, i + j, 16));
    for (int j = 0; j < 64; ++j) out[place(j, low_first)] = values[j];
  }

  // Column c of a group is at this place of its vectors.
  static int place(int c, bool low_first) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    return ((c % 2 ^ low_first) * 4 + c / 4 % 4) * 8 + c / 16 * 2 + c / 2 % 2;
#else
    return (c % 8 ^ low_first) * 8 + c / 8;
#endif
  }

  // Which of a group's scales, one a unit of weights, belongs to a packed dword's.
  static constexpr int scale_of(int dword, int log2) { return dword * 8 >> log2; }

#if defined(__AVX512F__)
  using Vector = __m512;
  static constexpr int weight_rows(int m) { return m <= 4 && !(kShort && m == 2) ? 4 : 2; }
  // Scales multiply sums of a group's products: for few rows that is less than the weights.
  static constexpr bool factored(int m) { return kShort && m <= 2; }
  static Vector load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Vector v) { _mm512_storeu_ps(p, v); }
  static Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
  static Vector product(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
  static Vector narrow(F32x16 x) { return x.v; }
  static float sum(Vector v) { return _mm512_reduce_add_ps(v); }

  struct Codes {
    __m512 values;
    __m512i place;   // of a lane's scale in its 128 bits
    __mmask8 valid;  // scales of a group
    Codes(const float* codes, int log2) : values(_mm512_loadu_ps(codes)) {
      int32_t places[16];
      for (int i = 0; i < 16; ++i) places[i] = scale_of(i % 8, log2);
      place = _mm512_loadu_si512(places);
      valid = static_cast<__mmask8>((1 << (64 >> log2)) - 1);
    }
    // Values of units, spread over the lanes.
    Vector spread(const float* p) const {
      const __m512 units = _mm512_broadcast_f32x4(_mm_maskz_loadu_ps(valid, p));
      return _mm512_permutevar_ps(units, place);
    }
    // The same of four values that are there.
    Vector spread_padded(const float* p) const {
      return _mm512_permutevar_ps(_mm512_broadcast_f32x4(_mm_loadu_ps(p)), place);
    }
  };

  struct Weights {
    __m512i words;  // the same eight dwords in both halves
    __m512 table, scale;
    // Streams 2 v and 2 v + 1. vpermps reads the low four bits of a lane only.
    Vector code(int v) const {
      const __m256i odd = _mm256_set1_epi32(8 * v);
      const __m512i even = _mm512_set1_epi32(8 * v + 4);
      return _mm512_permutexvar_ps(_mm512_srlv_epi32(words, _mm512_inserti64x4(even, odd, 1)),
                                   table);
    }
    Vector at(int v) const { return kShort ? _mm512_mul_ps(code(v), scale) : code(v); }
  };
  // Where kShort and padded, four scales can be read.
  static Weights weights(const Codes& codes, const uint8_t* packed, const float* scales,
                         bool padded = true) {
    const auto spread = [&] { return padded ? codes.spread_padded(scales) : codes.spread(scales); };
    const __m512i words =
        _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed)));
    if (kShort) return {words, codes.values, spread()};
    return {words, _mm512_mul_ps(codes.values, _mm512_set1_ps(*scales)), codes.values};
  }
#elif defined(__AVX2__)
  using Vector = __m256;
  static constexpr int weight_rows(int) { return 1; }
  static constexpr bool factored(int) { return true; }
  static Vector load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Vector v) { _mm256_storeu_ps(p, v); }
  static Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
  static Vector product(Vector a, Vector b) { return _mm256_mul_ps(a, b); }
  static Vector narrow(F32x16 x) { return _mm256_add_ps(x.a, x.b); }
  static float sum(Vector v) { return f32_sum({v, _mm256_setzero_ps()}); }

  struct Codes {
    __m256i bytes[4];  // byte k of each code, in both halves
    __m256i place;
    __m128i valid;
    Codes(const float* codes, int log2) {
      for (int k = 0; k < 4; ++k) {
        uint8_t byte[16];
        for (int i = 0; i < 16; ++i) byte[i] = static_cast<uint8_t>(float_bits(codes[i]) >> 8 * k);
        bytes[k] =
            _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(byte)));
      }
      int32_t places[8], used[4];
      for (int i = 0; i < 8; ++i) places[i] = scale_of(i, log2);
      for (int i = 0; i < 4; ++i) used[i] = i < 64 >> log2 ? -1 : 0;
      place = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(places));
      valid = _mm_loadu_si128(reinterpret_cast<const __m128i*>(used));
    }
    Vector spread(const float* p) const {
      const __m128 units = _mm_maskload_ps(p, valid);
      return _mm256_permutevar_ps(_mm256_set_m128(units, units), place);
    }
    Vector spread_padded(const float* p) const {
      const __m256 units = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(p));
      return _mm256_permutevar_ps(units, place);
    }
  };

  struct Weights {
    const Codes* codes;
    __m256i high, low;  // nibbles
    __m256 scale;
    Vector code(int v) const {
      const __m256i nibbles = v < 4 ? high : low;
      const auto byte = [&](int k) { return _mm256_shuffle_epi8(codes->bytes[k], nibbles); };
      const __m256i b0 = byte(0), b1 = byte(1), b2 = byte(2), b3 = byte(3);
      const bool upper = v % 4 > 1;
      const __m256i lows = upper ? _mm256_unpackhi_epi8(b0, b1) : _mm256_unpacklo_epi8(b0, b1);
      const __m256i highs = upper ? _mm256_unpackhi_epi8(b2, b3) : _mm256_unpacklo_epi8(b2, b3);
      return _mm256_castsi256_ps(v % 2 ? _mm256_unpackhi_epi16(lows, highs)
                                       : _mm256_unpacklo_epi16(lows, highs));
    }
    Vector at(int v) const { return _mm256_mul_ps(code(v), scale); }
  };
  // Where kShort and padded, four scales can be read.
  static Weights weights(const Codes& codes, const uint8_t* packed, const float* scales,
                         bool padded = true) {
    const __m256i order = _mm256_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15, 0,
                                           1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15);
    const __m256i nibble = _mm256_set1_epi8(15);
    const __m256i bytes =
        _mm256_shuffle_epi8(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed)), order);
    Weights out;
    out.codes = &codes;
    out.high = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble);
    out.low = _mm256_and_si256(bytes, nibble);
    out.scale = !kShort  ? _mm256_set1_ps(*scales)
                : padded ? codes.spread_padded(scales)
                         : codes.spread(scales);
    return out;
  }
#else
  using Vector = F32x16;
  static constexpr int weight_rows(int) { return 1; }
  static constexpr bool factored(int) { return false; }
  static Vector load(const float* p) { return f32_load(p); }
  static void store(float* p, const Vector& v) { f32_store(p, v); }
  static Vector fma(const Vector& a, const Vector& b, const Vector& c) { return f32_fma(a, b, c); }
  static Vector product(const Vector& a, const Vector& b) { return f32_mul(a, b); }
  static Vector narrow(const F32x16& x) { return x; }
  static float sum(const Vector& v) { return f32_sum(v); }

  struct Codes {
    F32x16 values;
    int log2;
    Codes(const float* codes, int unit) : values(f32_load(codes)), log2(unit) {}
    Vector spread(const float* p) const {
      return f32_make([&](int i) { return p[scale_of(i % 8, log2)]; });
    }
    Vector spread_padded(const float* p) const { return spread(p); }
  };

  struct Weights {
    const uint8_t* packed;
    F32x16 table, scale;
    Vector code(int v) const {
      return f32_make([&](int i) {
        const int shift = i < 8 ? 4 : 0;
        return table.v[packed[i % 8 * 4 + v] >> shift & 15];
      });
    }
    Vector at(int v) const { return kShort ? f32_mul(code(v), scale) : code(v); }
  };
  // Where kShort and padded, four scales can be read.
  static Weights weights(const Codes& codes, const uint8_t* packed, const float* scales,
                         bool padded = true) {
    const auto spread = [&] { return padded ? codes.spread_padded(scales) : codes.spread(scales); };
    if (kShort) return {packed, codes.values, spread()};
    return {packed, f32_mul(codes.values, f32_set1(*scales)), codes.values};
  }
#endif
  static Vector add_scaled(const Vector& sum, const Weights& w, const Vector& acc) {
    return fma(sum, w.scale, acc);
  }
};

template <class Dots>
struct NF4Dots {
  const NF4PieceArgs& args;
  const NF4Wave& wave;
  const typename Dots::Codes codes{dot_codes(args.w), Dots::unit_log2(args.w)};

  using Vector = typename Dots::Vector;
  static constexpr int64_t kLanes = sizeof(Vector) / 4;
  static constexpr int kVectors = kDotGroup / kLanes;  // in a group
  static constexpr int64_t kColumns = Dots::kColumns;  // of a group

  // Codes of int4 lie around 8 here, so that little is left of a zero for `subtract_zeros`.
  static const float* dot_codes(const NF4View& w) { return w.zero ? kCenteredInt4 : codes_of(w); }

  // What all tasks read: x as [tile of rows][group][row][kDotGroup], s scaled and padded, and for
  // weights with zeros the sums of a row of x over each block, padded.
  struct Prepared {
    float *x, *s, *sums;
    int64_t groups, stride, sum_stride;
  };

  // Scales of so many weights, of one for every unit.
  int64_t scales_of(int64_t count) const { return count >> Dots::unit_log2(args.w); }

  // kN weight rows from some column on, each with a scale for every unit of weights.
  template <int kN>
  struct Rows {
    const uint8_t* packed[kN];
    const float* absmax[kN];
  };

  // So many groups of kN weight rows times kM rows of x, added to sums[kN][kM][kLanes]. The weights
  // that are needed soon begin `ahead` bytes further.
  template <int kN, int kM>
  void multiply(Rows<kN> rows, int64_t groups, int64_t ahead, const float* x, float* sums) const {
    const typename Dots::Codes own = codes;
    const int64_t scales = scales_of(kColumns);
    Vector acc[kN][kM];
    for (int i = 0; i < kN; ++i) {
      for (int m = 0; m < kM; ++m) acc[i][m] = Dots::load(sums + (i * kM + m) * kLanes);
    }
    for (int64_t g = 0; g < groups; ++g, x += kM * kDotGroup) {
      typename Dots::Weights weights[kN];
      for (int i = 0; i < kN; ++i) {
        weights[i] = Dots::weights(own, rows.packed[i], rows.absmax[i]);
        __builtin_prefetch(rows.packed[i] + ahead);
        rows.packed[i] += kColumns / 2;
        rows.absmax[i] += scales;
      }
      if constexpr (Dots::factored(kM)) {
        add_factored<kN, kM>(weights, x, acc);
        continue;
      }
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        Vector weight[kN];
        for (int i = 0; i < kN; ++i) weight[i] = weights[i].at(v);
        for (int m = 0; m < kM; ++m) {
          const Vector value = Dots::load(x + (m * kVectors + v) * kLanes);
          for (int i = 0; i < kN; ++i) acc[i][m] = Dots::fma(weight[i], value, acc[i][m]);
        }
      }
    }
    for (int i = 0; i < kN; ++i) {
      for (int m = 0; m < kM; ++m) Dots::store(sums + (i * kM + m) * kLanes, acc[i][m]);
    }
  }

  // A group's products of unscaled weights, then their sums times the scales.
  template <int kN, int kM>
  static void add_factored(const typename Dots::Weights* weights, const float* x,
                           Vector (&acc)[kN][kM]) {
    Vector code[kVectors][kN];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      for (int i = 0; i < kN; ++i) code[v][i] = weights[i].code(v);
    }
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m) {
      Vector sum[kN];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        const Vector value = Dots::load(x + (m * kVectors + v) * kLanes);
        for (int i = 0; i < kN; ++i) {
          sum[i] = v == 0 ? Dots::product(code[v][i], value) : Dots::fma(code[v][i], value, sum[i]);
        }
      }
      for (int i = 0; i < kN; ++i) acc[i][m] = Dots::add_scaled(sum[i], weights[i], acc[i][m]);
    }
  }

  // The last 64 columns where a group has 128: the other half is zero.
  template <int kN, int kM>
  void multiply_half(const Rows<kN>& rows, const float* x, float* sums) const {
    uint8_t packed[kN][64] = {};
    float absmax[kN][8] = {};
    Rows<kN> padded;
    for (int i = 0; i < kN; ++i) {
      std::memcpy(packed[i], rows.packed[i], 32);
      for (int64_t j = 0; j < scales_of(64); ++j) absmax[i][j] = rows.absmax[i][j];
      padded.packed[i] = packed[i], padded.absmax[i] = absmax[i];
    }
    multiply<kN, kM>(padded, 1, 0, x, sums);
  }

  // Weight rows [begin, begin + count) of a piece, with their absmax, and a scratch for sums.
  struct Task {
    const NF4Piece& piece;
    int64_t begin, count;
    const float* absmax;
    float* sums;
    int64_t row(int64_t i) const { return piece.weight + begin + i; }
  };

  // Scales of so many rows, one for every unit of weights: those of larger blocks more than once.
  const float* expand_task(int64_t row, int64_t count, float* out) const {
    const int64_t first = row * args.K, n = scales_of(count * args.K);
    const int64_t unit = int64_t{1} << Dots::unit_log2(args.w);
    const int64_t times = args.w.blocksize / unit;
    const Absmax absmax = expand_rows(args.w, first, count * args.K, times > 1 ? out + n : out);
    const float* scales = absmax.of(first);
    const bool last = first + count * args.K == args.w.numel;
    if (times <= 1 && (unit == 64 || scales == out || !last)) return scales;
    if (times <= 1) {  // of the caller, who has not padded them
      std::memcpy(out, scales, static_cast<size_t>(n) * 4);
    } else if (first % args.w.blocksize == 0 && times == 2) {
      for (int64_t i = 0; i < n / 2; ++i) out[2 * i] = out[2 * i + 1] = scales[i];
      if (n % 2) out[n - 1] = scales[n / 2];
    } else {
      for (int64_t i = 0; i < n; ++i) out[i] = absmax.at(first + unit * i);
    }
    return out;
  }

  // Adds what the zeros of a task's row make of rows of x: sums over blocks times scale (8 - zero).
  template <int kM>
  void subtract_zeros(const float* x, int64_t stride, int64_t row, F32x16 (&acc)[kM]) const {
    const int64_t blocks = args.K / args.w.blocksize;
    const float* scale = static_cast<const float*>(args.w.absmax) + row * blocks;
    const float* zero = args.w.zero + row * blocks;
    for (int64_t j = 0; j < blocks; j += 16) {
      const int n = static_cast<int>(min64(16, blocks - j));
      const F32x16 offset = f32_fma(f32_load_n(zero + j, n), f32_set1(-1.0f), f32_set1(8.0f));
      const F32x16 value = f32_mul(offset, f32_load_n(scale + j, n));
      for (int m = 0; m < kM; ++m) acc[m] = f32_fma(value, f32_load(x + m * stride + j), acc[m]);
    }
  }

  // sums[row][kM][kLanes]: the low-rank update, spread over the lanes, and what zeros make.
  template <int kM>
  void start(const Prepared& p, const Task& t, int64_t m0) const {
    const float* s = p.s + (t.piece.start + m0) * p.stride;
    const float* x = p.sums + (t.piece.start + m0) * p.sum_stride;
    for (int64_t i = 0; i < t.count; ++i) {
      F32x16 acc[kM];
      for (int m = 0; m < kM; ++m) acc[m] = f32_zero();
      for (int64_t j = 0; j < args.r; j += 16) {
        const float* b = args.factor + (t.begin + i) * args.r + j;
        const int n = static_cast<int>(min64(16, args.r - j));
        const F32x16 value = n == 16 ? f32_load(b) : f32_load_n(b, n);
        for (int m = 0; m < kM; ++m)
          acc[m] = f32_fma(value, f32_load(s + m * p.stride + j), acc[m]);
      }
      if (args.w.zero) subtract_zeros<kM>(x, p.sum_stride, t.row(i), acc);
      float* sums = t.sums + i * kM * kLanes;
      for (int m = 0; m < kM; ++m) Dots::store(sums + m * kLanes, Dots::narrow(acc[m]));
    }
  }

  template <int kM>
  void finish(const Task& t, int64_t m0) const {
    for (int m = 0; m < kM; ++m) {
      for (int64_t i = 0; i < t.count; i += 16) {
        const int count = static_cast<int>(min64(16, t.count - i));
        float y[16] = {};
        for (int j = 0; j < count; ++j) {
          y[j] = Dots::sum(Dots::load(t.sums + ((i + j) * kM + m) * kLanes));
        }
        F32x16 out = f32_load(y);
        if (args.bias) out = f32_add(out, f32_load_n(args.bias + t.begin + i, count));
        store_any(args.out, args.out_dtype, (t.piece.first + m0 + m) * args.N + t.begin + i, out,
                  count);
      }
    }
  }

  // y[m0 : m0 + kM, the rows of the task].
  template <int kM>
  void tile(const Prepared& p, const Task& t, int64_t m0) const {
    constexpr int kN = Dots::weight_rows(kM);
    constexpr int64_t kPass = kDotCache / (kM * kDotGroup * 4) * kColumns;
    const float* x = p.x + (t.piece.start + m0) * p.groups * kDotGroup;
    start<kM>(p, t, m0);
    for (int64_t k0 = 0; k0 < args.K; k0 += kPass, x += kPass / kColumns * kM * kDotGroup) {
      const int64_t n = min64(kPass, args.K - k0), groups = n / kColumns;
      const int64_t below = round_up(ceil_div(2 * kStreamAhead, n), kN);
      for (int64_t i = 0; i < t.count; i += kN) {
        if (m0 == 0 && k0 == 0)
          prefetch_scales(args.w, (t.row(i) + kDotTaskRows) * args.K, kN * args.K);
        Rows<kN> rows;
        for (int64_t j = 0; j < kN; ++j) {
          const int64_t row = min64(i + j, t.count - 1);  // the last one again, for nobody
          rows.packed[j] = args.w.packed + (t.row(row) * args.K + k0) / 2;
          rows.absmax[j] = t.absmax + scales_of(row * args.K + k0);
        }
        const bool here = i + below < t.count;
        const int64_t ahead = (below - (here ? 0 : t.count)) * args.K + (here ? 0 : n);
        float* sums = t.sums + i * kM * kLanes;
        multiply<kN, kM>(rows, groups, ahead / 2, x, sums);
        if (n % kColumns == 0) continue;
        for (int64_t j = 0; j < kN; ++j) {
          rows.packed[j] += groups * kColumns / 2, rows.absmax[j] += scales_of(groups * kColumns);
        }
        multiply_half<kN, kM>(rows, x + groups * kM * kDotGroup, sums);
      }
    }
    finish<kM>(t, m0);
  }

  void tile_of(int64_t m, const Prepared& p, const Task& t, int64_t m0) const {
    switch (m) {
      case 1:
        return tile<1>(p, t, m0);
      case 2:
        return tile<2>(p, t, m0);
      case 3:
        return tile<3>(p, t, m0);
      case 4:
        return tile<4>(p, t, m0);
      case 5:
        return tile<5>(p, t, m0);
      case 6:
        return tile<6>(p, t, m0);
      case 7:
        return tile<7>(p, t, m0);
      default:
        return tile<8>(p, t, m0);
    }
  }

  // The sum of so many values of x, a multiple of 16.
  float sum_of(int64_t first, int64_t count) const {
    F32x16 sum = f32_zero();
    for (int64_t i = 0; i < count; i += 16) {
      sum = f32_add(sum, load_any(args.in, args.dtype, first + i, 16));
    }
    return f32_sum(sum);
  }

  // Row i of the wave.
  void prepare(const Prepared& p, int64_t i) const {
    const NF4Piece& piece = piece_of(wave, i);
    const int64_t m = i - piece.start, m0 = m / kDotRows * kDotRows;
    if (m >= piece.M) return;
    const int64_t rows = min64(kDotRows, piece.M - m0);
    const int64_t source = source_row(args, piece.first + m) * args.K;
    float* x = p.x + (piece.start + m0) * p.groups * kDotGroup + (m - m0) * kDotGroup;
    for (int64_t g = 0; g < p.groups; ++g, x += rows * kDotGroup) {
      Dots::load_group(args.in, args.dtype, source + g * kColumns,
                       min64(kColumns, args.K - g * kColumns), args.w.low_first(), x);
    }
    for (int64_t j = 0; j < p.sum_stride; ++j) {
      const int64_t k = j * args.w.blocksize;
      p.sums[i * p.sum_stride + j] = k < args.K ? sum_of(source + k, args.w.blocksize) : 0.0f;
    }
    for (int64_t j = 0; j < p.stride; ++j) {
      const int64_t at = (piece.first + m) * args.r + j;
      p.s[i * p.stride + j] = j < args.r ? args.scaling * args.s[at] : 0.0f;
    }
  }

  void forward() const {
    const int64_t groups = ceil_div(args.K, kColumns), stride = round_up(args.r, 16);
    const int64_t blocks = args.w.zero ? round_up(args.K / args.w.blocksize, 16) : 0;
    Scratch x(wave.rows * groups * kDotGroup * 4), s(wave.rows * stride * 4);
    Scratch sums(wave.rows * blocks * 4);
    const Prepared p{x.floats(), s.floats(), sums.floats(), groups, stride, blocks};
    parallel_for(args.threads, wave.rows, [&](int64_t i, int) { prepare(p, i); });

    constexpr int64_t kSums = kDotTaskRows * kDotRows * kLanes;
    const int64_t per_thread = round_up(kSums + 2 * scales_of(kDotTaskRows * args.K) + 8, 16);
    const int64_t tasks = ceil_div(args.N, kDotTaskRows);
    Scratch scratch(args.threads * per_thread * 4);
    parallel_for(args.threads, wave.count * tasks, [&](int64_t i, int thread) {
      float* own = scratch.floats() + thread * per_thread;
      const NF4Piece& piece = wave.pieces[i / tasks];
      const int64_t begin = i % tasks * kDotTaskRows, count = min64(kDotTaskRows, args.N - begin);
      const float* absmax = expand_task(piece.weight + begin, count, own + kSums);
      const Task t{piece, begin, count, absmax, own};
      for (int64_t m0 = 0; m0 < piece.M; m0 += kDotRows) {
        tile_of(min64(kDotRows, piece.M - m0), p, t, m0);
      }
    });
  }
};

}  // namespace
}  // namespace peftkern
