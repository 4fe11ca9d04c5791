// NF4 matrix products over groups of rows: argument checks, and the rows that are nobody's.
#include "peftkern/nf4_grouped_linear.h"

#include <cstring>
#include <vector>

#include "nf4_pieces.h"
#include "peftkern/checks.h"

namespace peftkern {
namespace {

// Returns the number of weights and the end of the last group.
std::pair<int64_t, int64_t> validate(const NF4GroupedArgs& args) {
  require(args.dtype != DType::kFloat16, "dtype: expected float32 or bfloat16");
  require(args.threads >= 1, "threads: expected at least 1");
  require(args.N >= 1 && args.K >= 1, "weight: expected at least one row and one column");
  const int64_t size = checked_mul(args.N, args.K, "weight: N x K");
  const bool shared = args.w.numel == size;
  require(shared || args.w.numel == checked_mul(size, args.groups.E, "weight: E x N x K"),
          "weight: numel", args.w.numel, size, "values, or so many for each group");
  const RowGroups& groups = args.groups;
  // Twice what any address or padded copy needs, so that no later size can overflow.
  for (int64_t columns : {args.N, args.K}) {
    checked_mul(checked_mul(groups.T, columns, "x: T x columns"), 64, "x: bytes");
    checked_mul(checked_mul(groups.R, columns, "out: R x columns"), 64 * 32, "out: bytes");
  }
  validate(args.w);
  validate_rows(args.w, args.K);
  const int64_t end = validate(groups);
  require(end == 0 || args.x, "x: null pointer");
  require(groups.R == 0 || args.out, "out: null pointer");
  return {shared ? 1 : groups.E, end};
}

}  // namespace

void nf4_grouped_linear(Isa isa, const NF4GroupedArgs& args) {
  const auto [experts, end] = validate(args);
  NF4PieceArgs product;
  product.M = end, product.N = args.N, product.K = args.K;
  product.in = args.x, product.rows = args.groups.rows, product.dtype = args.dtype;
  product.out = args.out, product.out_dtype = args.out_dtype;
  product.w = args.w;
  product.few_rows = args.few_rows;
  product.threads = args.threads;
  std::vector<NF4Piece> pieces;
  for (int64_t e = 0, first = 0; e < experts; ++e) {
    const int64_t stop = experts == 1 ? end : args.groups.offsets[e];
    if (stop > first) pieces.push_back({first, stop - first, e * args.N});
    first = stop;
  }
  nf4_groups(isa, args.over_rows ? NF4Product::kBackward : NF4Product::kForward, product,
             pieces.data(), static_cast<int64_t>(pieces.size()));
  const int64_t row = (args.over_rows ? args.K : args.N) * itemsize(args.out_dtype);
  if (end < args.groups.R) {
    std::memset(static_cast<char*>(args.out) + end * row, 0,
                static_cast<size_t>((args.groups.R - end) * row));
  }
}

}  // namespace peftkern
