// The long products of the low-rank SVD on one thread: Gram matrices and rotations of a tall or a
// wide factor. Compiled once per instruction set.
//
// A piece of the factor is widened to float64 in the first-level cache and multiplied from there;
// sums of a piece stay in registers, pieces are added up in order.
#pragma once

#include "peftkern/low_rank_svd.h"
#include "simd_double.h"

namespace peftkern {
namespace {
namespace low_rank {

#if defined(__AVX512F__)
constexpr int kBlockRows = 8, kDotRows = 4, kDotColumns = 4;
#else
constexpr int kBlockRows = 4, kDotRows = 2, kDotColumns = 4;
#endif
constexpr int kBlockColumns = 2;        // registers
constexpr int64_t kPieceBytes = 24576;  // of a tall piece: half of the first-level cache
constexpr int64_t kWidePiece = 256;     // columns

inline int64_t padded(int64_t r) { return round_up(r, kLowRankPad); }
inline int64_t tall_piece(int64_t r) {
  const int64_t rows = kPieceBytes / 8 / r / kBlockRows * kBlockRows;
  return rows < kBlockRows ? kBlockRows : rows;
}
// Values of a piece and what vector loads may touch behind it.
inline int64_t piece_doubles(int64_t r) {
  const int64_t tall = tall_piece(r) * padded(r), wide = padded(r) * kWidePiece;
  return (tall > wide ? tall : wide) + kLowRankPad * kLowRankPad;
}

// out = n values of `src` from element i on; zeros up to the next multiple of 16.
inline void widen(const void* src, DType dtype, int64_t i, int64_t n, double* out) {
  int64_t j = 0;
  if (dtype == DType::kFloat32) {
    const float* p = static_cast<const float*>(src) + i;
    for (; j + kDoubles <= n; j += kDoubles) doubles_store(out + j, doubles_load_floats(p + j));
    j = j / 16 * 16;
  }
  for (; j < n; j += 16) {
    f32_store_doubles(out + j, load_any(src, dtype, i + j, static_cast<int>(min64(16, n - j))));
  }
}

// Prefetch of the next piece of a factor while the current one is multiplied: a piece is read in
// one go and then worked on from the cache for microseconds, in which the processor's own
// prefetching sees nothing.
struct Ahead {
  const char* row = nullptr;
  int64_t rows = 0, stride = 0, bytes = 0, at = 0;

  void fetch(int64_t lines) {
    for (; lines > 0 && rows > 0; --lines) {
      __builtin_prefetch(row + at);
      at += 64;
      if (at >= bytes) at = 0, row += stride, --rows;
    }
  }
  int64_t lines() const { return rows * ((bytes + 63) / 64); }
};

inline Ahead ahead_of(const LowRankFactor& f, int64_t start, int64_t end, int64_t piece) {
  Ahead ahead;
  const int64_t n = min64(piece, end - start), item = f.dtype == DType::kFloat32 ? 4 : 2;
  if (n <= 0) return ahead;
  ahead.row = static_cast<const char*>(f.data) + start * item * (f.wide ? 1 : f.r);
  ahead.rows = f.wide ? f.r : 1;
  ahead.stride = f.length * item;
  ahead.bytes = n * item * (f.wide ? 1 : f.r);
  return ahead;
}

// acc[i][v] = sum over j < count of p[j p_step + i p_row] q[j q_step + vector v].
template <int kI, int kV>
inline void outer_block(const double* p, int64_t p_step, int64_t p_row, const double* q,
                        int64_t q_step, int64_t count, Doubles (&acc)[kI][kV]) {
  for (auto& row : acc) {
    for (Doubles& sum : row) sum = doubles_set1(0.0);
  }
  for (int64_t j = 0; j < count; ++j) {
    Doubles b[kV];
    for (int v = 0; v < kV; ++v) b[v] = doubles_load(q + j * q_step + v * kDoubles);
    for (int i = 0; i < kI; ++i) {
      const Doubles a = doubles_set1(p[j * p_step + i * p_row]);
      for (int v = 0; v < kV; ++v) acc[i][v] = doubles_fma(a, b[v], acc[i][v]);
    }
  }
}

template <int kV>
inline void gram_block(const double* x, int64_t rows, int64_t stride, int64_t i0, int64_t j0,
                       double* partial, int64_t ld) {
  Doubles acc[kBlockRows][kV];
  outer_block(x + i0, stride, 1, x + j0, stride, rows, acc);
  for (int i = 0; i < kBlockRows; ++i) {
    for (int v = 0; v < kV; ++v) {
      double* g = partial + (i0 + i) * ld + j0 + v * kDoubles;
      doubles_store(g, doubles_load(g) + acc[i][v]);
    }
  }
}

// partial += x^T x for x [rows, r]; past column r it collects what lies there, nobody reads it.
inline void gram_tall(const double* x, int64_t rows, int64_t stride, int64_t r, double* partial,
                      Ahead ahead) {
  const int64_t ld = padded(r), steps = ceil_div(r, kBlockRows);
  const int64_t lines = (ahead.lines() + steps - 1) / steps;
  for (int64_t i = 0; i < r; i += kBlockRows) {
    ahead.fetch(lines);
    int64_t j = i / kDoubles * kDoubles;
    while (j < r) {
      if (j % (2 * kDoubles) == 0 && j + kDoubles < r) {
        gram_block<2>(x, rows, stride, i, j, partial, ld);
        j += 2 * kDoubles;
      } else {
        gram_block<1>(x, rows, stride, i, j, partial, ld);
        j += kDoubles;
      }
    }
  }
}

// partial += x x^T for x [r, columns], columns a multiple of 16.
inline void gram_wide(const double* x, int64_t columns, int64_t stride, int64_t r, double* partial,
                      Ahead ahead) {
  const int64_t ld = padded(r), steps = ceil_div(r, kDotRows);
  const int64_t lines = (ahead.lines() + steps - 1) / steps;
  for (int64_t i0 = 0; i0 < r; i0 += kDotRows) {
    ahead.fetch(lines);
    for (int64_t j0 = i0 / kDotColumns * kDotColumns; j0 < r; j0 += kDotColumns) {
      Doubles acc[kDotRows][kDotColumns];
      for (auto& row : acc) {
        for (Doubles& sum : row) sum = doubles_set1(0.0);
      }
      for (int64_t c = 0; c < columns; c += kDoubles) {
        Doubles a[kDotRows];
        for (int i = 0; i < kDotRows; ++i) a[i] = doubles_load(x + (i0 + i) * stride + c);
        for (int j = 0; j < kDotColumns; ++j) {
          const Doubles b = doubles_load(x + (j0 + j) * stride + c);
          for (int i = 0; i < kDotRows; ++i) acc[i][j] = doubles_fma(a[i], b, acc[i][j]);
        }
      }
      for (int i = 0; i < kDotRows; ++i) {
        for (int j = 0; j < kDotColumns; ++j) {
          partial[(i0 + i) * ld + j0 + j] += doubles_sum(acc[i][j]);
        }
      }
    }
  }
}

constexpr int64_t kBlockWidth = kBlockColumns * kDoubles;

// Where a block goes: rows of scratch are padded, those of a result are not.
struct PaddedRows {
  double* data;
  int64_t stride;

  void store(int64_t i, int64_t j, int64_t, const Doubles (&row)[kBlockColumns]) const {
    for (int v = 0; v < kBlockColumns; ++v) {
      doubles_store(data + i * stride + j + v * kDoubles, row[v]);
    }
  }
};
struct ResultRows {
  float* data;
  int64_t stride;
  bool stream;  // whole cache lines alone

  void store(int64_t i, int64_t j, int64_t n, const Doubles (&row)[kBlockColumns]) const {
    float* out = data + i * stride + j;
    if (n < kBlockWidth) {
      for (int v = 0; v < kBlockColumns; ++v) {
        const int64_t rest = n - v * kDoubles;
        if (rest > 0) doubles_store_floats_n(out + v * kDoubles, row[v], min64(kDoubles, rest));
      }
    } else if (stream) {
      doubles_stream_floats(out, row[0], row[1]);
    } else {
      for (int v = 0; v < kBlockColumns; ++v) doubles_store_floats(out + v * kDoubles, row[v]);
    }
  }
};

// out[i, j] = sum over l < inner of p[l p_step + i p_row] q[l q_step + j] for i < rows, j < n. The
// rows of a block are finished before the next: streamed lines are whole in a moment.
template <class Out>
inline void multiply(const double* p, int64_t p_step, int64_t p_row, int64_t rows, const double* q,
                     int64_t q_step, int64_t inner, int64_t n, const Out& out, Ahead ahead = {}) {
  const int64_t steps = ceil_div(n, kBlockWidth) * ceil_div(rows, kBlockRows);
  const int64_t lines = (ahead.lines() + steps - 1) / steps;
  int64_t i = 0;
  for (; i + kBlockRows <= rows; i += kBlockRows) {
    for (int64_t j = 0; j < n; j += kBlockWidth) {
      Doubles acc[kBlockRows][kBlockColumns];
      ahead.fetch(lines);
      outer_block(p + i * p_row, p_step, p_row, q + j, q_step, inner, acc);
      for (int row = 0; row < kBlockRows; ++row) out.store(i + row, j, n - j, acc[row]);
    }
  }
  for (; i < rows; ++i) {
    for (int64_t j = 0; j < n; j += kBlockWidth) {
      Doubles acc[1][kBlockColumns];
      outer_block(p + i * p_row, p_step, p_row, q + j, q_step, inner, acc);
      out.store(i, j, n - j, acc[0]);
    }
  }
}

// A copy of the r x r matrix w with rows of whole vectors, its columns from n on zero.
inline void pad_columns(const double* w, int64_t r, int64_t n, double* out) {
  const int64_t ld = padded(r);
  for (int64_t i = 0; i < r; ++i) {
    for (int64_t j = 0; j < ld; ++j) out[i * ld + j] = j < n ? w[i * r + j] : 0.0;
  }
}

// The columns [c, c + n) of a wide factor; returns n rounded up, the columns there being zero.
inline int64_t widen_wide(const LowRankFactor& f, int64_t c, int64_t n, double* x) {
  for (int64_t i = 0; i < f.r; ++i) {
    widen(f.data, f.dtype, i * f.length + c, n, x + i * kWidePiece);
  }
  return round_up(n, 16);
}

void gram(const LowRankFactor& f, int64_t begin, int64_t end, const double* inverse,
          double* partial, double* scratch) {
  const int64_t r = f.r, ld = padded(r), piece = f.wide ? kWidePiece : tall_piece(r);
  double* x = scratch;
  double* q = x + piece_doubles(r);
  double* t = q + piece_doubles(r);
  if (inverse) pad_columns(inverse, r, r, t);
  std::memset(partial, 0, static_cast<size_t>(ld * ld) * sizeof(double));
  for (int64_t start = begin; start < end; start += piece) {
    const int64_t n = min64(piece, end - start);
    const Ahead ahead = ahead_of(f, start + piece, end, piece);
    if (f.wide) {
      const int64_t columns = widen_wide(f, start, n, x);
      if (inverse) multiply(t, ld, 1, r, x, kWidePiece, r, columns, PaddedRows{q, kWidePiece});
      gram_wide(inverse ? q : x, columns, kWidePiece, r, partial, ahead);
    } else {
      widen(f.data, f.dtype, start * r, n * r, x);
      if (inverse) multiply(x, 1, r, n, t, ld, r, r, PaddedRows{q, ld});
      gram_tall(inverse ? q : x, n, inverse ? ld : r, r, partial, ahead);
    }
  }
}

void combine(const double* inverse, const double* w, int64_t r, int64_t rank, double* t,
             double* scratch) {
  const int64_t ld = padded(r);
  pad_columns(w, r, rank, scratch);
  multiply(inverse, 1, r, r, scratch, ld, r, ld, PaddedRows{t, ld});
}

void rotate(const LowRankFactor& f, int64_t begin, int64_t end, const double* t, int64_t k,
            bool stream, float* out, double* scratch) {
  const int64_t r = f.r, ld = padded(r), piece = f.wide ? kWidePiece : tall_piece(r);
  const int64_t stride = f.wide ? f.length : k;
  stream = stream && reinterpret_cast<uintptr_t>(out) % 64 == 0 && stride % 16 == 0;
  for (int64_t start = begin; start < end; start += piece) {
    const int64_t n = min64(piece, end - start);
    const Ahead ahead = ahead_of(f, start + piece, end, piece);
    const ResultRows rows{out + start * (f.wide ? 1 : k), stride, stream};
    if (f.wide) {
      widen_wide(f, start, n, scratch);
      multiply(t, ld, 1, k, scratch, kWidePiece, r, n, rows, ahead);
    } else {
      widen(f.data, f.dtype, start * r, n * r, scratch);
      multiply(scratch, 1, r, n, t, ld, r, k, rows, ahead);
    }
  }
  if (stream) stream_fence();  // streamed stores are not ordered otherwise
}

}  // namespace low_rank
}  // namespace
}  // namespace peftkern
