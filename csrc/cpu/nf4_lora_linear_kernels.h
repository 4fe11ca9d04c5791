// The loops of y = x W^T + s b^T + bias and dx = dy W + s a (s scaled) over NF4 weights, for any
// Math that supplies tiles (Float32Math, or one of the bfloat16 ones).
//
// One call is a wave of pieces (nf4_pieces.h): rows of x or dy, each with its own part of W.
// Forward: W is the rows operand, x (packed once) the lanes operand, and tiles of y^T come out;
// a task decodes a panel of weight rows, kBlock columns at a time, into cache and multiplies it by
// all of its piece's x. Backward: dy (packed once) is the rows operand and W the lanes operand; a
// task takes a strip of weight columns and reduces over n. Nobody writes what another thread
// writes and every sum has one fixed order, so results do not depend on the number of threads.
// Extra memory: the wave's x or dy packed; a thread's panel, or the two blocks of one that overlap,
// and its float32 sums; in backward scales that are stored as bytes as float32 (4 bytes a block of
// the wave), but for those that have tables.
#pragma once

#include "nf4_axpy.h"

namespace peftkern {
namespace {

constexpr int64_t kPanelRows = 256;      // weight rows in a forward panel
constexpr int64_t kStrip = 256;          // weight columns in a backward panel
constexpr int64_t kWideStrip = 1024;     // the same for few rows
constexpr int64_t kProduct = 4 * kTile;  // floats of a product of two pairs

template <class Math>
struct NF4Gemm {
  const NF4PieceArgs& args;
  const NF4Wave& wave;

  static constexpr int64_t kStep = Math::kStep;
  static constexpr int64_t kBlock = Math::kBlock;
  static constexpr int64_t kPairBlock = kBlock / kStep * kPair;  // dwords of a decoded pair

  // x or dy of the wave as [row pair][step][2 tiles], and s of forward as [row pair][r][2 x 16].
  struct Packed {
    uint32_t* dwords;
    float* s;
    int64_t steps;
  };

  // What a task multiplies: a piece's rows, packed.
  struct Rows {
    const NF4Piece& piece;
    const Packed& packed;
    int64_t pairs() const { return ceil_div(piece.M, kPairSide); }
    uint32_t* at(int64_t pair, int64_t step) const {
      return packed.dwords + ((piece.start / kPairSide + pair) * packed.steps + step) * kPair;
    }
    float* s(int64_t pair, int64_t r) const {
      return packed.s + (piece.start / kPairSide + pair) * r * kPairSide;
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
  // decode_rows puts weights. A second tile of a pair that has no rows stays as it is: unread.
  template <bool kLanes>
  void pack(const Packed& out, int64_t width) const {
    constexpr int64_t kChunk = 16;  // steps in a task
    const int64_t chunks = ceil_div(out.steps, kChunk);
    parallel_for(args.threads, wave.rows / kSide * chunks, [&](int64_t t, int) {
      const int64_t row = t / chunks * kSide, begin = t % chunks * kChunk;
      const NF4Piece& piece = piece_of(wave, row);
      const int64_t m0 = row - piece.start, rows = min64(kSide, piece.M - m0);
      if (rows <= 0) return;
      int64_t sources[kSide];
      for (int64_t i = 0; i < rows; ++i) sources[i] = source_row(args, piece.first + m0 + i);
      uint32_t* tiles = Rows{piece, out}.at(m0 / kPairSide, 0) + m0 % kPairSide / kSide * kTile;
      pack_steps<kLanes>(sources, rows, width, begin, min64(out.steps, begin + kChunk), tiles);
      if (begin == 0 && kLanes) transpose_s(piece, out, m0);
    });
  }

  template <bool kLanes>
  void pack_steps(const int64_t* sources, int64_t rows, int64_t width, int64_t begin, int64_t end,
                  uint32_t* tiles) const {
    constexpr int64_t kGroup = kLanes ? Math::kOrder / kStep : 1;  // steps that are loaded at once
    for (int64_t step = begin; step < end; step += kGroup) {
      uint32_t* tile = tiles + step * kPair;
      uint32_t lines[kTile * kGroup];
      for (int64_t i = 0; i < kSide; ++i) {
        const int64_t column = step * kStep;
        const int64_t valid = i < rows ? width - column : 0;
        const int64_t source = valid > 0 ? sources[i] * width + column : 0;
        if (kLanes) {
          Math::load_ordered(args.in, args.dtype, source, min64(valid, Math::kOrder),
                             args.w.low_first(), lines + kSide * kGroup * i);
        } else {
          Math::load_dwords(args.in, args.dtype, source, min64(valid, kStep), tile + kSide * i);
        }
      }
      for (int64_t g = 0; kLanes && g < kGroup; ++g) {
        transpose_tile(lines + kSide * g, kSide * kGroup, tile + g * kPair);
      }
    }
  }

  // s[m, j] of sixteen rows of a piece, zero beyond its last.
  void transpose_s(const NF4Piece& piece, const Packed& out, int64_t m0) const {
    float* s = Rows{piece, out}.s(m0 / kPairSide, args.r) + m0 % kPairSide;
    for (int64_t j = 0; j < args.r; ++j) {
      for (int64_t i = 0; i < kSide; ++i) {
        const int64_t m = m0 + i;
        s[j * kPairSide + i] = m < piece.M ? args.s[(piece.first + m) * args.r + j] : 0.0f;
      }
    }
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

  [[gnu::always_inline]] static void prefetch(const NF4View& w, int64_t element, int64_t count) {
    const int64_t end = min64(element + count, w.numel) / 2;
    for (int64_t i = element / 2; i < end; i += 64) __builtin_prefetch(w.packed + i, 0, 2);
  }

  // Part `part` of `parts` of the packed block of so many steps that is needed next.
  [[gnu::always_inline]] static void prefetch_share(const uint32_t* p, int64_t steps, int64_t part,
                                                    int64_t parts) {
    const int64_t dwords = steps * kPair, end = dwords * (part + 1) / parts;
    for (int64_t i = dwords * part / parts / 16 * 16; i < end; i += 16)
      __builtin_prefetch(p + i, 0, 2);
  }

  // fn(tile, row, lane) for the four tiles of a product of two pairs, with where in it they begin.
  template <class Fn>
  static void for_quadrants(float* c, const Fn& fn) {
    for (int64_t q = 0; q < 4; ++q) fn(c + q * kTile, q / 2 * kSide, q % 2 * kSide);
  }

  // y[m0 : m0 + 16, n0 : n0 + 16] of a piece from the tile of y^T in c.
  void finish_forward(const Rows& x, float* c, int64_t m0, int64_t n0) const {
    const int64_t rows = min64(16, args.N - n0), columns = min64(16, x.piece.M - m0);
    if (args.bias) {
      for (int64_t i = 0; i < rows; ++i) {
        f32_store(c + 16 * i, f32_add(f32_load(c + 16 * i), f32_set1(args.bias[n0 + i])));
      }
    }
    if (args.r > 0) {
      add_low_rank(c, args.factor + n0 * args.r, rows, x.s(m0 / kPairSide, args.r) + m0 % kPairSide,
                   kPairSide, kSide);
    }
    float t[kTile];
    transpose_tile(reinterpret_cast<const uint32_t*>(c), 16, reinterpret_cast<uint32_t*>(t));
    for (int64_t i = 0; i < columns; ++i) {
      store_row(args.out, args.out_dtype, (x.piece.first + m0 + i) * args.N + n0, t + 16 * i, rows);
    }
  }

  // Weights whose scales are worth asking for ahead of a row: float32 ones of its next block where
  // those are short, for few share a line; bytes of a whole row of the next panel, ahead of it.
  int64_t scales_ahead(bool more) const {
    if (args.w.float_scales()) return args.w.blocksize < 64 ? kBlock : 0;
    return more ? 0 : args.K;
  }

  // Columns [k0, k0 + kBlock) of the panel's rows. Ahead of row i of a pair comes meanwhile(i).
  template <class Fn>
  [[gnu::always_inline]] void decode_panel(const Panel& p, const NF4Piece& piece,
                                           const Absmax& absmax, int64_t k0, int64_t stride,
                                           const Fn& meanwhile) const {
    const int64_t K = args.K, width = min64(kBlock, K - k0);
    const bool more = k0 + kBlock < K;
    const int64_t scales = scales_ahead(more);
    for (int64_t np = 0; np < p.pairs(); ++np) {
      uint32_t* weights = p.weights + np * kPairBlock;
      const int64_t first = piece.weight + p.begin + np * kPairSide;
      const int64_t rows = min64(kPairSide, p.count - np * kPairSide);
      // Asks for what comes after each row: its next block, or that of the next panel's row, and
      // scales. Where lambdas take [[gnu::always_inline]] it is of the type, which ignores it.
      const int64_t next = more ? first * K + k0 + kBlock : (first + stride) * K;
      const auto before = [&w = args.w, K, next, scales, meanwhile](int64_t i)
                              __attribute__((always_inline)) {
                                meanwhile(i);
                                prefetch(w, next + i * K, kBlock);
                                if (scales > 0) prefetch_scales(w, next + i * K, scales);
                              };
      Math::decode_rows(args.w, absmax, first * K + k0, K, rows, width, args.dtype, weights, kPair,
                        before);
      for (int64_t i = rows; i < kPairSide; ++i) {
        const int64_t count = round_up(width, Math::kOrder) / kStep;
        for (int64_t j = 0; j < count; ++j) {
          std::memset(weights + i * kSide + j * kPair, 0, kSide * 4);
        }
      }
    }
  }

  void multiply_panel(const Panel& p, const Rows& x, int64_t k0) const {
    const int64_t count = round_up(min64(kBlock, args.K - k0), Math::kOrder) / kStep;
    for (int64_t mp = 0; mp < x.pairs(); ++mp) {
      const uint32_t* lanes = x.at(mp, k0 / kStep);
      for (int64_t np = 0; np < p.pairs(); ++np) {
        if (mp + 1 < x.pairs()) prefetch_share(x.at(mp + 1, k0 / kStep), count, np, p.pairs());
        multiply(p.weights + np * kPairBlock, lanes, p.sums + (np * x.pairs() + mp) * kProduct,
                 count, k0 == 0, p.count - np * kPairSide, x.piece.M - mp * kPairSide > kSide);
      }
    }
  }

  // The sums of one pair of weight rows and one of x. A block is multiplied, a step ahead of every
  // few rows, while the next is decoded: long decoding would leave tile products waiting for it.
  void overlap_panel(const Panel& p, const Rows& x, const Absmax& absmax, int64_t stride) const {
    constexpr int64_t kSteps = kBlock / kStep, kRows = kPairSide / kSteps;
    const int64_t K = args.K, last = (K - 1) / kBlock * kBlock;
    const typename Math::Steps product{p.count > kSide, x.piece.M > kSide};
    product.begin();
    const uint32_t* weights = p.weights;
    for (int64_t k0 = 0; k0 < K; k0 += kBlock) {
      Panel block = p;
      block.weights += k0 / kBlock % 2 * kPairBlock;
      const uint32_t* left = weights;
      const uint32_t* lanes = k0 > 0 ? x.at(0, (k0 - kBlock) / kStep) : nullptr;
      decode_panel(block, x.piece, absmax, k0, stride,
                   [=](int64_t i) __attribute__((always_inline)) {
                     if (!lanes || i % kRows != 0) return;
                     product.step(left + i / kRows * kPair, lanes + i / kRows * kPair);
                   });
      for (int64_t t = ceil_div(p.count, kRows); lanes && t < kSteps; ++t) {
        product.step(left + t * kPair, lanes + t * kPair);
      }
      weights = block.weights;
    }
    const int64_t rest = round_up(K - last, Math::kOrder) / kStep;
    for (int64_t t = 0; t < rest; ++t) {
      product.step(weights + t * kPair, x.at(0, last / kStep + t));
    }
    product.end(p.sums);
  }

  void finish_panel(const Panel& p, const Rows& x) const {
    for (int64_t np = 0; np < p.pairs(); ++np) {
      for (int64_t mp = 0; mp < x.pairs(); ++mp) {
        float* sums = p.sums + (np * x.pairs() + mp) * kProduct;
        for_quadrants(sums, [&](float* c, int64_t i, int64_t j) {
          const int64_t n = np * kPairSide + i, m = mp * kPairSide + j;
          if (n < p.count && m < x.piece.M) finish_forward(x, c, m, p.begin + n);
        });
      }
    }
  }

  void forward() const {
    const int64_t N = args.N, K = args.K, most = wave.pieces[0].M, pairs = wave.rows / kPairSide;
    const int64_t steps = round_up(K, Math::kOrder) / kStep;
    Scratch packed(pairs * steps * kPair * 4), s(args.r * wave.rows * 4);
    const Packed x{static_cast<uint32_t*>(packed.data), s.floats(), steps};
    pack<true>(x, K);
    const typename Math::ByteTables bytes(args.w);

    const int64_t share = round_up(ceil_div(N, ceil_div(args.threads, wave.count)), kPairSide);
    const int64_t rows = min64(most <= kPairSide ? kPairSide : kPanelRows, share);
    // Measured: weights whose decoding is shorter overlap their products without being told to.
    const bool overlaps = Math::kOverlaps && args.w.blocksize < 64 &&
                          args.w.format != Format::kMXFP4 && rows == kPairSide && most <= kPairSide;
    const int64_t weights = (overlaps ? 2 : rows / kPairSide) * kPairBlock;
    const int64_t sums = rows / kPairSide * ceil_div(most, kPairSide) * kProduct;
    const int64_t blocks = rows * K / args.w.blocksize + 2;
    const int64_t per_thread = round_up(weights + sums + blocks, 16), panels = ceil_div(N, rows);
    Scratch scratch(args.threads * per_thread * 4);
    parallel_for(args.threads, wave.count * panels, [&](int64_t t, int thread) {
      typename Math::Session session;
      (void)session;
      float* own = scratch.floats() + thread * per_thread;
      const NF4Piece& piece = wave.pieces[t / panels];
      const int64_t begin = t % panels * rows;
      const Panel p{reinterpret_cast<uint32_t*>(own), own + weights, begin, min64(rows, N - begin)};
      const Absmax absmax = expand_rows(args.w, (piece.weight + begin) * K, p.count * K,
                                        own + weights + sums, bytes.get());
      if constexpr (Math::kOverlaps) {
        if (overlaps) overlap_panel(p, {piece, x}, absmax, rows);
      }
      for (int64_t k0 = 0; !overlaps && k0 < K; k0 += kBlock) {
        decode_panel(p, piece, absmax, k0, rows, [](int64_t) {});
        multiply_panel(p, {piece, x}, k0);
      }
      finish_panel(p, {piece, x});
    });
  }

  // Columns of a task, and the columns and weight rows of it that are decoded at a time. For one
  // pair of rows of dy the decoded part stays in the first-level cache, and a strip is wide, for
  // memory is fast where it is read in order; for more, what is loaded of dy per weight counts.
  struct Blocking {
    int64_t strip, columns, rows;
  };
  Blocking blocking() const {
    if (wave.pieces[0].M > kPairSide) return {kStrip, kStrip, kBlock};
    const int64_t share = ceil_div(wave.count * args.K, 2 * args.threads);
    return {min64(kWideStrip, round_up(share, 128)), 128, kBlock / 4};
  }

  // Pairs of tiles that so many columns of a strip are in: of whole groups that share an order.
  static int64_t strip_pairs(int64_t count) {
    return ceil_div(round_up(count, Math::kColumns), kPairSide);
  }
  static float* strip_sums(const Panel& p, int64_t mp, int64_t kp) {
    return p.sums + (mp * strip_pairs(p.count) + kp) * kProduct;
  }

  // Weight rows [n0, n0 + rows) times columns [begin, begin + count) of the strip.
  void multiply_strip(const Panel& p, const Rows& dy, const Absmax& absmax, RowsAhead& ahead,
                      int64_t n0, int64_t rows, int64_t begin, int64_t count) const {
    for (int64_t c = 0; c < count; c += 128) {
      Math::decode_lanes(args.w, absmax, ahead, args.K, dy.piece.weight + n0, rows,
                         p.begin + begin + c, args.dtype, p.weights + c / kPairSide * kPairBlock,
                         kPairBlock);
    }
    const int64_t steps = ceil_div(rows, kStep), pairs = strip_pairs(count);
    for (int64_t mp = 0; mp < dy.pairs(); ++mp) {
      const uint32_t* left = dy.at(mp, n0 / kStep);
      for (int64_t kp = 0; kp < pairs; ++kp) {
        if (mp + 1 < dy.pairs()) prefetch_share(dy.at(mp + 1, n0 / kStep), steps, kp, pairs);
        multiply(left, p.weights + kp * kPairBlock, strip_sums(p, mp, begin / kPairSide + kp),
                 steps, n0 == 0, dy.piece.M - mp * kPairSide, true);
      }
    }
  }

  void finish_strip(const Panel& p, const NF4Piece& piece) const {
    for (int64_t mp = 0; mp < ceil_div(piece.M, kPairSide); ++mp) {
      for (int64_t kp = 0; Math::kColumns > kPairSide && kp < strip_pairs(p.count); kp += 2) {
        for (int64_t i = 0; i < 2; ++i) {
          float* left = strip_sums(p, mp, kp) + i * kPair;
          float* right = strip_sums(p, mp, kp + 1) + i * kPair;
          float* const tiles[4] = {left, left + kTile, right, right + kTile};
          Math::arrange(tiles, args.w.low_first());
        }
      }
      for (int64_t kp = 0; kp < strip_pairs(p.count); ++kp) {
        for_quadrants(strip_sums(p, mp, kp), [&](float* c, int64_t i, int64_t j) {
          const int64_t m = mp * kPairSide + i, k = p.begin + kp * kPairSide + j;
          if (m < piece.M && k < args.K) finish_backward(piece, c, m, k);
        });
      }
    }
  }

  void finish_backward(const NF4Piece& piece, float* c, int64_t m0, int64_t k0) const {
    const int64_t rows = min64(kSide, piece.M - m0), columns = min64(16, args.K - k0);
    const int64_t first = piece.first + m0;
    if (args.r > 0) {
      add_low_rank(c, args.s + first * args.r, rows, args.factor + k0, args.K,
                   static_cast<int>(columns));
    }
    for (int64_t i = 0; i < rows; ++i) {
      store_row(args.out, args.out_dtype, (first + i) * args.K + k0, c + 16 * i, columns);
    }
  }

  void backward() const {
    const int64_t N = args.N, K = args.K, steps = ceil_div(N, kStep);
    Scratch packed(wave.rows / kPairSide * steps * kPair * 4);
    const Packed dy{static_cast<uint32_t*>(packed.data), nullptr, steps};
    pack<false>(dy, N);
    const typename Math::ByteTables bytes(args.w);
    const WaveAbsmax absmax(args, wave, K % 64 == 0 ? bytes.get() : nullptr);

    const Blocking block = blocking();
    const int64_t weights = kStrip / kPairSide * kPairBlock, strips = ceil_div(K, block.strip);
    const int64_t pairs = ceil_div(wave.pieces[0].M, kPairSide);
    const int64_t per_thread = weights + pairs * strip_pairs(block.strip) * kProduct;
    Scratch scratch(args.threads * per_thread * 4);
    parallel_for(args.threads, wave.count * strips, [&](int64_t t, int thread) {
      typename Math::Session session;
      (void)session;
      float* own = scratch.floats() + thread * per_thread;
      const NF4Piece& piece = wave.pieces[t / strips];
      const Absmax scales = absmax.of(t / strips);
      const int64_t begin = t % strips * block.strip, count = min64(block.strip, K - begin);
      const Panel p{reinterpret_cast<uint32_t*>(own), own + weights, begin, count};
      for (int64_t n0 = 0; n0 < N; n0 += block.rows) {
        const int64_t rows = min64(block.rows, N - n0);
        RowsAhead ahead(args.w, scales, (piece.weight + n0 + block.rows) * K + begin, count, K);
        for (int64_t c = 0; c < count; c += block.columns) {
          multiply_strip(p, {piece, dy}, scales, ahead, n0, rows, c,
                         min64(block.columns, count - c));
        }
      }
      finish_strip(p, piece);
    });
  }
};

template <class Math>
void forward_panels(const NF4PieceArgs& args, const NF4Wave& wave) {
  NF4Gemm<Math>{args, wave}.forward();
}
// Of short blocks and of zeros where it pays: not without vectors.
#if defined(__AVX2__)
constexpr bool kShortBlocks = true;
#else
constexpr bool kShortBlocks = false;
#endif
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr bool kAnyCodes = true;
#else
constexpr bool kAnyCodes = false;  // not measured
#endif
template <template <bool> class Dots>
void forward_few(const NF4PieceArgs& args, const NF4Wave& wave) {
  if (kShortBlocks && Dots<true>::serves(args.w)) {
    NF4Dots<Dots<kShortBlocks>>{args, wave}.forward();
  } else {
    NF4Dots<Dots<false>>{args, wave}.forward();
  }
}
template <template <bool> class Axpy>
void backward_few(const NF4PieceArgs& args, const NF4Wave& wave) {
  if (kShortBlocks && Axpy<true>::serves(args.w)) {
    NF4Axpy<Axpy<kShortBlocks>>{args, wave}.backward();
  } else {
    NF4Axpy<Axpy<false>>{args, wave}.backward();
  }
}
template <class Math>
void backward_panels(const NF4PieceArgs& args, const NF4Wave& wave) {
  NF4Gemm<Math>{args, wave}.backward();
}

}  // namespace
}  // namespace peftkern
