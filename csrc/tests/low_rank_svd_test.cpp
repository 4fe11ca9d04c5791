// The three steps of the low-rank SVD on heap buffers of exactly the right size, against plain
// loops in float64: orthonormal vectors, and a product that is the update.
#include "peftkern/low_rank_svd.h"

#include <algorithm>
#include <cstdio>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "native_data.h"

namespace {

[[noreturn]] void fail(Isa isa, const std::string& what) {
  ::fail(std::string(isa_name(isa)) + " low_rank_svd: " + what);
}

struct Factors {
  Factors(int64_t m, int64_t n, int64_t r)
      : b(rng() % 2 ? DType::kFloat32 : DType::kBFloat16, m * r, static_cast<int64_t>(rng() % 3)),
        a(rng() % 2 ? DType::kFloat32 : DType::kBFloat16, r * n, static_cast<int64_t>(rng() % 3)) {
    b.randomize(), a.randomize();
    pair.b = b.data(), pair.b_dtype = b.dtype(), pair.m = m;
    pair.a = a.data(), pair.a_dtype = a.dtype(), pair.n = n;
  }
  Values b, a;
  LowRankPair pair;
};

// A list of `count` pairs of rank r, m x n or 1 x n or m x 1, decomposed.
struct Problem {
  Problem(int64_t count, int64_t m, int64_t n, int64_t r)
      : count(count),
        r(r),
        scaling(count),
        scale(count),
        floor(count),
        sigma(count * r),
        cores(count * r * r),
        inverse(count * 2 * r * r),
        left(count * r * r),
        right(count * r * r),
        info(count),
        rank(count),
        u_offsets(count),
        vh_offsets(count) {
    for (int64_t i = 0; i < count; ++i) {
      factors.push_back(std::make_unique<Factors>(i % 3 == 1 ? 1 : m, i % 3 == 2 ? 1 : n, r));
      pairs.push_back(factors.back()->pair);
      scaling[i] = i % 2 ? -0.5 : 2.0;
      u_offsets[i] = u_len, u_len += pairs[i].m * width(i);
      vh_offsets[i] = vh_len, vh_len += pairs[i].n * width(i);
    }
  }
  int64_t width(int64_t i) const { return std::min({r, pairs[i].m, pairs[i].n}); }

  LowRankCoresArgs cores_args() {
    LowRankCoresArgs args;
    args.pairs = pairs.data(), args.count = count, args.r = r, args.threads = 2;
    args.scaling = scaling.data(), args.cores = cores.data(), args.inverse = inverse.data();
    args.scale = scale.data(), args.floor = floor.data(), args.info = info.data();
    return args;
  }
  JacobiSvdArgs svd_args() {
    JacobiSvdArgs args;
    args.cores = cores.data(), args.count = count, args.r = r, args.sweeps = 30, args.threads = 2;
    args.sigma = sigma.data(), args.left = left.data(), args.right = right.data();
    args.info = info.data();
    return args;
  }
  LowRankRotateArgs rotate_args(Buffer<float>& u, Buffer<float>& vh) {
    LowRankRotateArgs args;
    args.pairs = pairs.data(), args.count = count, args.r = r, args.threads = 2;
    args.inverse = inverse.data(), args.left = left.data(), args.right = right.data();
    args.rank = rank.data(), args.u = u.data(), args.u_len = u.size();
    args.u_offsets = u_offsets.data(), args.vh = vh.data(), args.vh_len = vh.size();
    args.vh_offsets = vh_offsets.data();
    return args;
  }

  int64_t count, r, u_len = 0, vh_len = 0;
  std::vector<std::unique_ptr<Factors>> factors;
  std::vector<LowRankPair> pairs;
  Buffer<double> scaling, scale, floor, sigma, cores, inverse, left, right;
  Buffer<int64_t> info, rank, u_offsets, vh_offsets;
};

void check_pair(Isa isa, Problem& p, int64_t i, const float* u, const float* vh) {
  const int64_t m = p.pairs[i].m, n = p.pairs[i].n, r = p.r, k = p.width(i);
  const auto fits = [&](double got, double wanted, double size, const char* what) {
    if (std::fabs(got - wanted) <= 1e-5 * size) return;
    fail(isa, std::string(what) + " m=" + std::to_string(m) + " n=" + std::to_string(n) +
                  " r=" + std::to_string(r));
  };
  for (int64_t x = 0; x < p.rank[i]; ++x) {
    for (int64_t y = 0; y <= x; ++y) {
      double left = 0.0, right = 0.0;
      for (int64_t row = 0; row < m; ++row) left += 1.0 * u[row * k + x] * u[row * k + y];
      for (int64_t c = 0; c < n; ++c) right += 1.0 * vh[x * n + c] * vh[y * n + c];
      fits(left, x == y, 1.0, "U is not orthonormal");
      fits(right, x == y, 1.0, "Vh is not orthonormal");
    }
  }
  for (int64_t row = 0; row < m; ++row) {
    for (int64_t c = 0; c < n; ++c) {
      double wanted = 0.0, got = 0.0;
      for (int64_t l = 0; l < r; ++l) {
        wanted += p.scaling[i] * p.factors[i]->b.at(row * r + l) * p.factors[i]->a.at(l * n + c);
      }
      for (int64_t l = 0; l < k; ++l) {
        got += p.scale[i] * p.sigma[i * r + l] * u[row * k + l] * vh[l * n + c];
      }
      fits(got, wanted, r == 0 ? 0.0 : p.scale[i] * p.sigma[i * r], "product");
    }
  }
}

void check_shape(Isa isa, int64_t count, int64_t m, int64_t n, int64_t r) {
  Problem p(count, m, n, r);
  low_rank_cores(isa, p.cores_args());
  jacobi_svd(isa, p.svd_args());
  for (int64_t i = 0; i < count; ++i) {
    if (p.info[i] != 0) fail(isa, "did not converge");
    p.rank[i] = p.width(i);
  }
  Buffer<float> u(p.u_len), vh(p.vh_len);
  low_rank_rotate(isa, p.rotate_args(u, vh));
  for (int64_t i = 0; i < count; ++i) {
    check_pair(isa, p, i, u.data() + p.u_offsets[i], vh.data() + p.vh_offsets[i]);
  }
  if (count == 0) return;
  p.rank[0] = -1;
  low_rank_rotate(isa, p.rotate_args(u, vh));
  if (u.size() > 0 && !std::isnan(u[0])) fail(isa, "rank -1 is not NaN");
}

void check_malformed(Isa isa) {
  const auto refuse = [&](const std::function<void(LowRankCoresArgs&, JacobiSvdArgs&,
                                                   LowRankRotateArgs&, Problem&)>& damage) {
    Problem p(2, 6, 7, 3);
    Buffer<float> u(p.u_len), vh(p.vh_len);
    p.rank[0] = p.rank[1] = 1;
    low_rank_cores(isa, p.cores_args());
    jacobi_svd(isa, p.svd_args());
    LowRankCoresArgs cores = p.cores_args();
    JacobiSvdArgs svd = p.svd_args();
    LowRankRotateArgs rotate = p.rotate_args(u, vh);
    damage(cores, svd, rotate, p);
    int refused = 0;
    refused += rejected([&] { low_rank_cores(isa, cores); });
    refused += rejected([&] { jacobi_svd(isa, svd); });
    refused += rejected([&] { low_rank_rotate(isa, rotate); });
    if (refused == 0) fail(isa, "a malformed argument was accepted");
  };
  using C = LowRankCoresArgs&;
  using S = JacobiSvdArgs&;
  using R = LowRankRotateArgs&;
  using P = Problem&;
  refuse([](C c, S, R, P) { c.r = -1; });
  refuse([](C c, S, R, P) { c.r = int64_t{1} << 40; });
  refuse([](C c, S, R, P) { c.count = -1; });
  refuse([](C c, S, R, P) { c.threads = 0; });
  refuse([](C c, S, R, P) { c.cores = nullptr; });
  refuse([](C c, S, R, P) { c.scaling = nullptr; });
  refuse([](C c, S, R, P) { c.pairs = nullptr; });
  refuse([](C, S, R, P p) { p.pairs[1].m = -1; });
  refuse([](C, S, R, P p) { p.pairs[1].n = int64_t{1} << 62; });
  refuse([](C, S, R, P p) { p.pairs[0].a = nullptr; });
  refuse([](C, S s, R, P) { s.left = nullptr; });
  refuse([](C, S s, R, P) { s.sweeps = -1; });
  refuse([](C, S s, R, P) { s.sigma = nullptr; });
  refuse([](C, S, R r, P) { r.u_len -= 1; });
  refuse([](C, S, R r, P) { r.vh = nullptr; });
  refuse([](C, S, R, P p) { p.vh_offsets[1] = INT64_MAX; });
  refuse([](C, S, R, P p) { p.u_offsets[0] = -1; });
  refuse([](C, S, R, P p) { p.rank[1] = 2; });
  refuse([](C, S, R, P p) { p.rank[0] = -2; });
}

}  // namespace

void check_low_rank_svd(Isa isa) {
  for (int64_t r : {1, 2, 3, 7, 8, 9, 15, 16, 17, 33}) {
    for (int64_t m : {1, 5, 16, 33, 200}) {
      check_shape(isa, pick({1, 2, 9}), m, pick({1, 17, 100}), r);
    }
  }
  check_shape(isa, 3, 1500, 30, 5);
  check_shape(isa, 2, 30, 2100, 16);
  check_shape(isa, 1, 70, 80, 70);
  check_shape(isa, 0, 1, 1, 4);
  check_shape(isa, 2, 5, 5, 0);
  check_malformed(isa);
  Buffer<float> pages(1 << 21);
  pages[0] = pages[(1 << 21) - 1] = 3.0f;
  map_pages(pages.data(), pages.size() * 4);
  if (pages[0] != 3.0f || pages[(1 << 21) - 1] != 3.0f) fail(isa, "map_pages changed a value");
}
