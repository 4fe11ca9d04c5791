// Grouped linear layers on exactly sized buffers, against plain loops in float64.
#include "peftkern/grouped_linear.h"

#include <cmath>
#include <numeric>
#include <string>
#include <vector>

#include "native_data.h"

namespace {

// The strides of a stack [E, r, columns]: as it is, transposed, or with the groups innermost.
FactorStrides strides_of(int layout, int64_t E, int64_t r, int64_t columns) {
  if (layout == 0) return {r * columns, columns, 1};
  if (layout == 1) return {r * columns, 1, r};
  return {1, E, r * E};
}

struct Case {
  int64_t E, T, R, end, N, K, r;
  bool gathered;
  Buffer<int32_t> offsets, rows;

  static int64_t sum(const std::vector<int64_t>& sizes) {
    return std::accumulate(sizes.begin(), sizes.end(), int64_t{0});
  }
  // Rows past the end hold no row of x.
  Case(const std::vector<int64_t>& sizes, int64_t past, int64_t N, int64_t K, int64_t r)
      : E(static_cast<int64_t>(sizes.size())),
        R(sum(sizes) + past),
        end(sum(sizes)),
        N(N),
        K(K),
        r(r),
        gathered(rng() % 2),
        offsets(E),
        rows(R) {
    T = gathered ? 7 : R;
    for (int64_t e = 0; e < E; ++e) {
      offsets[e] = static_cast<int32_t>(sizes[e]) + (e > 0 ? offsets[e - 1] : 0);
    }
    for (int64_t i = 0; i < end; ++i) rows[i] = static_cast<int32_t>(rng() % T);
  }
  RowGroups groups() { return {R, E, T, offsets.data(), gathered ? rows.data() : nullptr}; }
  int64_t source(int64_t i) const { return gathered && i < end ? rows[i] : i; }
  int64_t group(int64_t i) const {
    int64_t e = 0;
    while (e < E && i >= offsets[e]) ++e;
    return e;
  }
  // How many groups before this one have rows.
  int64_t place(int64_t group) const {
    int64_t count = 0;
    for (int64_t e = 0; e < group; ++e) count += offsets[e] > (e > 0 ? offsets[e - 1] : 0);
    return count;
  }
};

void expect_near(const char* what, Isa isa, double got, const Sum& sum, double rounding) {
  if (!(std::fabs(got - sum.value) <= rounding * std::fabs(sum.value) + 1e-5 * sum.size)) {
    fail(std::string(isa_name(isa)) + " grouped " + what);
  }
}

void check_linear(Isa isa, Case& c, DType dtype, DType factors) {
  const bool transposed = rng() % 2, shared = rng() % 2, dense = rng() % 4 > 0;
  const int64_t weights = dense ? (shared ? 1 : c.E) * c.N * c.K : 0;
  Values x(dtype, c.T * c.K, 1), w(dtype, weights, 1), bias(dtype, c.E * c.N);
  Values y(dtype, c.R * c.N, static_cast<int64_t>(rng() % 3));
  const bool collected[] = {rng() % 2 == 0, rng() % 2 == 0};  // of a and of b
  const int64_t counts[] = {collected[0] ? c.place(c.E) : c.E, collected[1] ? c.place(c.E) : c.E};
  Values a(factors, counts[0] * c.r * c.K), b(factors, counts[1] * c.r * c.N);
  Buffer<float> base(c.R * c.N), s(c.R * c.r);
  x.randomize(), w.randomize(), bias.randomize(), a.randomize(), b.randomize();
  for (int64_t i = 0; i < base.size(); ++i) base[i] = uniform();
  GroupedLinearArgs args;
  args.groups = c.groups(), args.N = c.N, args.K = c.K, args.r = c.r;
  args.x = x.data(), args.dtype = dtype, args.weight = dense ? w.data() : nullptr;
  args.transposed = transposed, args.weight_row = transposed ? c.N : c.K;
  args.weight_group = shared ? 0 : c.N * c.K;
  args.base = rng() % 2 ? base.data() : nullptr, args.bias = rng() % 2 ? bias.data() : nullptr;
  args.a = {a.data(), factors, strides_of(static_cast<int>(rng() % 3), counts[0], c.r, c.K),
            collected[0]};
  args.b = {b.data(), factors, strides_of(static_cast<int>(rng() % 3), counts[1], c.r, c.N),
            collected[1]};
  args.s_scale = 0.5f, args.scaling = 1.5f, args.s = s.data(), args.y = y.data();
  args.threads = static_cast<int>(pick({1, 2, 3}));
  grouped_linear(isa, args);
  const auto at = [&](const Values& v, const FactorStack& f, int64_t e, int64_t j, int64_t k) {
    const FactorStrides& by = f.strides;
    const int64_t i = (f.collected ? c.place(e) : e) * by.group + j * by.rank + k * by.column;
    return static_cast<double>(v.at(i));
  };
  for (int64_t i = 0; i < c.R; ++i) {
    const int64_t e = c.group(i), from = c.source(i) * c.K;
    const bool inside = i < c.end;
    for (int64_t j = 0; j < c.r; ++j) {
      Sum sum;
      for (int64_t k = 0; inside && k < c.K; ++k) {
        sum += 0.5 * x.at(from + k) * at(a, args.a, e, j, k);
      }
      expect_near("s", isa, s[i * c.r + j], sum, 1e-5);
    }
    for (int64_t n = 0; n < c.N; ++n) {
      Sum sum;
      const int64_t first = shared ? 0 : e * c.N * c.K;
      for (int64_t k = 0; inside && dense && k < c.K; ++k) {
        sum += x.at(from + k) * w.at(first + (transposed ? k * c.N + n : n * c.K + k));
      }
      for (int64_t j = 0; inside && j < c.r; ++j) {
        sum += 1.5 * s[i * c.r + j] * at(b, args.b, e, j, n);
      }
      if (inside && args.base) sum += base[i * c.N + n];
      if (inside && args.bias) sum += bias.at(e * c.N + n);
      expect_near("y", isa, y.at(i * c.N + n), sum, dtype == DType::kFloat32 ? 1e-5 : 0.004);
    }
  }
}

void check_outer(Isa isa, Case& c, DType dtype, DType factors) {
  Values x(dtype, c.T * c.K, 1), g(factors, c.E * c.r * c.K);
  Buffer<float> s(c.R * c.r);
  x.randomize();
  for (int64_t i = 0; i < s.size(); ++i) s[i] = uniform();
  GroupedOuterArgs args;
  args.groups = c.groups(), args.K = c.K, args.r = c.r;
  args.x = x.data(), args.dtype = dtype, args.s = s.data(), args.scale = 0.5f;
  args.g = g.data(), args.g_dtype = factors;
  args.strides = strides_of(static_cast<int>(rng() % 3), c.E, c.r, c.K);
  args.threads = static_cast<int>(pick({1, 2, 3}));
  grouped_outer(isa, args);
  for (int64_t e = 0; e < c.E; ++e) {
    for (int64_t j = 0; j < c.r; ++j) {
      for (int64_t k = 0; k < c.K; ++k) {
        Sum sum;
        for (int64_t i = e > 0 ? c.offsets[e - 1] : 0; i < c.offsets[e]; ++i) {
          sum += 0.5 * s[i * c.r + j] * x.at(c.source(i) * c.K + k);
        }
        const FactorStrides& by = args.strides;
        expect_near("gradient", isa, g.at(e * by.group + j * by.rank + k * by.column), sum,
                    factors == DType::kFloat32 ? 1e-5 : 0.004);
      }
    }
  }
}

// Groups with rows come to a stack of their own.
void check_collect(Case& c, DType dtype) {
  const int64_t columns = c.K * c.r;
  Values in(dtype, c.E * columns, 1), stack(dtype, c.place(c.E) * columns);
  in.randomize();
  GroupedCollectArgs args;
  args.groups = c.groups(), args.columns = columns, args.dtype = dtype;
  args.in = in.data(), args.out = stack.data(), args.threads = static_cast<int>(pick({1, 3}));
  grouped_collect(args);
  for (int64_t e = 0; e < c.E; ++e) {
    const int64_t place = c.place(e);
    for (int64_t i = 0; i < columns && c.place(e + 1) > place; ++i) {
      if (stack.at(place * columns + i) != in.at(i * c.E + e)) fail("grouped_collect differs");
    }
  }
}

void check_malformed(Isa isa) {
  Buffer<int32_t> offsets(3), descending(3), negative(3), beyond(3), rows(5), outside(5);
  Buffer<float> x(5 * 8), w(3 * 4 * 8), a(3 * 2 * 8), b(3 * 2 * 4), s(5 * 2), y(5 * 4);
  for (int32_t i = 0; i < 3; ++i) {
    offsets[i] = 1 + 2 * i, descending[i] = 3 - i, negative[i] = i - 1, beyond[i] = 2 + 2 * i;
  }
  for (int32_t i = 0; i < 5; ++i) rows[i] = i, outside[i] = i + 1;
  for (int64_t i = 0; i < y.size(); ++i) y[i] = 0.0f;
  GroupedLinearArgs good;
  good.groups = {5, 3, 5, offsets.data(), rows.data()};
  good.N = 4, good.K = 8, good.r = 2, good.x = x.data(), good.weight = w.data();
  good.weight_group = 32, good.weight_row = 8, good.s = s.data(), good.y = y.data();
  good.a = {a.data(), DType::kFloat32, {16, 8, 1}};
  good.b = {b.data(), DType::kFloat32, {8, 4, 1}};
  constexpr int64_t kLarge = int64_t{1} << 60;
  const Damages<GroupedLinearArgs> damages = {
      [&](auto& args) { args.groups.offsets = descending.data(); },
      [&](auto& args) { args.groups.offsets = negative.data(); },
      [&](auto& args) { args.groups.offsets = beyond.data(); },
      [&](auto& args) { args.groups.offsets = nullptr; },
      [&](auto& args) { args.groups.rows = outside.data(); },
      [](auto& args) { args.groups.rows = nullptr, args.groups.T = 4; },
      [](auto& args) { args.groups.T = kLarge; },
      [](auto& args) { args.groups.R = kLarge; },
      [](auto& args) { args.groups.R = -1; },
      [](auto& args) { args.groups.E = -1; },
      [](auto& args) { args.N = -1; },
      [](auto& args) { args.N = kLarge; },
      [](auto& args) { args.K = kLarge; },
      [](auto& args) { args.r = -1; },
      [](auto& args) { args.r = kLarge; },
      [](auto& args) { args.threads = 0; },
      [](auto& args) { args.x = nullptr; },
      [](auto& args) { args.s = nullptr; },
      [](auto& args) { args.a.data = nullptr; },
      [](auto& args) { args.b.data = nullptr; },
      [](auto& args) { args.a.strides.rank = -1; },
      [](auto& args) { args.a.strides.group = kLarge; },
      [](auto& args) { args.b.strides.column = kLarge; },
      [](auto& args) { args.weight_group = kLarge; },
      [](auto& args) { args.weight_row = -1; },
  };
  check_refusals("grouped_linear", good, damages,
                 [&](const auto& args) { grouped_linear(isa, args); });
  for (int64_t i = 0; i < y.size(); ++i) {
    if (y[i] != 0.0f) fail("a refused grouped_linear wrote to y");
  }
  GroupedOuterArgs outer;
  outer.groups = good.groups, outer.K = 8, outer.r = 2, outer.x = x.data(), outer.s = s.data();
  outer.g = a.data(), outer.strides = good.a.strides;
  const Damages<GroupedOuterArgs> others = {
      [&](auto& args) { args.groups.offsets = beyond.data(); },
      [&](auto& args) { args.groups.rows = outside.data(); },
      [](auto& args) { args.K = kLarge; },
      [](auto& args) { args.r = -1; },
      [](auto& args) { args.threads = 0; },
      [](auto& args) { args.x = nullptr; },
      [](auto& args) { args.s = nullptr; },
      [](auto& args) { args.g = nullptr; },
      [](auto& args) { args.strides.rank = -1; },
      [](auto& args) { args.strides.group = kLarge; },
  };
  check_refusals("grouped_outer", outer, others,
                 [&](const auto& args) { grouped_outer(isa, args); });
  GroupedCollectArgs moved;
  moved.groups = good.groups, moved.columns = 16, moved.in = a.data(), moved.out = w.data();
  const Damages<GroupedCollectArgs> wrong = {
      [&](auto& args) { args.groups.offsets = beyond.data(); },
      [](auto& args) { args.groups.E = -1; },
      [](auto& args) { args.columns = -1; },
      [](auto& args) { args.columns = kLarge; },
      [](auto& args) { args.threads = 0; },
      [](auto& args) { args.in = nullptr; },
      [](auto& args) { args.out = nullptr; },
  };
  check_refusals("grouped_collect", moved, wrong, [](const auto& args) { grouped_collect(args); });
}

}  // namespace

void check_grouped_linear(Isa isa) {
  for (int i = 0; i < 60; ++i) {
    const std::vector<int64_t> sizes = {0, pick({1, 2, 5}), 0, pick({6, 15, 16}),
                                        pick({17, 33, 70})};
    Case c(i == 0 ? std::vector<int64_t>{0, 0} : sizes, static_cast<int64_t>(rng() % 3),
           pick({1, 15, 16, 33, 70, 260}), pick({1, 3, 16, 33, 100, 259}),
           pick({0, 1, 3, 8, 16, 17}));
    for (DType dtype : {DType::kFloat32, DType::kBFloat16}) {
      check_linear(isa, c, dtype, rng() % 2 ? DType::kFloat32 : DType::kBFloat16);
      check_outer(isa, c, dtype, rng() % 2 ? DType::kFloat32 : DType::kBFloat16);
      check_collect(c, dtype);
    }
  }
  check_malformed(isa);
}
