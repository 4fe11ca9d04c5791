// DoRA's row norms. Compiled once per instruction set. Sixteen lanes run along the columns; a few
// rows share each load of the update's factor, which is packed so that it streams from cache.
#pragma once

#include "nf4_kernels.h"
#include "nf4_panel.h"
#include "peftkern/dora.h"

namespace peftkern {
namespace {
namespace dora {

constexpr int64_t kNormRows = 16;     // of a task
constexpr int64_t kNormVectors = 16;  // summed in float32, 256 columns
#if defined(__AVX512F__)
constexpr int kNormTile = 8;  // rows whose sums stay in registers
#else
constexpr int kNormTile = 4;
#endif

// a[r, K] as panels of sixteen columns [K / 16][r][16], zero beyond K.
void pack_factor(const DoraNormArgs& args, float* panels) {
  const int64_t r = args.r, K = args.K;
  parallel_for(args.threads, ceil_div(K, 16), [&](int64_t t, int) {
    const int n = static_cast<int>(min64(16, K - t * 16));
    for (int64_t j = 0; j < r; ++j) {
      f32_store(panels + (t * r + j) * 16, f32_load_n(args.a + j * K + t * 16, n));
    }
  });
}

// sums[m] += |columns [16 v0, 16 v1) of row m0 + m of rows[.., K] + b a|^2.
template <int kM>
void norm_tile(const DoraNormArgs& args, const void* rows, int64_t m0, const float* b,
               const float* panels, int64_t v0, int64_t v1, double* sums) {
  F32x16 squares[kM];
  for (F32x16& square : squares) square = f32_zero();
  for (int64_t v = v0; v < v1; ++v) {
    const int n = static_cast<int>(min64(16, args.K - v * 16));
    F32x16 acc[kM];
    for (int m = 0; m < kM; ++m) {
      acc[m] = load_any(rows, args.dtype, (m0 + m) * args.K + v * 16, n);
    }
    const float* panel = panels + v * args.r * 16;
    for (int64_t j = 0; j < args.r; ++j) {
      const F32x16 a = f32_load(panel + j * 16);
      for (int m = 0; m < kM; ++m) acc[m] = f32_fma(f32_set1(b[m * args.r + j]), a, acc[m]);
    }
    if (n < 16) {  // an Inf of b times the zeros beyond K is NaN
      float columns[16];
      for (int m = 0; m < kM; ++m) {
        f32_store(columns, acc[m]);
        acc[m] = f32_load_n(columns, n);
      }
    }
    for (int m = 0; m < kM; ++m) squares[m] = f32_fma(acc[m], acc[m], squares[m]);
  }
  for (int m = 0; m < kM; ++m) sums[m] += f32_sum(squares[m]);
}

// The dense values of `count` rows from row n0 on, in scratch, and where they begin there.
const void* decode_rows(const DoraNormArgs& args, int64_t n0, int64_t count, float* absmax,
                        void* scratch) {
  const int log2 = args.w.blocksize_log2();
  const int64_t first = n0 * args.K, end = first + count * args.K;
  const int64_t block = first >> log2, begin = block << log2;
  expand_absmax(args.w, block, ((end - 1) >> log2) - block + 1, absmax);
  NF4View run = args.w;
  run.packed += begin / 2;
  if (run.zero) run.zero += block;
  dequantize_blocks(run, absmax, 0, end - begin, scratch, args.dtype, false);
  const int64_t item = args.dtype == DType::kFloat32 ? 4 : 2;
  return static_cast<const char*>(scratch) + (first - begin) * item;
}

void norm(const DoraNormArgs& args) {
  const int64_t r = args.r, vectors = ceil_div(args.K, 16);
  Scratch packed((vectors * r * 16 + 16) * 4);
  float* panels = packed.floats();
  pack_factor(args, panels);
  const int64_t values = args.weight ? 0 : kNormRows * args.K + args.w.blocksize;
  const int64_t blocks = args.weight ? 0 : round_up(values / args.w.blocksize + 2, 16);
  const int64_t per_thread = round_up(values + blocks, 16);
  Scratch scratch((args.threads * per_thread + 16) * 4);
  parallel_for(args.threads, ceil_div(args.N, kNormRows), [&](int64_t t, int thread) {
    const int64_t n0 = t * kNormRows, count = min64(kNormRows, args.N - n0);
    const void* rows = args.weight;
    int64_t base = n0;
    if (!rows) {
      float* own = scratch.floats() + thread * per_thread;
      rows = decode_rows(args, n0, count, own, own + blocks);
      base = 0;
    }
    double sums[kNormRows] = {};
    for (int64_t v = 0; v < vectors; v += kNormVectors) {
      const int64_t stop = min64(vectors, v + kNormVectors);
      int64_t m = 0;
      for (; m + kNormTile <= count; m += kNormTile) {
        norm_tile<kNormTile>(args, rows, base + m, args.b + (n0 + m) * r, panels, v, stop,
                             sums + m);
      }
      for (; m < count; ++m) {
        norm_tile<1>(args, rows, base + m, args.b + (n0 + m) * r, panels, v, stop, sums + m);
      }
    }
    for (int64_t m = 0; m < count; ++m) {
      args.norm[n0 + m] = static_cast<float>(__builtin_sqrt(sums[m]));
    }
  });
}

}  // namespace dora
}  // namespace
}  // namespace peftkern
