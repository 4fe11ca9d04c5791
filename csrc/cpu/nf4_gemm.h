// The loops of y = x W^T + s b^T + bias and dx = dy W + s a (s scaled) over NF4 weights, for any
// Math that supplies tiles (Float32Math, or one of the bfloat16 ones).
//
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

template <class Math>
struct NF4Gemm {
  const NF4LinearArgs& args;

  static constexpr int64_t kStep = Math::kStep;
  static constexpr int64_t kBlock = Math::kBlock;
  static constexpr int64_t kBlockSteps = kBlock / kStep;

  // `rows` rows of `width` elements as [row pair][step][2 tiles]: rows tiles as they are, or lanes
  // tiles in the order in which decode_row puts weights.
  template <bool kLanes>
  void pack(int64_t first, int64_t rows, int64_t width, int64_t steps, uint32_t* out) const {
    constexpr int64_t kGroup = kLanes ? Math::kOrder / kStep : 1;  // steps that are loaded at once
    constexpr int64_t kChunk = 16;                                 // steps in a task
    const int64_t chunks = (steps + kChunk - 1) / kChunk;
    auto task = [&](int64_t t, int) {
      const int64_t group = t / chunks, begin = t % chunks * kChunk;
      for (int64_t step = begin; step < min64(steps, begin + kChunk); step += kGroup) {
        uint32_t* tile = out + (group / 2 * steps + step) * kPair + group % 2 * kTile;
        uint32_t lines[16 * 16 * kGroup];
        for (int64_t i = 0; i < 16; ++i) {
          const int64_t row = group * 16 + i, column = step * kStep;
          const int64_t valid = row < rows ? width - column : 0;
          const int64_t source = valid > 0 ? (first + row) * width + column : 0;
          if (kLanes) {
            Math::load_ordered(args.in, args.dtype, source, min64(valid, Math::kOrder),
                               lines + 16 * kGroup * i);
          } else {
            Math::load_dwords(args.in, args.dtype, source, min64(valid, kStep), tile + 16 * i);
          }
        }
        for (int64_t g = 0; kLanes && g < kGroup; ++g) {
          transpose_tile(lines + 16 * g, 16 * kGroup, tile + g * kPair);
        }
      }
    };
    parallel_for(args.threads, round_up(rows, 32) / 16 * chunks, task);
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
      F16 acc[kRows];
      for (int i = 0; i < kRows; ++i) acc[i] = f16_load(tile + (row + i) * 16);
      for (int64_t j = 0; j < r; ++j) {
        const float* p = right + j * right_stride;
        const F16 x = f16_mul(right_valid >= 16 ? f16_load(p) : f16_load_n(p, right_valid),
                              f16_set1(args.scaling));
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) {
          const int64_t source = i < valid ? row + i : row;  // rows past the end are not stored
          acc[i] = f16_fma(f16_set1(left[source * r + j]), x, acc[i]);
        }
      }
      for (int i = 0; i < kRows; ++i) f16_store(tile + (row + i) * 16, acc[i]);
    }
  }

  static void store_row(void* out, DType dtype, int64_t i, const float* values, int64_t n) {
    store_any(out, dtype, i, f16_load(values), static_cast<int>(min64(n, 16)));
  }

  static void multiply(const uint32_t* rows, const uint32_t* lanes, float* c, int64_t steps,
                       bool first, bool two_rows, bool two_lanes) {
    if (two_rows && two_lanes) {
      Math::template multiply<2, 2>(rows, lanes, c, steps, first);
    } else if (two_rows) {
      Math::template multiply<2, 1>(rows, lanes, c, steps, first);
    } else {
      Math::template multiply<1, 2>(rows, lanes, c, steps, first);
    }
  }

  static void prefetch(const NF4View& w, int64_t element, int64_t count) {
    const int64_t end = min64(element + count, w.numel) / 2;
    for (int64_t i = element / 2; i < end; i += 64) __builtin_prefetch(w.packed + i, 0, 2);
  }

  // Part `part` of `parts` of the packed block that is needed next.
  static void prefetch_share(const uint32_t* p, int64_t dwords, int64_t part, int64_t parts) {
    const int64_t end = dwords * (part + 1) / parts;
    for (int64_t i = dwords * part / parts / 16 * 16; i < end; i += 16)
      __builtin_prefetch(p + i, 0, 2);
  }

  // y[m0 : m0 + 16, n0 : n0 + 16] from the tile of y^T in c.
  void finish_forward(float* c, int64_t m0, int64_t n0, const float* s_transposed,
                      int64_t s_stride) const {
    const int64_t rows = min64(16, args.N - n0), columns = min64(16, args.M - m0);
    if (args.bias) {
      for (int64_t i = 0; i < rows; ++i) {
        f16_store(c + 16 * i, f16_add(f16_load(c + 16 * i), f16_set1(args.bias[n0 + i])));
      }
    }
    if (args.r > 0) {
      add_low_rank(c, args.up + n0 * args.r, rows, s_transposed, s_stride, 16);
    }
    float t[kTile];
    transpose_tile(reinterpret_cast<const uint32_t*>(c), 16, reinterpret_cast<uint32_t*>(t));
    for (int64_t i = 0; i < columns; ++i) {
      store_row(args.out, args.dtype, (m0 + i) * args.N + n0, t + 16 * i, rows);
    }
  }

  void forward_rows(int64_t m0, int64_t M) const {
    const int64_t N = args.N, K = args.K, pairs = (M + 31) / 32;
    const int64_t steps = round_up(K, Math::kOrder) / kStep;
    const int64_t share = round_up((N + args.threads - 1) / args.threads, 32);
    const int64_t panel = min64(M <= 32 ? 32 : kPanelRows, share), panels = (N + panel - 1) / panel;
    const int64_t blocks = panel * K / args.w.blocksize + 2;

    Scratch packed(pairs * steps * kPair * 4);
    pack<true>(m0, M, K, steps, static_cast<uint32_t*>(packed.data));
    const int64_t s_stride = pairs * 32;
    Scratch s_scratch(args.r * s_stride * 4);
    float* s = static_cast<float*>(s_scratch.data);
    for (int64_t j = 0; j < args.r; ++j) {
      for (int64_t m = 0; m < s_stride; ++m) {
        s[j * s_stride + m] = m < M ? args.s[(m0 + m) * args.r + j] : 0.0f;
      }
    }

    const int64_t panel_dwords = panel / 32 * kBlockSteps * kPair;
    const int64_t sum_floats = panel / 32 * pairs * 4 * kTile;
    const int64_t per_thread = round_up((panel_dwords + sum_floats + blocks) * 4, 64);
    Scratch scratch(args.threads * per_thread);

    auto task = [&](int64_t t, int thread) {
      typename Math::Session session;
      (void)session;
      uint32_t* weights =
          reinterpret_cast<uint32_t*>(static_cast<char*>(scratch.data) + thread * per_thread);
      float* sums = reinterpret_cast<float*>(weights + panel_dwords);
      const int64_t n0 = t * panel, rows = min64(panel, N - n0);
      const int log2 = args.w.blocksize_log2();
      const Absmax absmax{sums + sum_floats, (n0 * K) >> log2, log2};
      expand_absmax(args.w, absmax.first, (((n0 + rows) * K - 1) >> log2) - absmax.first + 1,
                    sums + sum_floats);
      for (int64_t k0 = 0; k0 < K; k0 += kBlock) {
        const int64_t width = min64(kBlock, K - k0);
        const int64_t count = round_up(width, Math::kOrder) / kStep;
        for (int64_t i = 0; i < round_up(rows, 32); ++i) {
          uint32_t* row = weights + i / 32 * kBlockSteps * kPair + i % 32 * 16;
          if (i < rows) {
            const int64_t element = (n0 + i) * K + k0;
            // The same row's next block, or the next panel's first.
            prefetch(args.w, k0 + kBlock < K ? element + kBlock : element - k0 + panel * K, kBlock);
            Math::decode_row(args.w, absmax, element, width, args.dtype, row, kPair);
          } else {
            for (int64_t j = 0; j < count; ++j) std::memset(row + j * kPair, 0, 64);
          }
        }
        const int64_t row_pairs = (rows + 31) / 32;
        for (int64_t mp = 0; mp < pairs; ++mp) {
          const uint32_t* x =
              static_cast<uint32_t*>(packed.data) + (mp * steps + k0 / kStep) * kPair;
          for (int64_t np = 0; np < row_pairs; ++np) {
            if (mp + 1 < pairs) prefetch_share(x + steps * kPair, count * kPair, np, row_pairs);
            multiply(weights + np * kBlockSteps * kPair, x, sums + (np * pairs + mp) * 4 * kTile,
                     count, k0 == 0, true, M - mp * 32 > 16);
          }
        }
      }
      for (int64_t np = 0; np < (rows + 31) / 32; ++np) {
        for (int64_t mp = 0; mp < pairs; ++mp) {
          for (int q = 0; q < 4; ++q) {
            const int64_t n = np * 32 + q / 2 * 16, m = mp * 32 + q % 2 * 16;
            if (n < rows && m < M) {
              finish_forward(sums + ((np * pairs + mp) * 4 + q) * kTile, m0 + m, n0 + n,
                             args.r > 0 ? s + m : nullptr, s_stride);
            }
          }
        }
      }
    };
    parallel_for(args.threads, panels, task);
  }

  // Few rows: dot products of weight rows as they stream by, nothing but x is kept.
  template <int kRows>
  void forward_dots(int64_t m0, const float* x, int64_t stride) const {
    const int64_t N = args.N, K = args.K;
    constexpr int64_t kRowsPerTask = 64;
    const int64_t blocks = kRowsPerTask * K / args.w.blocksize + 2;
    const int64_t per_thread = round_up(blocks * 4, 64);
    Scratch scratch(args.threads * per_thread);
    auto task = [&](int64_t t, int thread) {
      float* expanded =
          reinterpret_cast<float*>(static_cast<char*>(scratch.data) + thread * per_thread);
      const int64_t n0 = t * kRowsPerTask, end = min64(N, n0 + kRowsPerTask);
      const int log2 = args.w.blocksize_log2();
      const Absmax absmax{expanded, (n0 * K) >> log2, log2};
      expand_absmax(args.w, absmax.first, ((end * K - 1) >> log2) - absmax.first + 1, expanded);
      for (int64_t n = n0; n < end; ++n) {
        F16 acc[kRows];
        for (int m = 0; m < kRows; ++m) {
          acc[m] = f16_zero();
          const float* s = args.s + (m0 + m) * args.r;
          const float* b = args.up + n * args.r;
          for (int64_t j = 0; j < args.r; j += 16) {
            const int count = static_cast<int>(min64(16, args.r - j));
            const F16 scaled = f16_mul(f16_load_n(s + j, count), f16_set1(args.scaling));
            acc[m] = f16_fma(scaled, f16_load_n(b + j, count), acc[m]);
          }
        }
        dot<kRows>(args.w, absmax, n * K, K, x, stride, acc);
        for (int m = 0; m < kRows; ++m) {
          const float y = f16_sum(acc[m]) + (args.bias ? args.bias[n] : 0.0f);
          const int64_t i = (m0 + m) * N + n;
          if (args.dtype == DType::kFloat32) {
            static_cast<float*>(args.out)[i] = y;
          } else {
            static_cast<uint16_t*>(args.out)[i] = bf16_from_float(y);
          }
        }
      }
    };
    parallel_for(args.threads, (N + kRowsPerTask - 1) / kRowsPerTask, task);
  }

  void forward() const {
    if (args.M <= Math::kDotRows) {
      const int64_t stride = round_up(args.K, kDotGroup);
      Scratch prepared(args.M * stride * 4);
      float* x = static_cast<float*>(prepared.data);
      for (int64_t m = 0; m < args.M; ++m) {
        prepare_dot(args.in, args.dtype, m * args.K, args.K, x + m * stride);
      }
      int64_t m = 0;
      for (; m + 4 <= args.M; m += 4) forward_dots<4>(m, x + m * stride, stride);
      for (; m + 2 <= args.M; m += 2) forward_dots<2>(m, x + m * stride, stride);
      for (; m < args.M; ++m) forward_dots<1>(m, x + m * stride, stride);
      return;
    }
    for (int64_t m = 0; m < args.M; m += kForwardRows) {
      forward_rows(m, min64(kForwardRows, args.M - m));
    }
  }

  void backward_rows(int64_t m0, int64_t M, const Absmax& absmax) const {
    const int64_t N = args.N, K = args.K, pairs = (M + 31) / 32;
    const int64_t steps = (N + kStep - 1) / kStep;
    Scratch packed(pairs * steps * kPair * 4);
    pack<false>(m0, M, N, steps, static_cast<uint32_t*>(packed.data));

    const int64_t panel_dwords = kStrip / 32 * kBlockSteps * kPair;
    const int64_t sum_floats = pairs * (kStrip / 32) * 4 * kTile;
    const int64_t per_thread = (panel_dwords + sum_floats) * 4;
    Scratch scratch(args.threads * per_thread);
    auto task = [&](int64_t t, int thread) {
      typename Math::Session session;
      (void)session;
      uint32_t* weights =
          reinterpret_cast<uint32_t*>(static_cast<char*>(scratch.data) + thread * per_thread);
      float* sums = reinterpret_cast<float*>(weights + panel_dwords);
      const int64_t k0 = t * kStrip, columns = min64(kStrip, K - k0);
      for (int64_t n0 = 0; n0 < N; n0 += kBlock) {
        const int64_t rows = min64(kBlock, N - n0), count = (rows + kStep - 1) / kStep;
        for (int64_t c = 0; c < columns; c += 128) {
          Math::decode_lanes(args.w, absmax, N, K, n0, rows, k0 + c, args.dtype,
                             weights + c / 32 * kBlockSteps * kPair, kBlockSteps * kPair);
        }
        for (int64_t mp = 0; mp < pairs; ++mp) {
          const uint32_t* dy =
              static_cast<uint32_t*>(packed.data) + (mp * steps + n0 / kStep) * kPair;
          const int64_t column_pairs = (columns + 31) / 32;
          for (int64_t kp = 0; kp < column_pairs; ++kp) {
            if (mp + 1 < pairs) prefetch_share(dy + steps * kPair, count * kPair, kp, column_pairs);
            multiply(dy, weights + kp * kBlockSteps * kPair,
                     sums + (mp * (kStrip / 32) + kp) * 4 * kTile, count, n0 == 0, M - mp * 32 > 16,
                     true);
          }
        }
      }
      for (int64_t mp = 0; mp < pairs; ++mp) {
        for (int64_t kp = 0; kp < (columns + 31) / 32; ++kp) {
          for (int q = 0; q < 4; ++q) {
            const int64_t m = m0 + mp * 32 + q / 2 * 16, k = k0 + kp * 32 + q % 2 * 16;
            float* c = sums + ((mp * (kStrip / 32) + kp) * 4 + q) * kTile;
            if (m < m0 + M && k < K) finish_backward(c, m, min64(16, m0 + M - m), k);
          }
        }
      }
    };
    parallel_for(args.threads, (K + kStrip - 1) / kStrip, task);
  }

  void finish_backward(float* c, int64_t m0, int64_t rows, int64_t k0) const {
    const int64_t columns = min64(16, args.K - k0);
    if (args.r > 0) {
      add_low_rank(c, args.s + m0 * args.r, rows, args.up + k0, args.K, static_cast<int>(columns));
    }
    for (int64_t i = 0; i < rows; ++i) {
      store_row(args.out, args.dtype, (m0 + i) * args.K + k0, c + 16 * i, columns);
    }
  }

  void backward() const {
    const int64_t blocks = args.w.nblocks();
    constexpr int64_t kChunk = 1 << 14;
    Scratch expanded(blocks * 4);
    float* values = static_cast<float*>(expanded.data);
    auto task = [&](int64_t t, int) {
      const int64_t first = t * kChunk;
      expand_absmax(args.w, first, min64(kChunk, blocks - first), values + first);
    };
    parallel_for(args.threads, (blocks + kChunk - 1) / kChunk, task);
    const Absmax absmax{values, 0, args.w.blocksize_log2()};
    for (int64_t m = 0; m < args.M; m += kBackwardRows) {
      backward_rows(m, min64(kBackwardRows, args.M - m), absmax);
    }
  }
};

template <class Math>
void forward_with(const NF4LinearArgs& args) {
  NF4Gemm<Math>{args}.forward();
}
template <class Math>
void backward_with(const NF4LinearArgs& args) {
  NF4Gemm<Math>{args}.backward();
}

}  // namespace
}  // namespace peftkern
