// The sparse products of RoSA, compiled once per instruction set. Sixteen lanes run along rows of
// x.
#pragma once

#include "load_store.h"
#include "peftkern/rosa.h"

namespace peftkern {
namespace {
namespace rosa {

constexpr int64_t kTaskRows = 64;        // rows of S in a task
constexpr int64_t kPackColumns = 256;    // columns of x that a task transposes
constexpr int64_t kWidePanel = 1 << 21;  // bytes that may take four vectors a column

// Vectors of a column of a panel: what T fills, and not more than stays in the L2 cache.
inline int panel_vectors(int64_t T, int64_t columns) {
  if (T <= 16) return 1;
  return T <= 32 || columns * 256 > kWidePanel ? 2 : 4;
}

// out[16][stride]: sixteen columns of x[T, columns] from k on, at rows t to t + 15; zero beyond T
// and beyond n columns.
inline void pack_tile(const void* x, DType dtype, int64_t T, int64_t columns, int64_t t, int64_t k,
                      int n, float* out, int64_t stride) {
  float tile[256], turned[256];
  for (int64_t i = 0; i < 16; ++i) {
    f32_store(tile + 16 * i, t + i < T ? load_any(x, dtype, (t + i) * columns + k, n) : f32_zero());
  }
  transpose_tile(reinterpret_cast<const uint32_t*>(tile), 16, reinterpret_cast<uint32_t*>(turned));
  for (int64_t i = 0; i < n; ++i) f32_store(out + i * stride, f32_load(turned + 16 * i));
}

// The panels of `count` x 16 kV rows of x from t on, each [columns][16 kV], one after the other.
template <int kV>
void pack_panels(const void* x, DType dtype, int64_t T, int64_t columns, int64_t t, int64_t count,
                 int threads, float* panels) {
  const int64_t groups = ceil_div(columns, kPackColumns);
  parallel_for(threads, count * groups, [&](int64_t i, int) {
    const int64_t panel = i / groups, begin = i % groups * kPackColumns;
    const int64_t end = min64(columns, begin + kPackColumns);
    float* out = panels + panel * columns * 16 * kV;
    for (int64_t k = begin; k < end; k += 16) {
      const int n = static_cast<int>(min64(16, end - k));
      for (int v = 0; v < kV; ++v) {
        pack_tile(x, dtype, T, columns, t + (panel * kV + v) * 16, k, n, out + (k * kV + v) * 16,
                  16 * kV);
      }
    }
  });
}

// Runs fn(first row of x, number of panels, panels) for groups of panels, as many as there are
// threads to share the work; how they are grouped changes no result.
template <int kV, class Fn>
void for_panels(const void* x, DType dtype, int64_t T, int64_t columns, int threads, const Fn& fn) {
  const int64_t total = (T + 16 * kV - 1) / (16 * kV), group = min64(total, threads);
  Scratch scratch(group * columns * 64 * kV);
  float* panels = scratch.floats();
  for (int64_t first = 0; first < total; first += group) {
    const int64_t count = min64(group, total - first), t = first * 16 * kV;
    pack_panels<kV>(x, dtype, T, columns, t, count, threads, panels);
    fn(t, count, panels);
  }
}

// sums[v][16 t]: the products of one row's entries with a panel. kU entries at once hide the
// latency of adding.
template <int kV, class Index>
void multiply_row(const Index* index, const float* values, int64_t begin, int64_t end,
                  const float* panel, float* sums, int64_t stride) {
  constexpr int kU = kV == 1 ? 4 : 2;
  F32x16 acc[kU][kV];
  for (auto& row : acc) {
    for (F32x16& sum : row) sum = f32_zero();
  }
  int64_t j = begin;
  for (; j + kU <= end; j += kU) {
    for (int u = 0; u < kU; ++u) {
      const F32x16 value = f32_set1(values[j + u]);
      const float* x = panel + static_cast<int64_t>(index[j + u]) * 16 * kV;
      for (int v = 0; v < kV; ++v) acc[u][v] = f32_fma(value, f32_load(x + 16 * v), acc[u][v]);
    }
  }
  for (; j < end; ++j) {
    const F32x16 value = f32_set1(values[j]);
    const float* x = panel + static_cast<int64_t>(index[j]) * 16 * kV;
    for (int v = 0; v < kV; ++v) acc[0][v] = f32_fma(value, f32_load(x + 16 * v), acc[0][v]);
  }
  for (int v = 0; v < kV; ++v) {
    F32x16 sum = acc[0][v];
    for (int u = 1; u < kU; ++u) sum = f32_add(sum, acc[u][v]);
    f32_store(sums + v * stride, sum);
  }
}

template <int kV, class Index>
void spmm_panels(const SpmmArgs& args) {
  const int64_t rows = args.s.rows, columns = args.s.columns;
  const Index* starts = static_cast<const Index*>(args.s.starts);
  const Index* index = static_cast<const Index*>(args.s.index);
  const int64_t groups = ceil_div(rows, kTaskRows);
  const auto run = [&](int64_t t0, int64_t count, const float* panels) {
    parallel_for(args.threads, count * groups, [&](int64_t i, int) {
      const int64_t panel = i % count, first = i / count * kTaskRows;
      const float* x = panels + panel * columns * 16 * kV;
      for (int64_t n0 = first; n0 < min64(rows, first + kTaskRows); n0 += 16) {
        const int n = static_cast<int>(min64(16, rows - n0));
        if (starts[n0] == starts[n0 + n]) continue;
        float sums[kV][256] = {}, turned[256];
        for (int row = 0; row < n; ++row) {
          multiply_row<kV>(index, args.values, starts[n0 + row], starts[n0 + row + 1], x,
                           sums[0] + 16 * row, 256);
        }
        for (int v = 0; v < kV; ++v) {
          const int64_t t = t0 + (panel * kV + v) * 16;
          transpose_tile(reinterpret_cast<const uint32_t*>(sums[v]), 16,
                         reinterpret_cast<uint32_t*>(turned));
          for (int64_t r = 0; r < min64(16, args.T - t); ++r) {
            const int64_t at = (t + r) * rows + n0;
            const F32x16 y =
                f32_add(load_any(args.y, args.dtype, at, n), f32_load(turned + 16 * r));
            store_any(args.y, args.dtype, at, y, n);
          }
        }
      }
    });
  };
  for_panels<kV>(args.x, args.dtype, args.T, columns, args.threads, run);
}

// The sum of each of sixteen vectors, in a vector.
inline F32x16 sum_each(const F32x16 acc[16]) {
#if defined(__AVX512F__)
  __m512 a[8], b[4];
  for (int i = 0; i < 8; ++i) {  // pairs of lanes: of acc[2 i] in even places, of the next in odd
    const __m512 lo = _mm512_unpacklo_ps(acc[2 * i].v, acc[2 * i + 1].v);
    a[i] = _mm512_add_ps(lo, _mm512_unpackhi_ps(acc[2 * i].v, acc[2 * i + 1].v));
  }
  for (int i = 0; i < 4; ++i) {  // in each 128-bit lane: one place for each of four vectors
    b[i] = _mm512_add_ps(_mm512_shuffle_ps(a[2 * i], a[2 * i + 1], 0x44),
                         _mm512_shuffle_ps(a[2 * i], a[2 * i + 1], 0xee));
  }
  const __m512 p =
      _mm512_add_ps(_mm512_shuffle_f32x4(b[0], b[1], 0x88), _mm512_shuffle_f32x4(b[0], b[1], 0xdd));
  const __m512 q =
      _mm512_add_ps(_mm512_shuffle_f32x4(b[2], b[3], 0x88), _mm512_shuffle_f32x4(b[2], b[3], 0xdd));
  return {_mm512_add_ps(_mm512_shuffle_f32x4(p, q, 0x88), _mm512_shuffle_f32x4(p, q, 0xdd))};
#elif defined(__AVX2__)
  __m256 half[2];
  for (int h = 0; h < 2; ++h) {
    __m256 a[8];
    for (int i = 0; i < 8; ++i) a[i] = _mm256_add_ps(acc[8 * h + i].a, acc[8 * h + i].b);
    const __m256 p = _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3]));
    const __m256 q = _mm256_hadd_ps(_mm256_hadd_ps(a[4], a[5]), _mm256_hadd_ps(a[6], a[7]));
    half[h] = _mm256_add_ps(_mm256_permute2f128_ps(p, q, 0x20), _mm256_permute2f128_ps(p, q, 0x31));
  }
  return {half[0], half[1]};
#else
  F32x16 sums;
  for (int i = 0; i < 16; ++i) sums.v[i] = f32_sum(acc[i]);
  return sums;
#endif
}

template <int kV, class Index>
void sddmm_panels(const SddmmArgs& args) {
  const int64_t rows = args.s.rows, columns = args.s.columns;
  const Index* starts = static_cast<const Index*>(args.s.starts);
  const Index* index = static_cast<const Index*>(args.s.index);
  const auto run = [&](int64_t t0, int64_t count, const float* panels) {
    parallel_for(args.threads, ceil_div(rows, kTaskRows), [&](int64_t i, int) {
      for (int64_t n0 = i * kTaskRows; n0 < min64(rows, (i + 1) * kTaskRows); n0 += 16) {
        const int rows_here = static_cast<int>(min64(16, rows - n0));
        if (starts[n0] == starts[n0 + rows_here]) continue;
        for (int64_t panel = 0; panel < count; ++panel) {
          const float* x = panels + panel * columns * 16 * kV;
          const int64_t t = t0 + panel * 16 * kV;
          float dy[16 * 16 * kV];
          for (int v = 0; v < kV; ++v) {
            pack_tile(args.dy, args.dtype, args.T, rows, t + 16 * v, n0, rows_here, dy + 16 * v,
                      16 * kV);
          }
          for (int row = 0; row < rows_here; ++row) {
            F32x16 slope[kV];
            for (int v = 0; v < kV; ++v) slope[v] = f32_load(dy + (row * kV + v) * 16);
            const int64_t end = starts[n0 + row + 1];
            for (int64_t j = starts[n0 + row]; j < end; j += 16) {
              const int n = static_cast<int>(min64(16, end - j));
              F32x16 acc[16];
              for (int e = 0; e < 16; ++e) {
                acc[e] = f32_zero();
                if (e >= n) continue;
                const float* column = x + static_cast<int64_t>(index[j + e]) * 16 * kV;
                for (int v = 0; v < kV; ++v) {
                  acc[e] = f32_fma(slope[v], f32_load(column + 16 * v), acc[e]);
                }
              }
              F32x16 sums = sum_each(acc);
              if (t > 0) sums = f32_add(sums, f32_load_n(args.values + j, n));
              f32_store_n(args.values + j, sums, n);
            }
          }
        }
      }
    });
  };
  for_panels<kV>(args.x, args.dtype, args.T, columns, args.threads, run);
}

template <class Index>
void spmm_typed(const SpmmArgs& args) {
  switch (panel_vectors(args.T, args.s.columns)) {
    case 1:
      return spmm_panels<1, Index>(args);
    case 2:
      return spmm_panels<2, Index>(args);
    default:
      return spmm_panels<4, Index>(args);
  }
}

template <class Index>
void sddmm_typed(const SddmmArgs& args) {
  switch (panel_vectors(args.T, args.s.columns)) {
    case 1:
      return sddmm_panels<1, Index>(args);
    case 2:
      return sddmm_panels<2, Index>(args);
    default:
      return sddmm_panels<4, Index>(args);
  }
}

void spmm(const SpmmArgs& args) {
  args.s.wide ? spmm_typed<int64_t>(args) : spmm_typed<int32_t>(args);
}

void sddmm(const SddmmArgs& args) {
  args.s.wide ? sddmm_typed<int64_t>(args) : sddmm_typed<int32_t>(args);
}

}  // namespace rosa
}  // namespace
}  // namespace peftkern
