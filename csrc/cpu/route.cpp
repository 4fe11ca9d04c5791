// Pairs of token and expert, sorted by expert: argument checks and the sort.
#include "peftkern/route.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "peftkern/checks.h"

namespace peftkern {
namespace {

template <class Weight>
void put(const RouteArgs& args, int64_t pair, int64_t row) {
  static_cast<Weight*>(args.row_weights)[row] = static_cast<const Weight*>(args.weights)[pair];
}

template <class Id>
int64_t sort(const RouteArgs& args) {
  const Id* index = static_cast<const Id*>(args.index);
  const int64_t E = args.E, R = args.T * args.top;
  if (R > 0) {
    const int64_t smallest = *std::min_element(index, index + R);
    if (smallest < 0) return smallest;
  }
  const auto group = [&](int64_t pair) { return std::min(static_cast<int64_t>(index[pair]), E); };
  std::vector<int64_t> next(static_cast<size_t>(E) + 2);
  for (int64_t pair = 0; pair < R; ++pair) ++next[static_cast<size_t>(group(pair)) + 1];
  for (size_t e = 0; e < static_cast<size_t>(E); ++e) {
    next[e + 1] += next[e];
    args.offsets[e] = static_cast<int32_t>(next[e + 1]);
  }
  for (int64_t t = 0, pair = 0; t < args.T; ++t) {
    for (int64_t j = 0; j < args.top; ++j, ++pair) {
      const int64_t row = next[static_cast<size_t>(group(pair))]++;
      args.rows[row] = static_cast<int32_t>(t);
      args.inverse[pair] = row;
      if (!args.weights) continue;
      if (args.itemsize == 1) put<uint8_t>(args, pair, row);
      if (args.itemsize == 2) put<uint16_t>(args, pair, row);
      if (args.itemsize == 4) put<uint32_t>(args, pair, row);
      if (args.itemsize == 8) put<uint64_t>(args, pair, row);
    }
  }
  return 0;
}

}  // namespace

int64_t route(const RouteArgs& args) {
  require(args.E >= 1, "E: expected at least 1");
  const int64_t R = checked_mul(args.T, args.top, "T x top");
  require(R <= std::numeric_limits<int32_t>::max(), "T x top", R, "fewer than 2**31 pairs");
  checked_mul(args.E, 16, "E: bytes");
  const bool copied = args.itemsize >= 1 && args.itemsize <= 8;
  require(copied && (args.itemsize & (args.itemsize - 1)) == 0, "itemsize: expected 1, 2, 4 or 8");
  require(args.offsets, "offsets: null pointer");
  require(R == 0 || (args.index && args.rows && args.inverse),
          "index, rows, inverse: null pointer");
  require(R == 0 || !args.weights || args.row_weights, "row_weights: null pointer");
  return args.wide ? sort<int64_t>(args) : sort<int32_t>(args);
}

}  // namespace peftkern
