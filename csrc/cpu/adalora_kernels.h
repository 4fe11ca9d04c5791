// AdaLoRA's passes over memory, compiled once per instruction set. Sixteen lanes run along rows of
// lora_A and along lora_B as it lies in memory.
#pragma once

#include "load_store.h"
#include "peftkern/adalora.h"

namespace peftkern {
namespace {
namespace adalora {

constexpr int64_t kRun = 4096;  // elements whose float32 lane sums go into one double

struct Ema {
  F32x16 beta1, rest1, beta2, rest2;
};

inline Ema make_ema(const ImportanceArgs& args) {
  // 1 - beta in double, then rounded: the scalars that torch multiplies by.
  return {f32_set1(static_cast<float>(args.beta1)), f32_set1(static_cast<float>(1 - args.beta1)),
          f32_set1(static_cast<float>(args.beta2)), f32_set1(static_cast<float>(1 - args.beta2))};
}

// Both EMAs of n <= 16 elements, in place; returns s = ipt unc, zero in the lanes beyond n. Where
// the gradient is not finite they stay as they are, and s is NaN: one bad step costs that step
// alone.
inline F32x16 update(const Ema& ema, const void* w, const void* g, DType dtype, int64_t i,
                     float* ipt, float* unc, int n) {
  const F32x16 sensitivity =
      g ? f32_abs(f32_mul(load_any(w, dtype, i, n), load_any(g, dtype, i, n))) : f32_zero();
  const F32x16 old_ipt = n == 16 ? f32_load(ipt) : f32_load_n(ipt, n);
  const F32x16 old_unc = n == 16 ? f32_load(unc) : f32_load_n(unc, n);
  const F32x16 ipt_ema = f32_add(f32_mul(ema.beta1, old_ipt), f32_mul(ema.rest1, sensitivity));
  const F32x16 distance = f32_abs(f32_fma(f32_set1(-1.0f), ipt_ema, sensitivity));
  const F32x16 unc_ema = f32_add(f32_mul(ema.beta2, old_unc), f32_mul(ema.rest2, distance));
  const F32x16 new_ipt = f32_where_finite(sensitivity, ipt_ema, old_ipt);
  const F32x16 new_unc = f32_where_finite(sensitivity, unc_ema, old_unc);
  if (n == 16) {
    f32_store(ipt, new_ipt);
    f32_store(unc, new_unc);
  } else {
    f32_store_n(ipt, new_ipt, n);
    f32_store_n(unc, new_unc, n);
  }
  return f32_where_finite(sensitivity, f32_mul(new_ipt, new_unc), f32_set1(bits_float(0x7fc00000)));
}

// The sum of s over `count` elements that follow one another from element `first` on.
inline double update_run(const Ema& ema, const void* w, const void* g, DType dtype, int64_t first,
                         int64_t count, float* ipt, float* unc) {
  double sum = 0.0;
  for (int64_t start = 0; start < count; start += kRun) {
    const int64_t stop = min64(count, start + kRun);
    F32x16 acc = f32_zero();
    for (int64_t i = start; i < stop; i += 16) {
      const int n = static_cast<int>(min64(16, stop - i));
      acc = f32_add(acc, update(ema, w, g, dtype, first + i, ipt + i, unc + i, n));
    }
    sum += static_cast<double>(f32_sum(acc));
  }
  return sum;
}

inline void update_rows(const ImportanceArgs& args, const Ema& ema, const ImportanceTask& task) {
  const Triplets& t = args.layers[task.layer];
  for (int64_t j = task.begin; j < task.end; ++j) {
    const int64_t e = task.state + j, a = task.state + t.r + j * t.K;
    const double row =
        update_run(ema, t.lora_A, t.grad_A, args.dtype, j * t.K, t.K, args.ipt + a, args.unc + a);
    const double value =
        update_run(ema, t.lora_E, t.grad_E, args.dtype, j, 1, args.ipt + e, args.unc + e);
    task.sums[j] = value + row / static_cast<double>(t.K);
  }
}

// Rows of lora_B are r long, so the column of a lane repeats every r / gcd(r, 16) vectors: with as
// many sums (at least eight, to hide the latency of adding) each lane stays with one column.
inline void update_columns(const ImportanceArgs& args, const Ema& ema, const ImportanceTask& task) {
  const Triplets& t = args.layers[task.layer];
  int64_t common = 16;
  while (t.r % common) common /= 2;
  const int64_t least = t.r / common, period = round_up(8, least);
  const int64_t first = task.begin * t.r, count = (task.end - task.begin) * t.r;
  float* ipt = args.ipt + task.state + t.r + t.r * t.K + first;
  float* unc = args.unc + task.state + t.r + t.r * t.K + first;
  Scratch scratch(period * 64);
  float* acc = scratch.floats();
  std::memset(acc, 0, static_cast<size_t>(period) * 64);
  int64_t phase = 0;
  for (int64_t i = 0; i < count; i += 16) {
    const int n = static_cast<int>(min64(16, count - i));
    const F32x16 s = update(ema, t.lora_B, t.grad_B, args.dtype, first + i, ipt + i, unc + i, n);
    f32_store(acc + phase * 16, f32_add(f32_load(acc + phase * 16), s));
    phase = phase + 1 == period ? 0 : phase + 1;
  }
  for (int64_t j = 0; j < t.r; ++j) task.sums[j] = 0.0;
  for (int64_t i = 0, j = 0; i < period * 16; ++i) {
    task.sums[j] += static_cast<double>(acc[i]);
    j = j + 1 == t.r ? 0 : j + 1;
  }
}

void importance(const ImportanceArgs& args, const ImportanceTask* tasks, int64_t count) {
  const Ema ema = make_ema(args);
  parallel_for(args.threads, count, [&](int64_t i, int) {
    tasks[i].columns ? update_columns(args, ema, tasks[i]) : update_rows(args, ema, tasks[i]);
  });
}

constexpr int64_t kGramRun = 1024;  // products whose float32 sums go into one double

// gram[r, r] += products of rows [i0, i0 + kI) and [j0, j0 + kJ) of x[r, length].
template <int kI, int kJ>
void gram_rows_tile(const GramMatrix& m, DType dtype, int64_t i0, int64_t j0, double* gram) {
  for (int64_t start = 0; start < m.length; start += kGramRun) {
    F32x16 acc[kI][kJ];
    for (auto& row : acc) {
      for (F32x16& sum : row) sum = f32_zero();
    }
    const int64_t stop = min64(m.length, start + kGramRun);
    for (int64_t k = start; k < stop; k += 16) {
      const int n = static_cast<int>(min64(16, stop - k));
      F32x16 right[kJ];
      for (int j = 0; j < kJ; ++j) right[j] = load_any(m.x, dtype, (j0 + j) * m.length + k, n);
      for (int i = 0; i < kI; ++i) {
        const F32x16 left = load_any(m.x, dtype, (i0 + i) * m.length + k, n);
        for (int j = 0; j < kJ; ++j) acc[i][j] = f32_fma(left, right[j], acc[i][j]);
      }
    }
    for (int i = 0; i < kI; ++i) {
      for (int j = 0; j < kJ; ++j) {
        gram[(i0 + i) * m.r + j0 + j] += static_cast<double>(f32_sum(acc[i][j]));
      }
    }
  }
}

// The lower triangle in tiles of four by four; rows left over go one by one.
inline void gram_rows(const GramMatrix& m, DType dtype, double* gram) {
  for (int64_t i = 0; i < m.r; i += i + 4 <= m.r ? 4 : 1) {
    int64_t j = 0;
    if (i + 4 <= m.r) {
      for (; j <= i; j += 4) gram_rows_tile<4, 4>(m, dtype, i, j, gram);
    } else {
      for (; j + 4 <= i; j += 4) gram_rows_tile<1, 4>(m, dtype, i, j, gram);
      for (; j <= i; ++j) gram_rows_tile<1, 1>(m, dtype, i, j, gram);
    }
  }
}

// Rows of x[length, r] are copied in float32, as they lie, to a block with room for one vector
// after its end: a full vector may start at any column of any row, and what it reads of the next
// row is dropped.
constexpr int64_t kBlockRows = 256;

inline void load_block(const GramMatrix& m, DType dtype, int64_t row, int64_t rows, float* block) {
  const int64_t count = rows * m.r;
  for (int64_t i = 0; i < count; i += 16) {
    f32_store(block + i,
              load_any(m.x, dtype, row * m.r + i, static_cast<int>(min64(16, count - i))));
  }
  f32_store(block + count, f32_zero());
}

// gram[r, r] += products of columns [i0, i0 + kI) and the sixteen from j0 on.
template <int kI>
void gram_columns_tile(const float* block, int64_t rows, int64_t r, int64_t i0, int64_t j0,
                       double* gram) {
  F32x16 acc[kI];
  for (F32x16& sum : acc) sum = f32_zero();
  for (int64_t k = 0; k < rows; ++k) {
    const F32x16 right = f32_load(block + k * r + j0);
    for (int i = 0; i < kI; ++i) acc[i] = f32_fma(f32_set1(block[k * r + i0 + i]), right, acc[i]);
  }
  float sums[16];
  for (int i = 0; i < kI; ++i) {
    f32_store(sums, acc[i]);
    for (int64_t j = j0; j < min64(j0 + 16, r); ++j) {
      gram[(i0 + i) * r + j] += static_cast<double>(sums[j - j0]);
    }
  }
}

inline void gram_columns(const GramMatrix& m, DType dtype, float* block, double* gram) {
  for (int64_t row = 0; row < m.length; row += kBlockRows) {
    const int64_t rows = min64(kBlockRows, m.length - row);
    load_block(m, dtype, row, rows, block);
    for (int64_t j = 0; j < m.r; j += 16) {
      int64_t i = j;  // the lower triangle
      for (; i + 8 <= m.r; i += 8) gram_columns_tile<8>(block, rows, m.r, i, j, gram);
      for (; i + 4 <= m.r; i += 4) gram_columns_tile<4>(block, rows, m.r, i, j, gram);
      for (; i < m.r; ++i) gram_columns_tile<1>(block, rows, m.r, i, j, gram);
    }
  }
}

// residual = Gram - I, both triangles from the lower one; returns its sum of squares.
inline double store_residual(const GramMatrix& m, const double* gram) {
  double squares = 0.0;
  for (int64_t i = 0; i < m.r; ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      const double value = gram[i * m.r + j] - (i == j ? 1.0 : 0.0);
      squares += (i == j ? 1.0 : 2.0) * value * value;
      m.residual[i * m.r + j] = m.residual[j * m.r + i] = static_cast<float>(value);
    }
  }
  return squares;
}

inline int64_t widest(const GramArgs& args) {
  int64_t r = 0;
  for (int64_t i = 0; i < args.count; ++i) r = args.matrices[i].r > r ? args.matrices[i].r : r;
  return r;
}

void gram(const GramArgs& args) {
  const int64_t r = widest(args), gram_bytes = round_up(r * r * 8, 64);
  const int64_t per_thread = gram_bytes + round_up((kBlockRows * r + 16) * 4, 64);
  Scratch scratch(args.threads * per_thread);
  parallel_for(args.threads, args.count, [&](int64_t i, int thread) {
    const GramMatrix& m = args.matrices[i];
    char* own = static_cast<char*>(scratch.data) + thread * per_thread;
    double* sums = reinterpret_cast<double*>(own);
    std::memset(sums, 0, static_cast<size_t>(m.r * m.r) * 8);
    m.columns ? gram_columns(m, args.dtype, reinterpret_cast<float*>(own + gram_bytes), sums)
              : gram_rows(m, args.dtype, sums);
    args.norms[i] = store_residual(m, sums);
  });
}

// grad[j0 : j0 + kR, sixteen columns from k on] = factor[r, stride] x
template <int kR>
void spread_rows_tile(const GramMatrix& m, DType dtype, const float* factor, int64_t stride,
                      int64_t j0, int64_t k, int n) {
  F32x16 acc[kR];
  for (F32x16& sum : acc) sum = f32_zero();
  for (int64_t i = 0; i < m.r; ++i) {
    const F32x16 x = load_any(m.x, dtype, i * m.length + k, n);
    for (int j = 0; j < kR; ++j) {
      acc[j] = f32_fma(f32_set1(factor[(j0 + j) * stride + i]), x, acc[j]);
    }
  }
  for (int j = 0; j < kR; ++j) store_any(m.grad, dtype, (j0 + j) * m.length + k, acc[j], n);
}

inline void spread_rows(const GramMatrix& m, DType dtype, const float* factor, int64_t stride) {
  for (int64_t k = 0; k < m.length; k += 16) {
    const int n = static_cast<int>(min64(16, m.length - k));
    int64_t j = 0;
    for (; j + 8 <= m.r; j += 8) spread_rows_tile<8>(m, dtype, factor, stride, j, k, n);
    for (; j + 4 <= m.r; j += 4) spread_rows_tile<4>(m, dtype, factor, stride, j, k, n);
    for (; j < m.r; ++j) spread_rows_tile<1>(m, dtype, factor, stride, j, k, n);
  }
}

// out[kM rows, sixteen columns from j on] = block factor
template <int kM>
void spread_columns_tile(const float* block, const float* factor, int64_t stride, int64_t r,
                         int64_t row, int64_t j, float* out) {
  F32x16 acc[kM];
  for (F32x16& sum : acc) sum = f32_zero();
  for (int64_t i = 0; i < r; ++i) {
    const F32x16 f = f32_load(factor + i * stride + j);
    for (int m = 0; m < kM; ++m) acc[m] = f32_fma(f32_set1(block[(row + m) * r + i]), f, acc[m]);
  }
  for (int m = 0; m < kM; ++m) f32_store(out + (row + m) * r + j, acc[m]);
}

// The last vector of a row writes into the next row as well: going from the last columns to the
// first, and down the rows, whatever it spoils there is written later.
inline void spread_columns(const GramMatrix& m, DType dtype, const float* factor, int64_t stride,
                           float* block, float* out) {
  for (int64_t start = 0; start < m.length; start += kBlockRows) {
    const int64_t rows = min64(kBlockRows, m.length - start), count = rows * m.r;
    load_block(m, dtype, start, rows, block);
    for (int64_t j = stride - 16; j >= 0; j -= 16) {
      int64_t row = 0;
      for (; row + 8 <= rows; row += 8) {
        spread_columns_tile<8>(block, factor, stride, m.r, row, j, out);
      }
      for (; row < rows; ++row) spread_columns_tile<1>(block, factor, stride, m.r, row, j, out);
    }
    for (int64_t i = 0; i < count; i += 16) {
      const int n = static_cast<int>(min64(16, count - i));
      store_any(m.grad, dtype, start * m.r + i, f32_load(out + i), n);
    }
  }
}

void gram_backward(const GramArgs& args) {
  const int64_t r = widest(args), factor_bytes = r * round_up(r, 16) * 4;
  const int64_t block_bytes = round_up((kBlockRows * r + 16) * 4, 64);
  const int64_t per_thread = factor_bytes + 2 * block_bytes;
  Scratch scratch(args.threads * per_thread);
  parallel_for(args.threads, args.count, [&](int64_t t, int thread) {
    const GramMatrix& m = args.matrices[t];
    char* own = static_cast<char*>(scratch.data) + thread * per_thread;
    float* factor = reinterpret_cast<float*>(own);
    const int64_t stride = round_up(m.r, 16);
    std::memset(factor, 0, static_cast<size_t>(m.r * stride) * 4);
    for (int64_t i = 0; i < m.r; ++i) {
      for (int64_t j = 0; j < m.r; ++j) {
        factor[i * stride + j] = static_cast<float>(m.scale * m.residual[i * m.r + j]);
      }
    }
    float* block = reinterpret_cast<float*>(own + factor_bytes);
    float* out = reinterpret_cast<float*>(own + factor_bytes + block_bytes);
    m.columns ? spread_columns(m, args.dtype, factor, stride, block, out)
              : spread_rows(m, args.dtype, factor, stride);
  });
}

}  // namespace adalora
}  // namespace
}  // namespace peftkern
