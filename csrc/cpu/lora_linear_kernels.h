// The skinny products of a LoRA layer: shrink, expand and outer. Compiled once per instruction set.
// Sixteen lanes run along the activation's columns.
#pragma once

#include "load_store.h"
#include "peftkern/lora_linear.h"

namespace peftkern {
namespace {
namespace lora {

// n <= 16 values of the activation from element i on, zero where dropout does not keep them.
inline F32x16 load_kept(const void* x, const LoraArgs& args, int64_t i, int n) {
  const F32x16 value = load_any(x, args.dtype, i, n);
  return args.keep ? f32_keep(value, args.keep + i, n) : value;
}

inline F32x16 load_factor(const float* p, int n) {
  return n == 16 ? f32_load(p) : f32_load_n(p, n);
}

// Tiles whose sums stay in registers, of which AVX2 has half as many of half the size: rows by
// ranks of dot products; rows, or ranks, of sixteen columns. GFLOP/s on a thread of an EPYC 7003,
// AVX2, 256 x 512, r=16, float32, 2026-12, with AVX-512's tiles and these: shrink 8 and 58, expand
// 21 and 53, outer 34 and 55.
#if defined(__AVX512F__)
constexpr int kDotRows = 4, kDotRanks = 4, kColumnRows = 8;
#else
constexpr int kDotRows = 1, kDotRanks = 4, kColumnRows = 4;
#endif

// s[m0 : m0 + kM, j0 : j0 + kR] of kept values of x from row m0 on.
template <int kM, int kR>
void shrink_tile(const LoraShrinkArgs& args, const float* x, int64_t m0, int64_t j0) {
  F32x16 acc[kM][kR];
  for (auto& row : acc) {
    for (F32x16& sum : row) sum = f32_zero();
  }
  const int64_t K = args.K, whole = K / 16 * 16;
  const auto step = [&](int64_t k, int n) {
    F32x16 a[kR];
    for (int j = 0; j < kR; ++j) a[j] = load_factor(args.a + (j0 + j) * K + k, n);
    for (int m = 0; m < kM; ++m) {
      const F32x16 value = load_factor(x + m * K + k, n);
      for (int j = 0; j < kR; ++j) acc[m][j] = f32_fma(value, a[j], acc[m][j]);
    }
  };
  for (int64_t k = 0; k < whole; k += 16) step(k, 16);
  if (whole < K) step(whole, static_cast<int>(K - whole));
  for (int m = 0; m < kM; ++m) {
    for (int j = 0; j < kR; ++j) {
      args.s[(m0 + m) * args.r + j0 + j] = args.scale * f32_sum(acc[m][j]);
    }
  }
}

template <int kM>
void shrink_rows(const LoraShrinkArgs& args, const float* x, int64_t m0, int64_t begin,
                 int64_t end) {
  int64_t j = begin;
  for (; j + kDotRanks <= end; j += kDotRanks) shrink_tile<kM, kDotRanks>(args, x, m0, j);
  for (; j < end; ++j) shrink_tile<kM, 1>(args, x, m0, j);
}

void shrink(const LoraShrinkArgs& args) {
  constexpr int64_t kM = 4, kR = 16;  // of a task
  const int64_t groups = ceil_div(args.r, kR), K = args.K;
  const bool as_is = args.dtype == DType::kFloat32 && !args.keep;
  const int64_t widened = as_is ? 0 : kDotRows * K;
  Scratch scratch(args.threads * widened * 4);
  parallel_for(args.threads, ceil_div(args.M, kM) * groups, [&](int64_t t, int thread) {
    const int64_t begin = t % groups * kR, end = min64(args.r, begin + kR);
    int64_t m = t / groups * kM;
    const int64_t stop = min64(args.M, m + kM);
    while (m < stop) {
      const int64_t rows = m + kDotRows <= stop ? kDotRows : 1;
      const float* x = static_cast<const float*>(args.x) + m * K;
      if (!as_is) {
        float* block = scratch.floats() + thread * widened;
        x = block;
        for (int64_t i = 0; i < rows * K; i += 16) {
          const int n = static_cast<int>(min64(16, rows * K - i));
          f32_store_n(block + i, load_kept(args.x, args, m * K + i, n), n);
        }
      }
      rows == kDotRows ? shrink_rows<kDotRows>(args, x, m, begin, end)
                       : shrink_rows<1>(args, x, m, begin, end);
      m += rows;
    }
  });
}

template <int kM>
void expand_tile(const LoraExpandArgs& args, int64_t m0, int64_t k, int n) {
  F32x16 acc[kM];
  for (F32x16& sum : acc) sum = f32_zero();
  const auto sums = [&](int columns) {
    for (int64_t j = 0; j < args.r; ++j) {
      const F32x16 a = load_factor(args.a + j * args.K + k, columns);
      for (int m = 0; m < kM; ++m) {
        acc[m] = f32_fma(f32_set1(args.s[(m0 + m) * args.r + j]), a, acc[m]);
      }
    }
  };
  n == 16 ? sums(16) : sums(n);
  for (int m = 0; m < kM; ++m) {
    const int64_t i = (m0 + m) * args.K + k;
    F32x16 delta = f32_mul(acc[m], f32_set1(args.scale));
    if (args.keep) delta = f32_keep(delta, args.keep + i, n);
    store_any(args.y, args.dtype, i, f32_add(load_any(args.y, args.dtype, i, n), delta), n);
  }
}

void expand(const LoraExpandArgs& args) {
  constexpr int64_t kM = 16, kColumns = 512;  // of a task
  const int64_t groups = ceil_div(args.K, kColumns);
  parallel_for(args.threads, ceil_div(args.M, kM) * groups, [&](int64_t t, int) {
    const int64_t begin = t % groups * kColumns, end = min64(args.K, begin + kColumns);
    int64_t m = t / groups * kM;
    const int64_t stop = min64(args.M, m + kM);
    while (m < stop) {
      const bool full = m + kColumnRows <= stop;
      for (int64_t k = begin; k < end; k += 16) {
        const int n = static_cast<int>(min64(16, end - k));
        full ? expand_tile<kColumnRows>(args, m, k, n) : expand_tile<1>(args, m, k, n);
      }
      m += full ? kColumnRows : 1;
    }
  });
}

constexpr int64_t kOuterRows = 64, kOuterColumns = 128;

// g[j0 : j0 + kR, columns of one strip] += s^T block, block[rows][128] being kept values of x.
template <int kR>
void outer_tile(const LoraOuterArgs& args, const float* block, int64_t m0, int64_t rows, int64_t j0,
                int64_t column, float* g) {
  F32x16 acc[kR];
  for (int j = 0; j < kR; ++j) acc[j] = f32_load(g + (j0 + j) * kOuterColumns + column);
  for (int64_t m = 0; m < rows; ++m) {
    const F32x16 x = f32_load(block + m * kOuterColumns + column);
    const float* s = args.s + (m0 + m) * args.r + j0;
    for (int j = 0; j < kR; ++j) acc[j] = f32_fma(f32_set1(s[j]), x, acc[j]);
  }
  for (int j = 0; j < kR; ++j) f32_store(g + (j0 + j) * kOuterColumns + column, acc[j]);
}

inline void store_sums(const LoraOuterArgs& args, const float* g, int64_t k0, int64_t columns) {
  const F32x16 scale = f32_set1(args.scale);
  for (int64_t j = 0; j < args.r; ++j) {
    for (int64_t k = 0; k < columns; k += 16) {
      const F32x16 value = f32_mul(f32_load(g + j * kOuterColumns + k), scale);
      f32_store_n(args.g + j * args.K + k0 + k, value, static_cast<int>(min64(16, columns - k)));
    }
  }
}

// Tiles of sixteen rows: past the last row of g lies the block, which is long enough to be read.
inline void store_transposed(const LoraOuterArgs& args, const float* g, int64_t k0,
                             int64_t columns) {
  const F32x16 scale = f32_set1(args.scale);
  float turned[256];
  for (int64_t j = 0; j < args.r; j += 16) {
    const int n = static_cast<int>(min64(16, args.r - j));
    for (int64_t k = 0; k < columns; k += 16) {
      transpose_tile(reinterpret_cast<const uint32_t*>(g + j * kOuterColumns + k), kOuterColumns,
                     reinterpret_cast<uint32_t*>(turned));
      for (int64_t i = 0; i < min64(16, columns - k); ++i) {
        const F32x16 value = f32_mul(f32_load(turned + 16 * i), scale);
        f32_store_n(args.g + (k0 + k + i) * args.r + j, value, n);
      }
    }
  }
}

void outer(const LoraOuterArgs& args) {
  const int64_t sums = args.r * kOuterColumns, per_thread = sums + kOuterRows * kOuterColumns;
  Scratch scratch(args.threads * per_thread * 4);
  parallel_for(args.threads, ceil_div(args.K, kOuterColumns), [&](int64_t t, int thread) {
    float* g = scratch.floats() + thread * per_thread;
    float* block = g + sums;
    std::memset(g, 0, static_cast<size_t>(sums) * 4);
    const int64_t k0 = t * kOuterColumns, columns = min64(kOuterColumns, args.K - k0);
    for (int64_t m0 = 0; m0 < args.M; m0 += kOuterRows) {
      const int64_t rows = min64(kOuterRows, args.M - m0);
      for (int64_t m = 0; m < rows; ++m) {
        for (int64_t k = 0; k < columns; k += 16) {
          const int n = static_cast<int>(min64(16, columns - k));
          f32_store(block + m * kOuterColumns + k,
                    load_kept(args.x, args, (m0 + m) * args.K + k0 + k, n));
        }
      }
      for (int64_t k = 0; k < columns; k += 16) {
        int64_t j = 0;
        for (; j + kColumnRows <= args.r; j += kColumnRows) {
          outer_tile<kColumnRows>(args, block, m0, rows, j, k, g);
        }
        for (; j < args.r; ++j) outer_tile<1>(args, block, m0, rows, j, k, g);
      }
    }
    args.transposed ? store_transposed(args, g, k0, columns) : store_sums(args, g, k0, columns);
  });
}

}  // namespace lora
}  // namespace
}  // namespace peftkern
