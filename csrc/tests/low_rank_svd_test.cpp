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

// A pair of factors and room for its results.
struct Pair {
  Pair(int64_t m, int64_t n, int64_t r)
      : b(rng() % 2 ? DType::kFloat32 : DType::kBFloat16, m * r, static_cast<int64_t>(rng() % 3)),
        a(rng() % 2 ? DType::kFloat32 : DType::kBFloat16, r * n, static_cast<int64_t>(rng() % 3)),
        width(std::min({r, m, n})),
        u(m * width),
        s(width),
        vh(width * n) {
    b.randomize(), a.randomize();
    args.b = b.data(), args.b_dtype = b.dtype(), args.m = m;
    args.a = a.data(), args.a_dtype = a.dtype(), args.n = n;
    args.u = u.data(), args.s = s.data(), args.vh = vh.data();
  }
  Values b, a;
  int64_t width;
  Buffer<float> u, s, vh;
  LowRankPair args;
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
        rank(count) {
    for (int64_t i = 0; i < count; ++i) {
      list.push_back(std::make_unique<Pair>(i % 3 == 1 ? 1 : m, i % 3 == 2 ? 1 : n, r));
      pairs.push_back(list.back()->args);
      scaling[i] = i % 2 ? -0.5 : 2.0;
    }
  }

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
  LowRankResultsArgs results_args() {
    LowRankResultsArgs args;
    args.pairs = pairs.data(), args.count = count, args.r = r, args.threads = 2;
    args.inverse = inverse.data(), args.left = left.data(), args.right = right.data();
    args.sigma = sigma.data(), args.scale = scale.data(), args.floor = floor.data();
    args.rank = rank.data(), args.info = info.data();
    return args;
  }
  LowRankSvdArgs all_args(int threads, bool stream) {
    LowRankSvdArgs args;
    args.pairs = pairs.data(), args.count = count, args.r = r, args.scaling = scaling.data();
    args.sweeps = 30, args.threads = threads, args.stream = stream;
    args.rank = rank.data(), args.info = info.data();
    return args;
  }
  std::vector<float> results() const {
    std::vector<float> all;
    for (const auto& pair : list) {
      for (const Buffer<float>* part : {&pair->u, &pair->s, &pair->vh}) {
        all.insert(all.end(), part->data(), part->data() + part->size());
      }
    }
    return all;
  }

  int64_t count, r;
  std::vector<std::unique_ptr<Pair>> list;
  std::vector<LowRankPair> pairs;
  Buffer<double> scaling, scale, floor, sigma, cores, inverse, left, right;
  Buffer<int64_t> info, rank;
};

void check_pair(Isa isa, const Problem& p, int64_t i) {
  const Pair& pair = *p.list[i];
  const int64_t m = pair.args.m, n = pair.args.n, r = p.r, k = pair.width;
  const auto fits = [&](double got, double wanted, double size, const char* what) {
    if (std::fabs(got - wanted) <= 1e-5 * size) return;
    fail(isa, std::string(what) + " m=" + std::to_string(m) + " n=" + std::to_string(n) +
                  " r=" + std::to_string(r));
  };
  fits(static_cast<double>(p.rank[i]), static_cast<double>(k), 1.0, "rank");
  for (int64_t x = 0; x < k; ++x) {
    for (int64_t y = 0; y <= x; ++y) {
      double left = 0.0, right = 0.0;
      for (int64_t row = 0; row < m; ++row) left += 1.0 * pair.u[row * k + x] * pair.u[row * k + y];
      for (int64_t c = 0; c < n; ++c) right += 1.0 * pair.vh[x * n + c] * pair.vh[y * n + c];
      fits(left, x == y, 1.0, "U is not orthonormal");
      fits(right, x == y, 1.0, "Vh is not orthonormal");
    }
  }
  for (int64_t row = 0; row < m; ++row) {
    for (int64_t c = 0; c < n; ++c) {
      double wanted = 0.0, got = 0.0;
      for (int64_t l = 0; l < r; ++l) {
        wanted += p.scaling[i] * pair.b.at(row * r + l) * pair.a.at(l * n + c);
      }
      for (int64_t l = 0; l < k; ++l)
        got += 1.0 * pair.s[l] * pair.u[row * k + l] * pair.vh[l * n + c];
      fits(got, wanted, k == 0 ? 0.0 : pair.s[0], "product");
    }
  }
}

void check_shape(Isa isa, int64_t count, int64_t m, int64_t n, int64_t r) {
  Problem p(count, m, n, r);
  low_rank_cores(isa, p.cores_args());
  jacobi_svd(isa, p.svd_args());
  for (int64_t i = 0; i < count; ++i) {
    if (p.info[i] != 0) fail(isa, "did not converge");
  }
  low_rank_results(isa, p.results_args());
  for (int64_t i = 0; i < count; ++i) check_pair(isa, p, i);
  const std::vector<float> steps = p.results();
  for (int threads : {1, 2, 3}) {
    for (const auto& pair : p.list) {
      for (int64_t i = 0; i < pair->u.size(); ++i) pair->u[i] = NAN;
      for (int64_t i = 0; i < pair->s.size(); ++i) pair->s[i] = NAN;
      for (int64_t i = 0; i < pair->vh.size(); ++i) pair->vh[i] = NAN;
    }
    low_rank_svd(isa, p.all_args(threads, threads != 2));
    if (p.results() != steps) fail(isa, "one call has other bits than the steps");
  }
  if (count == 0) return;
  p.info[0] = -1;
  low_rank_results(isa, p.results_args());
  const Buffer<float>& u = p.list[0]->u;
  for (int64_t i = 0; i < u.size(); ++i) {
    if (!std::isnan(u[i])) fail(isa, "info -1 is not NaN");
  }
}

void check_malformed(Isa isa) {
  using C = LowRankCoresArgs&;
  using S = JacobiSvdArgs&;
  using R = LowRankResultsArgs&;
  using A = LowRankSvdArgs&;
  using P = Problem&;
  const auto refuse = [&](const std::function<void(C, S, R, A, P)>& damage) {
    Problem p(2, 6, 7, 3);
    low_rank_cores(isa, p.cores_args());
    jacobi_svd(isa, p.svd_args());
    LowRankCoresArgs cores = p.cores_args();
    JacobiSvdArgs svd = p.svd_args();
    LowRankResultsArgs results = p.results_args();
    LowRankSvdArgs all = p.all_args(2, true);
    damage(cores, svd, results, all, p);
    int refused = 0;
    refused += rejected([&] { low_rank_cores(isa, cores); });
    refused += rejected([&] { jacobi_svd(isa, svd); });
    refused += rejected([&] { low_rank_results(isa, results); });
    refused += rejected([&] { low_rank_svd(isa, all); });
    if (refused == 0) fail(isa, "a malformed argument was accepted");
  };
  refuse([](C c, S, R, A, P) { c.r = -1; });
  refuse([](C c, S, R, A, P) { c.r = int64_t{1} << 40; });
  refuse([](C c, S, R, A, P) { c.count = -1; });
  refuse([](C c, S, R, A, P) { c.threads = 0; });
  refuse([](C c, S, R, A, P) { c.cores = nullptr; });
  refuse([](C c, S, R, A, P) { c.scaling = nullptr; });
  refuse([](C c, S, R, A, P) { c.pairs = nullptr; });
  refuse([](C, S, R, A, P p) { p.pairs[1].m = -1; });
  refuse([](C, S, R, A, P p) { p.pairs[1].n = int64_t{1} << 62; });
  refuse([](C, S, R, A, P p) { p.pairs[0].a = nullptr; });
  refuse([](C, S s, R, A, P) { s.left = nullptr; });
  refuse([](C, S s, R, A, P) { s.sweeps = -1; });
  refuse([](C, S s, R, A, P) { s.sigma = nullptr; });
  refuse([](C, S, R r, A, P) { r.left = nullptr; });
  refuse([](C, S, R r, A, P) { r.sigma = nullptr; });
  refuse([](C, S, R r, A, P) { r.rank = nullptr; });
  refuse([](C, S, R r, A, P) { r.inverse = nullptr; });
  refuse([](C, S, R, A, P p) { p.pairs[1].vh = nullptr; });
  refuse([](C, S, R, A, P p) { p.pairs[0].s = nullptr; });
  refuse([](C, S, R, A a, P) { a.r = -1; });
  refuse([](C, S, R, A a, P) { a.threads = 0; });
  refuse([](C, S, R, A a, P) { a.sweeps = -1; });
  refuse([](C, S, R, A a, P) { a.pairs = nullptr; });
  refuse([](C, S, R, A a, P) { a.scaling = nullptr; });
  refuse([](C, S, R, A a, P) { a.info = nullptr; });
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
}
