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
// Where a block has half a line of each of its rows, the results of a piece of a wide factor are
// staged and streamed row by row: a Zen 3 takes three times as long for halves of lines that are a
// multiple of 4096 bytes apart.
constexpr bool kStaged = kBlockColumns * kDoubles == 8;
constexpr int64_t kRotatedColumns = kStaged ? 128 : 64;

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

// The piece of a factor that comes next, prefetched while the current one is multiplied: a piece is
// read in one go and then worked on from the cache for microseconds, in which the processor's own
// prefetching sees nothing. A line at a time, as many at once would wait for each other.
struct Ahead {
  const char* data = nullptr;  // null: nothing comes
  int64_t stride = 0, item = 0;

  void fetch(int64_t row, int64_t column) const {
    __builtin_prefetch(data + row * stride + column * item);
  }
};

// Rows [start, start + count) of a tall factor, or those columns of a wide one, if it has them all.
inline Ahead ahead_of(const LowRankFactor& f, int64_t start, int64_t count) {
  if (start + count > f.length) return {};
  const int64_t item = f.dtype == DType::kFloat32 ? 4 : 2;
  const char* data = static_cast<const char*>(f.data) + start * item * (f.wide ? 1 : f.r);
  return {data, item * (f.wide ? f.length : f.r), item};
}

// acc[i][v] = sum over j < count of p[j p_step + i p_row] q[j q_step + vector v].
template <int kI, int kV, class Each>
inline void outer_block(const double* p, int64_t p_step, int64_t p_row, const double* q,
                        int64_t q_step, int64_t count, Doubles (&acc)[kI][kV], const Each& each) {
  for (auto& row : acc) {
    for (Doubles& sum : row) sum = doubles_set1(0.0);
  }
  for (int64_t j = 0; j < count; ++j) {
    each(j);
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
                       double* partial, int64_t ld, const Ahead& ahead) {
  Doubles acc[kBlockRows][kV];
  const auto block = [&](const auto& each) {
    outer_block(x + i0, stride, 1, x + j0, stride, rows, acc, each);
  };
  // The first block of sixteen columns asks for these columns of the next piece.
  if (ahead.data && i0 % 16 == 0 && j0 == i0) {
    block([&](int64_t row) { ahead.fetch(row, i0); });
  } else {
    block([](int64_t) {});
  }
  for (int i = 0; i < kBlockRows; ++i) {
    for (int v = 0; v < kV; ++v) {
      double* g = partial + (i0 + i) * ld + j0 + v * kDoubles;
      doubles_store(g, doubles_load(g) + acc[i][v]);
    }
  }
}

// partial += x^T x for x [rows, r]; past column r it collects what lies there, nobody reads it.
inline void gram_tall(const double* x, int64_t rows, int64_t stride, int64_t r, double* partial,
                      const Ahead& ahead) {
  const int64_t ld = padded(r);
  for (int64_t i = 0; i < r; i += kBlockRows) {
    int64_t j = i / kDoubles * kDoubles;
    while (j < r) {
      if (j % (2 * kDoubles) == 0 && j + kDoubles < r) {
        gram_block<2>(x, rows, stride, i, j, partial, ld, ahead);
        j += 2 * kDoubles;
      } else {
        gram_block<1>(x, rows, stride, i, j, partial, ld, ahead);
        j += kDoubles;
      }
    }
  }
}

// partial += x x^T for x [r, columns], columns a multiple of 16. Each block of sums asks for its
// share of the rows of the next piece.
inline void gram_wide(const double* x, int64_t columns, int64_t stride, int64_t r, double* partial,
                      const Ahead& ahead) {
  const int64_t ld = padded(r), side = ceil_div(r, kDotColumns);
  const int64_t share = ceil_div(r, side * (side + 1) / 2);
  int64_t next = ahead.data ? 0 : r;
  for (int64_t i0 = 0; i0 < r; i0 += kDotRows) {
    for (int64_t j0 = i0 / kDotColumns * kDotColumns; j0 < r; j0 += kDotColumns) {
      Doubles acc[kDotRows][kDotColumns];
      for (auto& row : acc) {
        for (Doubles& sum : row) sum = doubles_set1(0.0);
      }
      const int64_t last = min64(r, next + share);
      for (int64_t c = 0; c < columns; c += 16) {
        for (int64_t row = next; row < last; ++row) ahead.fetch(row, c);
        for (int64_t v = c; v < c + 16; v += kDoubles) {
          Doubles a[kDotRows];
          for (int i = 0; i < kDotRows; ++i) a[i] = doubles_load(x + (i0 + i) * stride + v);
          for (int j = 0; j < kDotColumns; ++j) {
            const Doubles b = doubles_load(x + (j0 + j) * stride + v);
            for (int i = 0; i < kDotRows; ++i) acc[i][j] = doubles_fma(a[i], b, acc[i][j]);
          }
        }
      }
      next = last;
      for (int i = 0; i < kDotRows; ++i) {
        for (int j = 0; j < kDotColumns; ++j) {
          partial[(i0 + i) * ld + j0 + j] += doubles_sum(acc[i][j]);
        }
      }
    }
  }
}

constexpr int64_t kBlockWidth = kBlockColumns * kDoubles;

// Where a block goes: rows of scratch are padded, those of a result are not. Loops over the block
// are unrolled: it has to stay in registers.
struct PaddedRows {
  double* data;
  int64_t stride;

  template <int kI>
  void store(int64_t i, int64_t j, int64_t, const Doubles (&acc)[kI][kBlockColumns]) const {
#pragma GCC unroll 16
    for (int e = 0; e < kI * kBlockColumns; ++e) {
      double* out = data + (i + e / kBlockColumns) * stride + j + e % kBlockColumns * kDoubles;
      doubles_store(out, acc[e / kBlockColumns][e % kBlockColumns]);
    }
  }
};
struct ResultRows {
  float* data;
  int64_t stride;
  bool stream;  // whole cache lines alone

  template <int kI>
  void store(int64_t i, int64_t j, int64_t n, const Doubles (&acc)[kI][kBlockColumns]) const {
    float* out = data + i * stride + j;
    if (n < kBlockWidth) {
      double rest[kI * kBlockWidth];
      PaddedRows{rest, kBlockWidth}.store(0, 0, n, acc);
      for (int row = 0; row < kI; ++row) {
        for (int64_t column = 0; column < n; ++column) {
          out[row * stride + column] = static_cast<float>(rest[row * kBlockWidth + column]);
        }
      }
    } else if (stream) {
#pragma GCC unroll 16
      for (int row = 0; row < kI; ++row) {
        doubles_stream_floats(out + row * stride, acc[row][0], acc[row][1]);
      }
    } else {
#pragma GCC unroll 16
      for (int row = 0; row < kI; ++row) {
        doubles_store_floats(out + row * stride, acc[row][0]);
        doubles_store_floats(out + row * stride + kDoubles, acc[row][1]);
      }
    }
  }
};

// out[i, j] = sum over l < inner of p[l p_step + i p_row] q[l q_step + j] for i < rows, j < n. The
// rows of a block are finished before the next: streamed lines are whole in a moment.
template <class Out>
inline void multiply(const double* p, int64_t p_step, int64_t p_row, int64_t rows, const double* q,
                     int64_t q_step, int64_t inner, int64_t n, const Out& out) {
  const auto none = [](int64_t) {};
  int64_t i = 0;
  for (; i + kBlockRows <= rows; i += kBlockRows) {
    for (int64_t j = 0; j < n; j += kBlockWidth) {
      Doubles acc[kBlockRows][kBlockColumns];
      outer_block(p + i * p_row, p_step, p_row, q + j, q_step, inner, acc, none);
      out.store(i, j, n - j, acc);
    }
  }
  for (; i < rows; ++i) {
    for (int64_t j = 0; j < n; j += kBlockWidth) {
      Doubles acc[1][kBlockColumns];
      outer_block(p + i * p_row, p_step, p_row, q + j, q_step, inner, acc, none);
      out.store(i, j, n - j, acc);
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
inline int64_t widen_wide(const LowRankFactor& f, int64_t c, int64_t n, double* x, int64_t stride) {
  for (int64_t i = 0; i < f.r; ++i) {
    widen(f.data, f.dtype, i * f.length + c, n, x + i * stride);
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
    const Ahead ahead = ahead_of(f, start + piece, piece);
    if (f.wide) {
      const int64_t columns = widen_wide(f, start, n, x, kWidePiece);
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

// As `multiply`, past the caches; `staged` has room for rows x n floats, n is a multiple of 16.
inline void multiply_staged(const double* p, int64_t p_step, int64_t rows, const double* q,
                            int64_t q_step, int64_t inner, int64_t n, float* staged, float* out,
                            int64_t stride) {
  multiply(p, p_step, 1, rows, q, q_step, inner, n, ResultRows{staged, n, false});
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < n; j += 16)
      f32_stream(out + i * stride + j, f32_load(staged + i * n + j));
  }
}

void rotate(const LowRankFactor& f, int64_t begin, int64_t end, const double* t, int64_t k,
            bool stream, float* out, double* scratch) {
  const int64_t r = f.r, ld = padded(r), stride = f.wide ? f.length : k;
  const int64_t piece = f.wide ? kRotatedColumns : round_up(ceil_div(1024, r), kBlockRows);
  stream = stream && reinterpret_cast<uintptr_t>(out) % 64 == 0 && stride % 16 == 0;
  for (int64_t start = begin; start < end; start += piece) {
    const int64_t n = min64(piece, end - start);
    const ResultRows rows{out + start * (f.wide ? 1 : k), stride, stream};
    if (f.wide) {
      const Ahead ahead = ahead_of(f, start + piece, piece);
      for (int64_t l = 0; ahead.data && l < r; ++l) {
        for (int64_t c = 0; c < piece; c += 16) ahead.fetch(l, c);
      }
      widen_wide(f, start, n, scratch, piece);
      if (kStaged && stream) {
        float* staged = reinterpret_cast<float*>(scratch + r * piece);
        multiply_staged(t, ld, k, scratch, piece, r, n, staged, rows.data, stride);
      } else {
        multiply(t, ld, 1, k, scratch, piece, r, n, rows);
      }
    } else {
      widen(f.data, f.dtype, start * r, n * r, scratch);
      multiply(scratch, 1, r, n, t, ld, r, k, rows);
    }
  }
  if (stream) stream_fence();  // streamed stores are not ordered otherwise
}

}  // namespace low_rank
}  // namespace
}  // namespace peftkern
