// Row norms of a weight plus its low-rank update on the CPU, for DoRA. Torch-free.
//
// The sum W + B A is formed sixteen columns at a time in registers and squared there: N K itemsize
// bytes (NF4: 0.56 a weight) against 2 N K (r + 1) FLOP. The factored form |w|^2 + 2 b.(A w) +
// b^T A A^T b has the same FLOPs for an uncached |w|^2, and cancels where the update undoes the
// row.
#pragma once

#include "peftkern/nf4.h"

namespace peftkern {

// norm[N] = |W[N, K] + b[N, r] a[r, K]| of each row; sums in float32 over 256 columns at a time,
// then in double.
struct DoraNormArgs {
  int64_t N = 0, K = 0, r = 0;
  const void* weight = nullptr;  // dense, of `dtype`; null: `w` holds the weight
  NF4View w;                     // decoded to values of `dtype`
  DType dtype = DType::kFloat32;
  const float* a = nullptr;
  const float* b = nullptr;
  float* norm = nullptr;
  int threads = 1;
};
void dora_norm(Isa isa, const DoraNormArgs& args);

}  // namespace peftkern
