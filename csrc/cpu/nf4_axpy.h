// dx = dy W + s a for few rows of dy: weight rows are decoded as they stream by and added, times
// dy, to sums of dx. Compiled once per instruction set.
//
// All rows of dy share a decoded weight. A task takes a strip of columns, wide, for memory is fast
// where it is read in order, and few weight rows at a time, each a stream of its own: more would
// evict one another from the first-level cache where they are a power of two apart. Their products
// of 64 columns are summed in registers and added to the strip's sums. Bytes per weight: 0.56.
// Every sum has one order, whatever the strips are.
#pragma once

#include "nf4_dot.h"

namespace peftkern {
namespace {

constexpr int64_t kAxpyStrip = 2048;     // columns of a task at most
constexpr int64_t kAxpySums = 16 << 10;  // floats of a task's sums at most: 64 KiB

// float32 codes: vectors of 64 columns are those of the dot products, in their order. kShort: of
// blocks of any size, with zeros or without; else only where kDecodesAll are there zeros.
template <bool kShort>
struct Float32Axpy : Float32Dots<kShort> {
  using Dots = Float32Dots<kShort>;
  using typename Dots::Codes;
  using typename Dots::Vector;
  static bool serves(const NF4View& w) {
    return kShort == (w.blocksize < 64 || (w.zero && !kDecodesAll));
  }
  static constexpr int kPart = 1;  // weight rows that a vector holds
  // kMaxRows: rows of dy that share a decoded weight; kSums: vectors of sums in registers;
  // kDecodesAll: lookups yield several vectors.
#if defined(__AVX512F__)
  static constexpr int kMaxRows = 16, kSums = 16;
  static constexpr bool kDecodesAll = false;
  static Vector broadcast(const float* p) { return _mm512_set1_ps(*p); }
  static Vector subtract(Vector a, Vector b) { return _mm512_sub_ps(a, b); }
  static Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
#elif defined(__AVX2__)
  static constexpr int kMaxRows = 8, kSums = 8;
  static constexpr bool kDecodesAll = true;
  static Vector broadcast(const float* p) { return _mm256_set1_ps(*p); }
  static Vector subtract(Vector a, Vector b) { return _mm256_sub_ps(a, b); }
  static Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
#else
  static constexpr int kMaxRows = 8, kSums = 8;
  static constexpr bool kDecodesAll = false;
  static Vector broadcast(const float* p) { return f32_set1(*p); }
  static Vector subtract(const Vector& a, const Vector& b) {
    return f32_fma(b, f32_set1(-1.0f), a);
  }
  static Vector add(const Vector& a, const Vector& b) { return f32_add(a, b); }
#endif
  // 64 weights of kPart rows of K, from `element` on, a multiple of 64; so many rows exist.
  struct Weights {
    typename Dots::Weights scaled;
    Vector zero;  // kShort
    template <bool kZero>
    Vector code(int v) const {
      return kZero ? subtract(scaled.code(v), zero) : scaled.code(v);
    }
    Vector at(int v) const {
      if (!kShort) return scaled.at(v);
      return Dots::product(code<true>(v), scaled.scale);
    }
  };
  static Weights weights(const Codes& codes, const NF4View& w, const Absmax& absmax,
                         int64_t element, int64_t, int64_t) {
    Weights out;  // gcc 12 copies an aggregate of it in halves, which no store forwards
    out.scaled = Dots::weights(codes, w.packed + element / 2, absmax.of(element), false);
    const float* zero = w.zero ? w.zero + (element >> absmax.log2) : nullptr;
    out.zero = Vector{};
    if (kShort && zero) out.zero = codes.spread(zero);
    if (!kShort && kDecodesAll && zero) out.zero = broadcast(zero);
    return out;
  }
  // n elements of dy from i on, for weight rows one after the other.
  static void load_row(const void* dy, DType dtype, int64_t i, int64_t n, float* out,
                       int64_t stride) {
    for (int64_t j = 0; j < n; j += 16) {
      const int count = static_cast<int>(min64(16, n - j));
      float values[16];
      f32_store(values, load_any(dy, dtype, i + j, count));
      for (int k = 0; k < count; ++k) out[(j + k) * stride] = values[k];
    }
  }
  // Column c of 64 is at this place of their vectors.
  static int64_t place(int64_t c, bool low_first) {
    return Dots::place(static_cast<int>(c), low_first);
  }
};

template <class Axpy>
struct NF4Axpy {
  const NF4PieceArgs& args;
  const NF4Wave& wave;
  const typename Axpy::Codes codes{codes_of(args.w), Axpy::unit_log2(args.w)};

  using Vector = typename Axpy::Vector;
  static constexpr int64_t kLanes = sizeof(Vector) / 4;
  static constexpr int kVectors = 64 / kLanes;

  // dy of the wave as [tile of rows][weight rows of a vector][rows of the tile], each padded to a
  // number of rows that there is a kernel for.
  struct Prepared {
    float* dy;
    int64_t parts;  // of N
  };

  // Columns [begin, begin + count) of a piece.
  struct Task {
    const NF4Piece& piece;
    const Absmax absmax;
    int64_t begin, count;
    float *sums, *scales;  // scales of some rows, or null: they are in absmax
  };

  // Weight rows at a time: the more rows of dy, the more sums to load and store for them.
  template <int kM>
  static constexpr int64_t kRows = kM <= 4 ? 8 : 16;

  // kV vectors, from v0 on, of 64 columns from c of the task on, times weight rows [n0, n0 + rows),
  // added to sums[kV][kM][kLanes].
  template <int kM, int kV>
  void multiply(const Task& t, int64_t n0, int64_t rows, int64_t c, const float* dy, int v0,
                float* sums) const {
    Vector acc[kV][kM];
    for (auto& vector : acc) {
      for (Vector& sum : vector) sum = Vector{};
    }
    const typename Axpy::Codes own = codes;
    int64_t element = (t.piece.weight + n0) * args.K + t.begin + c;
    for (int64_t n = 0; n < rows; n += Axpy::kPart, dy += kM) {
      const auto weights = Axpy::weights(own, args.w, t.absmax, element, args.K, rows - n);
      for (int i = 0; i < Axpy::kPart; ++i, element += args.K) {  // of the next rows
        if (v0 == 0) __builtin_prefetch(args.w.packed + (element + kRows<kM> * args.K) / 2, 0, 2);
      }
#pragma GCC unroll 8
      for (int v = 0; v < kV; ++v) {
        const Vector weight = weights.at(v0 + v);
#pragma GCC unroll 16
        for (int m = 0; m < kM; ++m) {
          acc[v][m] = Axpy::fma(weight, Axpy::broadcast(dy + m), acc[v][m]);
        }
      }
    }
    add_sums<kM, kM, kV>(acc, sums);
  }

  // Asks for 64 weights of a row, and their scales.
  template <bool kZero>
  [[gnu::always_inline]] void prefetch(const Task& t, int64_t element) const {
    __builtin_prefetch(args.w.packed + element / 2, 0, 2);
    if (!t.scales) __builtin_prefetch(t.absmax.of(element), 0, 2);
    if (kZero) __builtin_prefetch(args.w.zero + (element >> t.absmax.log2), 0, 2);
  }

  // Whether a task makes floats of the bytes of the rows at hand: those of all rows would take a
  // quarter or a half of the weight's bytes.
  bool scales_by_task() const { return Axpy::kDecodesAll && args.w.byte_scales(); }

  Absmax row_scales(const Task& t, int64_t n0, int64_t n) const {
    if (!t.scales) return t.absmax;
    const int log2 = args.w.blocksize_log2();
    const int64_t first = ((t.piece.weight + n0 + n) * args.K + t.begin) >> log2;
    return {t.scales + n * (t.count >> log2), first, log2};
  }
  void expand_scales(const Task& t, int64_t n0, int64_t rows, int64_t ahead) const {
    const int log2 = args.w.blocksize_log2();
    for (int64_t n = 0; n < rows; ++n) {
      const int64_t element = (t.piece.weight + n0 + n) * args.K + t.begin;
      prefetch_scales(args.w, element + ahead * args.K, t.count);
      const int64_t count = t.count >> log2;
      expand_absmax(args.w, element >> log2, count, t.scales + n * count);
    }
  }

  // The same of all vectors for one row of dy or two, which scales multiply instead of the weights.
  // Zeros, the same in all vectors, have a sum of their own.
  template <int kM, bool kZero>
  void multiply_codes(const Task& t, int64_t n0, int64_t rows, int64_t c, const float* dy,
                      float* sums) const {
    constexpr int kV = kVectors / kM;
    const typename Axpy::Codes own = codes;
    for (int v0 = 0; v0 < kVectors; v0 += kV) {
      Vector acc[kV][kM], zeros[kM];
      for (Vector& sum : zeros) sum = Vector{};
      for (auto& vector : acc) {
        for (Vector& sum : vector) sum = Vector{};
      }
      int64_t element = (t.piece.weight + n0) * args.K + t.begin + c;
      for (int64_t n = 0; n < rows; ++n, element += args.K) {
        const Absmax absmax = row_scales(t, n0, n);
        const auto weights = Axpy::weights(own, args.w, absmax, element, args.K, rows - n);
        if (v0 == 0) prefetch<kZero>(t, element + kRows<kM> * args.K);
        Vector slope[kM];
        for (int m = 0; m < kM; ++m) {
          slope[m] = Axpy::product(weights.scaled.scale, Axpy::broadcast(dy + n * kM + m));
          if (kZero) zeros[m] = Axpy::fma(weights.zero, slope[m], zeros[m]);
        }
#pragma GCC unroll 8
        for (int v = 0; v < kV; ++v) {
          const Vector code = weights.template code<false>(v0 + v);
          for (int m = 0; m < kM; ++m) acc[v][m] = Axpy::fma(code, slope[m], acc[v][m]);
        }
      }
      for (auto& vector : acc) {
        for (int m = 0; kZero && m < kM; ++m) vector[m] = Axpy::subtract(vector[m], zeros[m]);
      }
      add_sums<kM, kM, kV>(acc, sums + v0 * kM * kLanes);
    }
  }

  // kP of kM rows' sums of kV vectors.
  template <int kM, int kP, int kV>
  static void add_sums(const Vector (&acc)[kV][kP], float* sums) {
    for (int v = 0; v < kV; ++v) {
      for (int m = 0; m < kP; ++m) {
        float* sum = sums + (v * kM + m) * kLanes;
        Axpy::store(sum, Axpy::add(Axpy::load(sum), acc[v][m]));
      }
    }
  }

  // 64 columns of so many weight rows, in their vectors' order.
  template <bool kZero>
  void decode(const Task& t, int64_t n0, int64_t rows, int64_t c, int64_t ahead, float* out) const {
    const typename Axpy::Codes own = codes;
    int64_t element = (t.piece.weight + n0) * args.K + t.begin + c;
    for (int64_t n = 0; n < rows; ++n, element += args.K, out += 64) {
      const Absmax absmax = row_scales(t, n0, n);
      const auto weights = Axpy::weights(own, args.w, absmax, element, args.K, rows - n);
      prefetch<kZero>(t, element + ahead * args.K);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        const Vector code = weights.template code<kZero>(v);
        Axpy::store(out + v * kLanes, Axpy::product(code, weights.scaled.scale));
      }
    }
  }

  // Decoded rows times kM rows of dy.
  template <int kM>
  void multiply_decoded(const float* decoded, int64_t rows, const float* dy, float* sums) const {
    constexpr int kP = kM % 2 ? 3 : 2, kV = 4;
    for (int v0 = 0; v0 < kVectors; v0 += kV) {
      for (int m0 = 0; m0 < kM; m0 += kP) {
        Vector acc[kV][kP];
        for (auto& vector : acc) {
          for (Vector& sum : vector) sum = Vector{};
        }
        for (int64_t n = 0; n < rows; ++n) {
#pragma GCC unroll 4
          for (int v = 0; v < kV; ++v) {
            const Vector weight = Axpy::load(decoded + n * 64 + (v0 + v) * kLanes);
            for (int m = 0; m < kP; ++m) {
              acc[v][m] = Axpy::fma(weight, Axpy::broadcast(dy + n * kM + m0 + m), acc[v][m]);
            }
          }
        }
        add_sums<kM, kP, kV>(acc, sums + (v0 * kM + m0) * kLanes);
      }
    }
  }

  // 64 columns of kRows weight rows or fewer.
  template <int kM, bool kZero>
  void multiply_all(const Task& t, int64_t n0, int64_t rows, int64_t c, const float* dy,
                    float* sums) const {
    if constexpr (kM <= 2) {
      multiply_codes<kM, kZero>(t, n0, rows, c, dy, sums);
    } else {
      float decoded[kRows<kM> * 64];
      decode<kZero>(t, n0, rows, c, kRows<kM>, decoded);
      multiply_decoded<kM>(decoded, rows, dy, sums);
    }
  }

  // dx[m0 : m0 + rows, the columns of the task], rows <= kM.
  template <int kM>
  void tile(const Prepared& p, const Task& t, int64_t m0, int64_t rows) const {
    constexpr int kFit = Axpy::kSums / kM;
    constexpr int kV = kFit >= kVectors ? kVectors : kFit >= 4 ? 4 : kFit >= 2 ? 2 : 1;
    const float* dy = p.dy + (t.piece.start + m0) * p.parts;
    std::memset(t.sums, 0, static_cast<size_t>(t.count * kM) * 4);
    for (int64_t n0 = 0; n0 < args.N; n0 += kRows<kM>) {
      const int64_t valid = min64(kRows<kM>, args.N - n0);
      if constexpr (Axpy::kDecodesAll) {
        if (t.scales) expand_scales(t, n0, valid, kRows<kM>);
      }
      const float* slopes = dy + n0 / Axpy::kPart * kM;
      for (int64_t c = 0; c < t.count; c += 64) {
        float* sums = t.sums + c * kM;
        if constexpr (Axpy::kDecodesAll) {
          args.w.zero ? multiply_all<kM, true>(t, n0, valid, c, slopes, sums)
                      : multiply_all<kM, false>(t, n0, valid, c, slopes, sums);
        } else {
          for (int v = 0; v < kVectors; v += kV) {
            multiply<kM, kV>(t, n0, valid, c, slopes, v, sums + v * kLanes * kM);
          }
        }
      }
    }
    for (int64_t m = 0; m < rows; ++m) finish(t, t.piece.first + m0 + m, t.sums, m, kM);
  }

  // Row `row` of dx, the m-th of kM in sums.
  void finish(const Task& t, int64_t row, const float* sums, int64_t m, int64_t kM) const {
    for (int64_t c = 0; c < t.count; c += 64, sums += 64 * kM) {
      float dx[64];
      for (int64_t j = 0; j < 64; ++j) {
        const int64_t place = Axpy::place(j, args.w.low_first());
        dx[j] = sums[(place / kLanes * kM + m) * kLanes + place % kLanes];
      }
      for (int64_t j = 0; j < 64; j += 16) {
        F32x16 sum = f32_load(dx + j);
        for (int64_t i = 0; i < args.r; ++i) {
          const F32x16 s = f32_set1(args.scaling * args.s[row * args.r + i]);
          sum = f32_fma(s, f32_load(args.factor + i * args.K + t.begin + c + j), sum);
        }
        store_any(args.out, args.out_dtype, row * args.K + t.begin + c + j, sum, 16);
      }
    }
  }

  // A kernel's number of rows for so many.
  static int64_t padded(int64_t rows) {
    return rows <= 4 ? rows : rows <= 8 ? round_up(rows, 2) : round_up(rows, 4);
  }

  void tile_of(const Prepared& p, const Task& t, int64_t m0, int64_t rows) const {
    switch (padded(rows)) {
      case 1:
        return tile<1>(p, t, m0, rows);
      case 2:
        return tile<2>(p, t, m0, rows);
      case 3:
        return tile<3>(p, t, m0, rows);
      case 4:
        return tile<4>(p, t, m0, rows);
      case 6:
        return tile<6>(p, t, m0, rows);
      case 8:
        return tile<8>(p, t, m0, rows);
      case 12:
        return tile<Axpy::kMaxRows == 16 ? 12 : 8>(p, t, m0, rows);
      default:
        return tile<Axpy::kMaxRows == 16 ? 16 : 8>(p, t, m0, rows);
    }
  }

  // Row i of the wave; rows that pad a tile are zero.
  void prepare(const Prepared& p, int64_t i) const {
    const NF4Piece& piece = piece_of(wave, i);
    const int64_t m = i - piece.start, m0 = m / Axpy::kMaxRows * Axpy::kMaxRows;
    const int64_t kM = padded(min64(Axpy::kMaxRows, piece.M - m0));
    if (m0 >= piece.M || m - m0 >= kM) return;
    float* out = p.dy + (piece.start + m0) * p.parts + m - m0;
    for (int64_t n = 0; n < p.parts; ++n) out[n * kM] = 0.0f;
    if (m >= piece.M) return;
    const int64_t source = source_row(args, piece.first + m) * args.N;
    Axpy::load_row(args.in, args.dtype, source, args.N, out, kM);
  }

  void backward() const {
    const int64_t parts = ceil_div(args.N, Axpy::kPart);
    Scratch dy(wave.rows * parts * 4);
    const Prepared p{dy.floats(), parts};
    parallel_for(args.threads, wave.rows, [&](int64_t i, int) { prepare(p, i); });
    const bool by_task = scales_by_task();
    const NF4Wave expanded{wave.pieces, by_task ? 0 : wave.count, wave.rows};
    const WaveAbsmax absmax(args, expanded);

    const int64_t most = padded(min64(Axpy::kMaxRows, wave.pieces[0].M));
    const int64_t share = round_up(ceil_div(wave.count * args.K, 2 * args.threads), 128);
    const int64_t fit = round_up(min64(kAxpyStrip, kAxpySums / most), 128);
    const int64_t strip = min64(share, fit), strips = ceil_div(args.K, strip);
    const int64_t per_thread = strip * most + (by_task ? kRows<8> * strip / args.w.blocksize : 0);
    Scratch scratch(args.threads * per_thread * 4);
    parallel_for(args.threads, wave.count * strips, [&](int64_t i, int thread) {
      const NF4Piece& piece = wave.pieces[i / strips];
      const int64_t begin = i % strips * strip;
      const int64_t count = min64(strip, args.K - begin);
      float* sums = scratch.floats() + thread * per_thread;
      float* scales = by_task ? sums + strip * most : nullptr;
      const int log2 = args.w.blocksize_log2();
      const Absmax own = by_task ? Absmax{nullptr, 0, log2} : absmax.of(i / strips);
      const Task t{piece, own, begin, count, sums, scales};
      for (int64_t m0 = 0; m0 < piece.M; m0 += Axpy::kMaxRows) {
        tile_of(p, t, m0, min64(Axpy::kMaxRows, piece.M - m0));
      }
    });
  }
};

}  // namespace
}  // namespace peftkern
