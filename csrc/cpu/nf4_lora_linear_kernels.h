// The loops of y = x W^T + s b^T + bias and dx = dy W + s a (s scaled) over NF4 weights, for any
// Math that supplies tiles (Float32Math, or one of the bfloat16 ones).
//
// Few rows of forward are dot products (nf4_dot.h). The others:
// Forward: W is the rows operand, x (packed once) the lanes operand, and tiles of y^T come out;
// each thread takes panels of weight rows, decodes kBlock columns at a time into cache, and
// multiplies them by all of x. Backward: dy (packed once) is the rows operand and W the lanes
// operand; each thread takes strips of 256 weight columns and reduces over n. Nobody writes what
// another thread writes and every sum has one fixed order, so results do not depend on the number
// of threads. Extra memory: x or dy packed (at most 512 or 1024 rows), one panel and its float32
// sums a thread, and in backward the absmax of the whole weight as float32 (1/16 byte per weight at
// block size 64).
#pragma once

#include "nf4_dot.h"

namespace peftkern {
namespace {

constexpr int64_t kForwardRows = 512;  // rows of x in one go: what is packed of it and the sums of
constexpr int64_t kBackwardRows = 1024;  // a panel have to stay in the second-level cache
constexpr int64_t kPanelRows = 256;      // weight rows in a forward panel
constexpr int64_t kStrip = 256;          // weight columns in a backward panel
constexpr int64_t kProduct = 4 * kTile;  // floats of a product of two pairs

template <class Math>
struct NF4Gemm {
  const NF4LinearArgs& args;

  static constexpr int64_t kStep = Math::kStep;
  static constexpr int64_t kBlock = Math::kBlock;
  static constexpr int64_t kPairBlock = kBlock / kStep * kPair;  // dwords of a decoded pair

  // Rows [first, first + rows) of x or dy as [row pair][step][2 tiles].
  struct Packed {
    uint32_t* dwords;
    int64_t first, rows, pairs, steps;
    uint32_t* at(int64_t pair, int64_t step) const {
      return dwords + (pair * steps + step) * kPair;
    }
  };

  // A thread's share of the weight: rows (forward) or columns [begin, begin + count), decoded one
  // block of the reduction at a time, and the sums of their products.
  struct Panel {
    uint32_t* weights;
    float* sums;
    int64_t begin, count;
    int64_t pairs() const { return ceil_div(count, kPairSide); }
  };

  // Rows of `width` elements: rows tiles as they are, or lanes tiles in the order in which
  // decode_row puts weights.
  template <bool kLanes>
  void pack(const Packed& out, int64_t width) const {
    constexpr int64_t kGroup = kLanes ? Math::kOrder / kStep : 1;  // steps that are loaded at once
    constexpr int64_t kChunk = 16;                                 // steps in a task
    const int64_t chunks = ceil_div(out.steps, kChunk);
    parallel_for(args.threads, 2 * out.pairs * chunks, [&](int64_t t, int) {
      const int64_t group = t / chunks, begin = t % chunks * kChunk;
      for (int64_t step = begin; step < min64(out.steps, begin + kChunk); step += kGroup) {
        uint32_t* tile = out.at(group / 2, step) + group % 2 * kTile;
        uint32_t lines[kTile * kGroup];
        for (int64_t i = 0; i < kSide; ++i) {
          const int64_t row = group * kSide + i, column = step * kStep;
          const int64_t valid = row < out.rows ? width - column : 0;
          const int64_t source = valid > 0 ? (out.first + row) * width + column : 0;
          if (kLanes) {
            Math::load_ordered(args.in, args.dtype, source, min64(valid, Math::kOrder),
                               lines + kSide * kGroup * i);
          } else {
            Math::load_dwords(args.in, args.dtype, source, min64(valid, kStep), tile + kSide * i);
          }
        }
        for (int64_t g = 0; kLanes && g < kGroup; ++g) {
          transpose_tile(lines + kSide * g, kSide * kGroup, tile + g * kPair);
        }
      }
    });
  }

  // tile[i] += scaling * sum_j left[i * r + j] * right[j], i < count.
  void add_low_rank(float* tile, const float* left, int64_t count, const float* right,
                    int64_t right_stride, int right_valid) const {
    const int64_t r = args.r;
#if defined(__AVX512F__)
    constexpr int kRows = 16;
#else
    constexpr int kRows = 4;
#endif
    for (int row = 0; row < 16; row += kRows) {
      const int64_t valid = min64(kRows, count - row);
      if (valid <= 0) return;
      F32x16 acc[kRows];
      for (int i = 0; i < kRows; ++i) acc[i] = f32_load(tile + (row + i) * 16);
      for (int64_t j = 0; j < r; ++j) {
        const float* p = right + j * right_stride;
        const F32x16 x = f32_mul(right_valid >= 16 ? f32_load(p) : f32_load_n(p, right_valid),
                                 f32_set1(args.scaling));
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) {
          const int64_t source = i < valid ? row + i : row;  // rows past the end are not stored
          acc[i] = f32_fma(f32_set1(left[source * r + j]), x, acc[i]);
        }
      }
      for (int i = 0; i < kRows; ++i) f32_store(tile + (row + i) * 16, acc[i]);
    }
  }

  static void store_row(void* out, DType dtype, int64_t i, const float* values, int64_t n) {
    store_any(out, dtype, i, f32_load(values), static_cast<int>(min64(n, 16)));
  }

  // The products of `count` rows, at most two tiles of them, and one tile of lanes or two.
  static void multiply(const uint32_t* rows, const uint32_t* lanes, float* c, int64_t steps,
                       bool first, int64_t count, bool two_lanes) {
    if (two_lanes) {
      Math::template multiply<2>(rows, lanes, c, steps, first, min64(count, kPairSide));
    } else {
      Math::template multiply<1>(rows, lanes, c, steps, first, min64(count, kPairSide));
    }
  }

  static void prefetch(const NF4View& w, int64_t element, int64_t count) {
    const int64_t end = min64(element + count, w.numel) / 2;
    for (int64_t i = element / 2; i < end; i += 64) __builtin_prefetch(w.packed + i, 0, 2);
  }

  // Part `part` of `parts` of the packed block of so many steps that is needed next.
  static void prefetch_share(const uint32_t* p, int64_t steps, int64_t part, int64_t parts) {
    const int64_t dwords = steps * kPair, end = dwords * (part + 1) / parts;
    for (int64_t i = dwords * part / parts / 16 * 16; i < end; i += 16)
      __builtin_prefetch(p + i, 0, 2);
  }

  // fn(tile, row, lane) for the four tiles of a product of two pairs, with where in it they begin.
  template <class Fn>
  static void for_quadrants(float* c, const Fn& fn) {
    for (int64_t q = 0; q < 4; ++q) fn(c + q * kTile, q / 2 * kSide, q % 2 * kSide);
  }

  // y[m0 : m0 + 16, n0 : n0 + 16] from the tile of y^T in c.
  void finish_forward(float* c, int64_t m0, int64_t n0, const float* s_transposed,
                      int64_t s_stride) const {
    const int64_t rows = min64(16, args.N - n0), columns = min64(16, args.M - m0);
    if (args.bias) {
      for (int64_t i = 0; i < rows; ++i) {
        f32_store(c + 16 * i, f32_add(f32_load(c + 16 * i), f32_set1(args.bias[n0 + i])));
      }
    }
    if (args.r > 0) {
      add_low_rank(c, args.factor + n0 * args.r, rows, s_transposed, s_stride, kSide);
    }
    float t[kTile];
    transpose_tile(reinterpret_cast<const uint32_t*>(c), 16, reinterpret_cast<uint32_t*>(t));
    for (int64_t i = 0; i < columns; ++i) {
      store_row(args.out, args.dtype, (m0 + i) * args.N + n0, t + 16 * i, rows);
    }
  }

  // s[m, j] of the packed rows as out[j * stride + m], zero beyond them.
  void transpose_s(const Packed& x, float* out, int64_t stride) const {
    for (int64_t j = 0; j < args.r; ++j) {
      for (int64_t m = 0; m < stride; ++m) {
        out[j * stride + m] = m < x.rows ? args.s[(x.first + m) * args.r + j] : 0.0f;
      }
    }
  }

  // Columns [k0, k0 + kBlock) of the panel's rows; the next panel begins `stride` rows below.
  void decode_panel(const Panel& p, const Absmax& absmax, int64_t k0, int64_t stride) const {
    const int64_t K = args.K, width = min64(kBlock, K - k0);
    for (int64_t i = 0; i < p.pairs() * kPairSide; ++i) {
      uint32_t* row = p.weights + i / kPairSide * kPairBlock + i % kPairSide * kSide;
      if (i < p.count) {
        const int64_t element = (p.begin + i) * K + k0;
        // The same row's next block, or the next panel's first.
        prefetch(args.w, k0 + kBlock < K ? element + kBlock : element - k0 + stride * K, kBlock);
        Math::decode_row(args.w, absmax, element, width, args.dtype, row, kPair);
      } else {
        const int64_t count = round_up(width, Math::kOrder) / kStep;
        for (int64_t j = 0; j < count; ++j) std::memset(row + j * kPair, 0, kSide * 4);
      }
    }
  }

  void multiply_panel(const Panel& p, const Packed& x, int64_t k0) const {
    const int64_t count = round_up(min64(kBlock, args.K - k0), Math::kOrder) / kStep;
    for (int64_t mp = 0; mp < x.pairs; ++mp) {
      const uint32_t* lanes = x.at(mp, k0 / kStep);
      for (int64_t np = 0; np < p.pairs(); ++np) {
        if (mp + 1 < x.pairs) prefetch_share(x.at(mp + 1, k0 / kStep), count, np, p.pairs());
        multiply(p.weights + np * kPairBlock, lanes, p.sums + (np * x.pairs + mp) * kProduct, count,
                 k0 == 0, p.count - np * kPairSide, x.rows - mp * kPairSide > kSide);
      }
    }
  }

  void finish_panel(const Panel& p, const Packed& x, const float* s, int64_t s_stride) const {
    for (int64_t np = 0; np < p.pairs(); ++np) {
      for (int64_t mp = 0; mp < x.pairs; ++mp) {
        for_quadrants(p.sums + (np * x.pairs + mp) * kProduct, [&](float* c, int64_t i, int64_t j) {
          const int64_t n = np * kPairSide + i, m = mp * kPairSide + j;
          if (n >= p.count || m >= x.rows) return;
          finish_forward(c, x.first + m, p.begin + n, args.r > 0 ? s + m : nullptr, s_stride);
        });
      }
    }
  }

  void forward_rows(int64_t m0, int64_t M) const {
    const int64_t N = args.N, K = args.K, pairs = ceil_div(M, kPairSide);
    const int64_t steps = round_up(K, Math::kOrder) / kStep, s_stride = pairs * kPairSide;
    Scratch packed(pairs * steps * kPair * 4), s(args.r * s_stride * 4);
    const Packed x{static_cast<uint32_t*>(packed.data), m0, M, pairs, steps};
    pack<true>(x, K);
    transpose_s(x, s.floats(), s_stride);

    const int64_t share = round_up(ceil_div(N, args.threads), kPairSide);
    const int64_t rows = min64(M <= kPairSide ? kPairSide : kPanelRows, share);
    const int64_t weights = rows / kPairSide * kPairBlock;
    const int64_t sums = rows / kPairSide * pairs * kProduct;
    const int64_t blocks = rows * K / args.w.blocksize + 2;
    const int64_t per_thread = round_up(weights + sums + blocks, 16);
    Scratch scratch(args.threads * per_thread * 4);
    parallel_for(args.threads, ceil_div(N, rows), [&](int64_t t, int thread) {
      typename Math::Session session;
      (void)session;
      float* own = scratch.floats() + thread * per_thread;
      const Panel p{reinterpret_cast<uint32_t*>(own), own + weights, t * rows,
                    min64(rows, N - t * rows)};
      const Absmax absmax = expand_rows(args.w, p.begin * K, p.count * K, own + weights + sums);
      for (int64_t k0 = 0; k0 < K; k0 += kBlock) {
        decode_panel(p, absmax, k0, rows);
        multiply_panel(p, x, k0);
      }
      finish_panel(p, x, s.floats(), s_stride);
    });
  }

  void forward() const {
    for (int64_t m = 0; m < args.M; m += kForwardRows) {
      forward_rows(m, min64(kForwardRows, args.M - m));
    }
  }

  // Rows [n0, n0 + kBlock) of the strip's columns.
  void decode_strip(const Panel& p, const Absmax& absmax, int64_t n0) const {
    const int64_t rows = min64(kBlock, args.N - n0);
    for (int64_t c = 0; c < p.count; c += 128) {
      Math::decode_lanes(args.w, absmax, args.N, args.K, n0, rows, p.begin + c, args.dtype,
                         p.weights + c / kPairSide * kPairBlock, kPairBlock);
    }
  }

  static float* strip_sums(const Panel& p, int64_t mp, int64_t kp) {
    return p.sums + (mp * (kStrip / kPairSide) + kp) * kProduct;
  }

  void multiply_strip(const Panel& p, const Packed& dy, int64_t n0) const {
    const int64_t count = ceil_div(min64(kBlock, args.N - n0), kStep);
    for (int64_t mp = 0; mp < dy.pairs; ++mp) {
      const uint32_t* rows = dy.at(mp, n0 / kStep);
      for (int64_t kp = 0; kp < p.pairs(); ++kp) {
        if (mp + 1 < dy.pairs) prefetch_share(dy.at(mp + 1, n0 / kStep), count, kp, p.pairs());
        multiply(rows, p.weights + kp * kPairBlock, strip_sums(p, mp, kp), count, n0 == 0,
                 dy.rows - mp * kPairSide, true);
      }
    }
  }

  void finish_strip(const Panel& p, const Packed& dy) const {
    for (int64_t mp = 0; mp < dy.pairs; ++mp) {
      for (int64_t kp = 0; kp < p.pairs(); ++kp) {
        for_quadrants(strip_sums(p, mp, kp), [&](float* c, int64_t i, int64_t j) {
          const int64_t m = mp * kPairSide + i, k = p.begin + kp * kPairSide + j;
          if (m >= dy.rows || k >= args.K) return;
          finish_backward(c, dy.first + m, min64(kSide, dy.rows - m), k);
        });
      }
    }
  }

  void backward_rows(int64_t m0, int64_t M, const Absmax& absmax) const {
    const int64_t N = args.N, K = args.K, pairs = ceil_div(M, kPairSide);
    const int64_t steps = ceil_div(N, kStep);
    Scratch packed(pairs * steps * kPair * 4);
    const Packed dy{static_cast<uint32_t*>(packed.data), m0, M, pairs, steps};
    pack<false>(dy, N);

    const int64_t weights = kStrip / kPairSide * kPairBlock;
    const int64_t per_thread = weights + pairs * (kStrip / kPairSide) * kProduct;
    Scratch scratch(args.threads * per_thread * 4);
    parallel_for(args.threads, ceil_div(K, kStrip), [&](int64_t t, int thread) {
      typename Math::Session session;
      (void)session;
      float* own = scratch.floats() + thread * per_thread;
      const Panel p{reinterpret_cast<uint32_t*>(own), own + weights, t * kStrip,
                    min64(kStrip, K - t * kStrip)};
      for (int64_t n0 = 0; n0 < N; n0 += kBlock) {
        decode_strip(p, absmax, n0);
        multiply_strip(p, dy, n0);
      }
      finish_strip(p, dy);
    });
  }

  void finish_backward(float* c, int64_t m0, int64_t rows, int64_t k0) const {
    const int64_t columns = min64(16, args.K - k0);
    if (args.r > 0) {
      add_low_rank(c, args.s + m0 * args.r, rows, args.factor + k0, args.K,
                   static_cast<int>(columns));
    }
    for (int64_t i = 0; i < rows; ++i) {
      store_row(args.out, args.dtype, (m0 + i) * args.K + k0, c + 16 * i, columns);
    }
  }

  void backward() const {
    const int64_t blocks = args.w.nblocks();
    constexpr int64_t kChunk = 1 << 14;
    Scratch expanded(blocks * 4);
    parallel_for(args.threads, ceil_div(blocks, kChunk), [&](int64_t t, int) {
      const int64_t first = t * kChunk;
      expand_absmax(args.w, first, min64(kChunk, blocks - first), expanded.floats() + first);
    });
    const Absmax absmax{expanded.floats(), 0, args.w.blocksize_log2()};
    for (int64_t m = 0; m < args.M; m += kBackwardRows) {
      backward_rows(m, min64(kBackwardRows, args.M - m), absmax);
    }
  }
};

// Rows that fill tiles go through panels, few rows and a small rest by dot products.
template <class Math, class Dots>
void forward_with(const NF4LinearArgs& args) {
  int64_t few = 0;
  if (NF4Dots<Dots>::takes(args.w, args.K)) {
    const int64_t rest = args.M % kPairSide;
    few = args.M <= args.few_rows ? args.M : rest <= args.few_rows / 2 ? rest : 0;
  }
  NF4LinearArgs panels = args, dots = args;
  panels.M = args.M - few, dots.M = few;
  const int64_t size = itemsize(args.dtype);
  dots.in = static_cast<const char*>(args.in) + panels.M * args.K * size;
  dots.out = static_cast<char*>(args.out) + panels.M * args.N * size;
  if (args.r > 0) dots.s = args.s + panels.M * args.r;
  if (panels.M > 0) NF4Gemm<Math>{panels}.forward();
  if (dots.M > 0) NF4Dots<Dots>{dots}.forward();
}
template <class Math>
void backward_with(const NF4LinearArgs& args) {
  NF4Gemm<Math>{args}.backward();
}

}  // namespace
}  // namespace peftkern
