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
//   AVX2                    108  174  238   16 a row
#pragma once

#include "nf4_panel.h"

namespace peftkern {
namespace {

constexpr int64_t kDotRows = 8;          // rows of x that share a decoded weight
constexpr int64_t kDotTaskRows = 32;     // weight rows of a task; a multiple of every kN
constexpr int64_t kDotGroup = 64;        // floats: a group of a row of x is 256 bytes of any type
constexpr int64_t kDotCache = 16 << 10;  // bytes of x in a pass

// float32 codes in a group of 64 weights, one block's. Shifting eight packed dwords by one amount
// yields every eighth weight, so element 8 l + j of a group goes to place 8 j + l.
struct Float32Dots {
  static constexpr int64_t kColumns = 64;

  static void load_group(const void* in, DType dtype, int64_t i, int64_t, float* out) {
    float values[64];
    for (int j = 0; j < 64; j += 16) f32_store(values + j, load_any(in, dtype, i + j, 16));
    for (int l = 0; l < 8; ++l) {
      for (int j = 0; j < 8; ++j) out[8 * j + l] = values[8 * l + j];
    }
  }

#if defined(__AVX512F__)
  using Vector = __m512;
  static constexpr int weight_rows(int m) { return m <= 4 ? 4 : 2; }
  static Vector load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Vector v) { _mm512_storeu_ps(p, v); }
  static Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
  static Vector narrow(F32x16 x) { return x.v; }
  static float sum(Vector v) { return _mm512_reduce_add_ps(v); }

  struct Weights {
    __m512i words;  // the same eight dwords in both halves
    __m512 table;
    // Streams 2 v and 2 v + 1. vpermps reads the low four bits of a lane only.
    Vector at(int v) const {
      const __m256i odd = _mm256_set1_epi32(8 * v);
      const __m512i even = _mm512_set1_epi32(8 * v + 4);
      return _mm512_permutexvar_ps(_mm512_srlv_epi32(words, _mm512_inserti64x4(even, odd, 1)),
                                   table);
    }
  };
  static Weights weights(const uint8_t* packed, const float* absmax) {
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed));
    return {_mm512_broadcast_i64x4(words),
            _mm512_mul_ps(_mm512_loadu_ps(kNF4Code), _mm512_set1_ps(*absmax))};
  }
#elif defined(__AVX2__)
  using Vector = __m256;
  static constexpr int weight_rows(int m) { return m <= 3 ? 2 : 1; }
  static Vector load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Vector v) { _mm256_storeu_ps(p, v); }
  static Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
  static Vector narrow(F32x16 x) { return _mm256_add_ps(x.a, x.b); }
  static float sum(Vector v) { return f32_sum({v, _mm256_setzero_ps()}); }

  struct Weights {
    __m256i words;
    F32x16 table;
    Vector at(int j) const {
      const int shift = j / 2 * 8 + (j % 2 ? 0 : 4);
      const __m256i code = _mm256_srli_epi32(words, shift);
      const __m256 low = _mm256_permutevar8x32_ps(table.a, code);
      const __m256 high = _mm256_permutevar8x32_ps(table.b, code);
      return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(words, 28 - shift)));
    }
  };
  static Weights weights(const uint8_t* packed, const float* absmax) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed)),
            f32_mul(f32_load(kNF4Code), f32_set1(*absmax))};
  }
#else
  using Vector = F32x16;
  static constexpr int weight_rows(int) { return 1; }
  static Vector load(const float* p) { return f32_load(p); }
  static void store(float* p, const Vector& v) { f32_store(p, v); }
  static Vector fma(const Vector& a, const Vector& b, const Vector& c) { return f32_fma(a, b, c); }
  static Vector narrow(const F32x16& x) { return x; }
  static float sum(const Vector& v) { return f32_sum(v); }

  struct Weights {
    const uint8_t* packed;
    F32x16 table;
    Vector at(int v) const {
      return f32_make([&](int i) {
        const int shift = i < 8 ? 4 : 0;
        return table.v[packed[i % 8 * 4 + v] >> shift & 15];
      });
    }
  };
  static Weights weights(const uint8_t* packed, const float* absmax) {
    return {packed, f32_mul(f32_load(kNF4Code), f32_set1(*absmax))};
  }
#endif
};

template <class Dots>
struct NF4Dots {
  const NF4PieceArgs& args;
  const NF4Wave& wave;

  using Vector = typename Dots::Vector;
  static constexpr int64_t kLanes = sizeof(Vector) / 4;
  static constexpr int kVectors = kDotGroup / kLanes;  // in a group
  static constexpr int64_t kColumns = Dots::kColumns;  // of a group

  // What all tasks read: x as [tile of rows][group][row][kDotGroup], s scaled and padded.
  struct Prepared {
    float *x, *s;
    int64_t groups, stride;
  };

  // kN weight rows from some column on, each with an absmax for every 64 weights.
  template <int kN>
  struct Rows {
    const uint8_t* packed[kN];
    const float* absmax[kN];
  };

  // So many groups of kN weight rows times kM rows of x, added to sums[kN][kM][kLanes]. The weights
  // that are needed soon begin `ahead` bytes further.
  template <int kN, int kM>
  static void multiply(Rows<kN> rows, int64_t groups, int64_t ahead, const float* x, float* sums) {
    Vector acc[kN][kM];
    for (int i = 0; i < kN; ++i) {
      for (int m = 0; m < kM; ++m) acc[i][m] = Dots::load(sums + (i * kM + m) * kLanes);
    }
    for (int64_t g = 0; g < groups; ++g, x += kM * kDotGroup) {
      typename Dots::Weights weights[kN];
      for (int i = 0; i < kN; ++i) {
        weights[i] = Dots::weights(rows.packed[i], rows.absmax[i]);
        __builtin_prefetch(rows.packed[i] + ahead);
        rows.packed[i] += kColumns / 2;
        rows.absmax[i] += kColumns / 64;
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

  // The last 64 columns where a group has 128: the other half is zero.
  template <int kN, int kM>
  static void multiply_half(const Rows<kN>& rows, const float* x, float* sums) {
    uint8_t packed[kN][64] = {};
    float absmax[kN][2] = {};
    Rows<kN> padded;
    for (int i = 0; i < kN; ++i) {
      std::memcpy(packed[i], rows.packed[i], 32);
      absmax[i][0] = *rows.absmax[i];
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

  // absmax of so many rows, one for every 64 weights: those of larger blocks more than once.
  const float* expand_task(int64_t row, int64_t count, float* out) const {
    const int64_t first = row * args.K, n = count * args.K / 64;
    const bool expanded = args.w.blocksize > 64;
    const Absmax absmax = expand_rows(args.w, first, count * args.K, expanded ? out + n : out);
    if (!expanded) return absmax.values + (first / 64 - absmax.first);
    for (int64_t i = 0; i < n; ++i) out[i] = absmax.at(first + 64 * i);
    return out;
  }

  // sums[row][kM][kLanes]: the low-rank update, spread over the lanes.
  template <int kM>
  void start(const Task& t, const float* s, int64_t stride) const {
    for (int64_t i = 0; i < t.count; ++i) {
      F32x16 acc[kM];
      for (int m = 0; m < kM; ++m) acc[m] = f32_zero();
      for (int64_t j = 0; j < args.r; j += 16) {
        const float* b = args.factor + (t.begin + i) * args.r + j;
        const int n = static_cast<int>(min64(16, args.r - j));
        const F32x16 value = n == 16 ? f32_load(b) : f32_load_n(b, n);
        for (int m = 0; m < kM; ++m) acc[m] = f32_fma(value, f32_load(s + m * stride + j), acc[m]);
      }
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
    start<kM>(t, p.s + (t.piece.start + m0) * p.stride, p.stride);
    for (int64_t k0 = 0; k0 < args.K; k0 += kPass, x += kPass / kColumns * kM * kDotGroup) {
      const int64_t n = min64(kPass, args.K - k0), groups = n / kColumns;
      const int64_t below = round_up(ceil_div(2 * kStreamAhead, n), kN);
      for (int64_t i = 0; i < t.count; i += kN) {
        Rows<kN> rows;
        for (int64_t j = 0; j < kN; ++j) {
          const int64_t row = min64(i + j, t.count - 1);  // the last one again, for nobody
          rows.packed[j] = args.w.packed + (t.row(row) * args.K + k0) / 2;
          rows.absmax[j] = t.absmax + (row * args.K + k0) / 64;
        }
        const bool here = i + below < t.count;
        const int64_t ahead = (below - (here ? 0 : t.count)) * args.K + (here ? 0 : n);
        float* sums = t.sums + i * kM * kLanes;
        multiply<kN, kM>(rows, groups, ahead / 2, x, sums);
        if (n % kColumns == 0) continue;
        for (int64_t j = 0; j < kN; ++j) {
          rows.packed[j] += groups * kColumns / 2, rows.absmax[j] += groups * kColumns / 64;
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
                       min64(kColumns, args.K - g * kColumns), x);
    }
    for (int64_t j = 0; j < p.stride; ++j) {
      const int64_t at = (piece.first + m) * args.r + j;
      p.s[i * p.stride + j] = j < args.r ? args.scaling * args.s[at] : 0.0f;
    }
  }

  void forward() const {
    const int64_t groups = ceil_div(args.K, kColumns), stride = round_up(args.r, 16);
    Scratch x(wave.rows * groups * kDotGroup * 4), s(wave.rows * stride * 4);
    const Prepared p{x.floats(), s.floats(), groups, stride};
    parallel_for(args.threads, wave.rows, [&](int64_t i, int) { prepare(p, i); });

    constexpr int64_t kSums = kDotTaskRows * kDotRows * kLanes;
    const int64_t per_thread = round_up(kSums + 2 * kDotTaskRows * args.K / 64, 16);
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
