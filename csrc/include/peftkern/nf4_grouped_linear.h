// out = x W^T or x W for groups of rows, each with its own W out of a stack in NF4. Torch-free.
//
// A stack [E, N, K] is E N rows of K weights, of which a group takes N: the kernels are those of
// nf4_lora_linear over pieces of many groups in one call. Bytes: 0.56 per weight of each group that
// has rows (block size 64), decoded once for all rows of a group up to a piece.
#pragma once

#include "peftkern/nf4.h"
#include "peftkern/row_groups.h"

namespace peftkern {

struct NF4GroupedArgs {
  RowGroups groups;
  int64_t N = 0, K = 0;
  NF4View w;  // [E, N, K], or [1, N, K] for all groups
  // The product is over the first dimension: dx = dy W of [N, K], or y = x W of weights stored
  // transposed.
  bool over_rows = false;
  const void* x = nullptr;  // [T, K]; over_rows: [T, N]; float32 or bfloat16
  DType dtype = DType::kFloat32;
  void* out = nullptr;  // [R, N]; over_rows: [R, K]; rows of no group are zero
  DType out_dtype = DType::kFloat32;
  int64_t few_rows = 0;  // as in NF4LinearArgs
  int threads = 1;
};

// Throws std::invalid_argument naming what does not fit.
void nf4_grouped_linear(Isa isa, const NF4GroupedArgs& args);

}  // namespace peftkern
