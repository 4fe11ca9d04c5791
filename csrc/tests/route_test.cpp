// Pairs of token and expert on exactly sized buffers, against std::stable_sort.
#include "peftkern/route.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "native_data.h"

namespace {

template <class Id>
void check_pairs() {
  const int64_t T = pick({0, 1, 3, 40}), top = pick({0, 1, 2, 8}), E = pick({1, 2, 5, 64});
  const int64_t R = T * top;
  Buffer<Id> index(R);
  Buffer<uint16_t> weights(R), row_weights(R);
  Buffer<int32_t> rows(R), offsets(E);
  Buffer<int64_t> inverse(R);
  for (int64_t i = 0; i < R; ++i) {  // E and E + 1 are other ranks'
    index[i] = static_cast<Id>(rng() % static_cast<uint64_t>(E + 2));
    weights[i] = static_cast<uint16_t>(rng());
  }
  RouteArgs args;
  args.T = T, args.top = top, args.E = E;
  args.index = index.data(), args.wide = sizeof(Id) == 8;
  args.weights = weights.data(), args.itemsize = 2;
  args.rows = rows.data(), args.offsets = offsets.data(), args.inverse = inverse.data();
  args.row_weights = row_weights.data();
  if (route(args) != 0) fail("route: an id below 0");
  const auto group = [&](int64_t pair) { return std::min(static_cast<int64_t>(index[pair]), E); };
  std::vector<int64_t> order(static_cast<size_t>(R));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return group(a) < group(b); });
  for (int64_t row = 0; row < R; ++row) {
    const int64_t pair = order[static_cast<size_t>(row)];
    if (rows[row] != pair / top || inverse[pair] != row || row_weights[row] != weights[pair]) {
      fail("route: a pair is in another place");
    }
  }
  for (int64_t e = 0; e < E; ++e) {
    const auto count =
        std::count_if(order.begin(), order.end(), [&](int64_t pair) { return group(pair) <= e; });
    if (offsets[e] != count) fail("route: offsets");
  }
}

void check_malformed() {
  Buffer<int64_t> index(2), inverse(2);
  Buffer<float> weights(2), row_weights(2);
  Buffer<int32_t> rows(2), offsets(1);
  index[0] = 0, index[1] = -3;
  RouteArgs good;
  good.T = 2, good.top = 1, good.E = 1, good.index = index.data();
  good.weights = weights.data(), good.row_weights = row_weights.data();
  good.rows = rows.data(), good.offsets = offsets.data(), good.inverse = inverse.data();
  if (route(good) != -3) fail("route: an id below 0 is not told");
  const Damages<RouteArgs> damages = {
      [](auto& args) { args.T = -1; },
      [](auto& args) { args.top = -1; },
      [](auto& args) { args.T = int64_t{1} << 31; },
      [](auto& args) { args.T = args.top = int64_t{1} << 32; },
      [](auto& args) { args.E = 0; },
      [](auto& args) { args.E = int64_t{1} << 61; },
      [](auto& args) { args.itemsize = 3; },
      [](auto& args) { args.index = nullptr; },
      [](auto& args) { args.rows = nullptr; },
      [](auto& args) { args.offsets = nullptr; },
      [](auto& args) { args.inverse = nullptr; },
      [](auto& args) { args.row_weights = nullptr; },
  };
  check_refusals<RouteArgs>("route", good, damages, [](const auto& args) { route(args); });
}

}  // namespace

void check_route() {
  for (int i = 0; i < 40; ++i) {
    check_pairs<int32_t>();
    check_pairs<int64_t>();
  }
  check_malformed();
}
