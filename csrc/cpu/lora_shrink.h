// s = x a^T for a few rows of a: dot products of four rows of x with four of a, sixteen lanes along
// K. Compiled once per instruction set.
#pragma once

#include "nf4_panel.h"
#include "peftkern/lora_linear.h"

namespace peftkern {
namespace {

template <int kM, int kR>
void shrink_tile(const LoraShrinkArgs& args, int64_t m0, int64_t j0) {
  F16 acc[kM][kR];
  for (auto& row : acc) {
    for (F16& sum : row) sum = f16_zero();
  }
  const int64_t K = args.K;
  for (int64_t k = 0; k < K; k += 16) {
    const int n = static_cast<int>(min64(16, K - k));
    F16 a[kR];
    for (int j = 0; j < kR; ++j) {
      const float* p = args.a + (j0 + j) * K + k;
      a[j] = n == 16 ? f16_load(p) : f16_load_n(p, n);
    }
    for (int m = 0; m < kM; ++m) {
      const F16 x = load_any(args.x, args.dtype, (m0 + m) * K + k, n);
      for (int j = 0; j < kR; ++j) acc[m][j] = f16_fma(x, a[j], acc[m][j]);
    }
  }
  for (int m = 0; m < kM; ++m) {
    for (int j = 0; j < kR; ++j) args.s[(m0 + m) * args.r + j0 + j] = f16_sum(acc[m][j]);
  }
}

template <int kM>
void shrink_rows(const LoraShrinkArgs& args, int64_t m0, int64_t begin, int64_t end) {
  int64_t j = begin;
  for (; j + 4 <= end; j += 4) shrink_tile<kM, 4>(args, m0, j);
  for (; j < end; ++j) shrink_tile<kM, 1>(args, m0, j);
}

void shrink(const LoraShrinkArgs& args) {
  constexpr int64_t kM = 8, kR = 8;  // of a task
  const int64_t groups = (args.r + kR - 1) / kR;
  auto task = [&](int64_t t, int) {
    const int64_t begin = t % groups * kR, end = min64(args.r, begin + kR);
    int64_t m = t / groups * kM;
    const int64_t stop = min64(args.M, m + kM);
    for (; m + 4 <= stop; m += 4) shrink_rows<4>(args, m, begin, end);
    for (; m < stop; ++m) shrink_rows<1>(args, m, begin, end);
  };
  parallel_for(args.threads, (args.M + kM - 1) / kM * groups, task);
}

}  // namespace
}  // namespace peftkern
