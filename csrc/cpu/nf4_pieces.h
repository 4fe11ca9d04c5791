// What the NF4 products' kernels are called with: the rows of one call or of many groups, cut into
// pieces that fit the caches, as many at a time as scratch memory is meant for.
#pragma once

#include "peftkern/nf4_lora_linear.h"

namespace peftkern {

// Rows [first, first + M) of `out` and the [N, K] of W that they meet, which begins at W's row
// `weight`.
struct NF4Piece {
  int64_t first = 0, M = 0, weight = 0;
  int64_t start = 0;  // packed rows of the pieces before it in its wave
};

// The pieces of one call, the largest first.
struct NF4Wave {
  const NF4Piece* pieces;
  int64_t count, rows;  // packed rows of all
};

// What the kernels read: of one call, whose pieces are all of its rows, or of one over groups,
// whose low-rank update is added elsewhere.
struct NF4PieceArgs : NF4LinearArgs {
  const int32_t* rows = nullptr;  // row i of x or dy is this one of `in`; null: i
  DType out_dtype = DType::kFloat32;
};

// The products of checked arguments over groups, which are pieces of any size: x W^T or dy W.
enum class NF4Product { kForward, kBackward };
void nf4_groups(Isa isa, NF4Product product, const NF4PieceArgs& args, const NF4Piece* groups,
                int64_t count);

}  // namespace peftkern
