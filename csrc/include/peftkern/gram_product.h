// A weight times a few vectors, and its transpose times the result, on one thread of a CPU: a step
// of block Lanczos on W^T W. Torch-free.
//
// Both products come from one reading of W: a panel of 64 rows is put in float32 into a cache, and
// multiplied from there twice. 4 m n width FLOP for 4, 2 or 0.56 bytes a weight: at width 24 that
// is 24 FLOP a byte of a dense float32 weight, so the products are bound by arithmetic, and the
// next panel is fetched from memory meanwhile.
#pragma once

#include "peftkern/nf4.h"

namespace peftkern {

// y[width, m] = x[width, n] W^T, z[width, n] = y W and squares[m], those of the norms of the rows
// of W; float32 sums over 1024 columns, or 64 rows, are added up.
struct GramProductArgs {
  int64_t m = 0, n = 0, width = 0;
  const void* weight = nullptr;  // dense, of `dtype`; null: `w` holds the weight
  NF4View w;
  DType dtype = DType::kFloat32;
  const float* x = nullptr;
  float* y = nullptr;
  float* z = nullptr;        // may be null
  float* squares = nullptr;  // may be null
};
void gram_product(Isa isa, const GramProductArgs& args);

}  // namespace peftkern
