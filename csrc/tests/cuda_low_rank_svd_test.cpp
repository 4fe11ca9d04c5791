// csrc/cuda/low_rank_svd.cu against the CPU's kernel and plain loops, on buffers of exactly the
// right size, under several orders of threads and with little shared memory.
#include "peftkern/cuda_low_rank_svd.h"

#include <cmath>
#include <functional>
#include <limits>
#include <stdexcept>
#include <string>

#include "cuda_test.h"
#include "native_data.h"
#include "peftkern/low_rank_svd.h"

namespace {

constexpr int kSweeps = 20;

struct Svd {
  Svd(int64_t count, int64_t r, bool vectors)
      : sigma(count * r),
        left(vectors ? count * r * r : 0),
        right(vectors ? count * r * r : 0),
        info(count) {}
  Buffer<double> sigma, left, right;
  Buffer<int64_t> info;
};

bool same(const Buffer<double>& a, const Buffer<double>& b) {
  for (int64_t i = 0; i < a.size(); ++i) {
    if (!(a[i] == b[i] || (std::isnan(a[i]) && std::isnan(b[i])))) return false;
  }
  return true;
}

std::string describe(int64_t count, int64_t r, int64_t limit) {
  return "jacobi_svd: " + std::to_string(count) + " matrices, r = " + std::to_string(r) +
         ", shared memory " + std::to_string(limit);
}

void run(Buffer<double>& cores, int64_t count, int64_t r, bool vectors, int64_t limit, Svd& svd) {
  Buffer<double> workspace(count * cuda_jacobi_workspace(r, vectors, limit));
  CudaJacobiSvdArgs args;
  args.cores = cores.data(), args.count = count, args.r = r, args.sweeps = kSweeps;
  args.sigma = svd.sigma.data(), args.info = svd.info.data();
  if (vectors) args.left = svd.left.data(), args.right = svd.right.data();
  args.workspace = workspace.data(), args.workspace_len = workspace.size();
  args.shared_limit = limit;
  if (cuda_jacobi_svd(args, nullptr)) fail(describe(count, r, limit) + ": not launched");
}

// Orthonormal vectors, their product, and the CPU's values.
void check_against_cpu(const Buffer<double>& cores, int64_t count, int64_t r, int64_t skip,
                       const Svd& svd, const std::string& what) {
  Svd cpu(count, r, true);
  Buffer<double> finite(cores.size());
  for (int64_t i = 0; i < cores.size(); ++i) finite[i] = std::isfinite(cores[i]) ? cores[i] : 0.0;
  JacobiSvdArgs args;
  args.cores = finite.data(), args.count = count, args.r = r, args.sweeps = kSweeps;
  args.sigma = cpu.sigma.data(), args.info = cpu.info.data();
  args.left = cpu.left.data(), args.right = cpu.right.data();
  jacobi_svd(Isa::kScalar, args);
  for (int64_t m = 0; m < count; ++m) {
    if (m == skip) continue;
    const double top = cpu.sigma[m * r];
    const auto fits = [&](double got, double wanted, double size, const char* name) {
      if (!(std::fabs(got - wanted) <= 1e-13 * size)) fail(what + ": " + name);
    };
    const auto left = [&](int64_t i, int64_t j) { return svd.left[(m * r + i) * r + j]; };
    const auto right = [&](int64_t i, int64_t j) { return svd.right[(m * r + i) * r + j]; };
    if (svd.info[m] != 0) fail(what + ": info");
    for (int64_t i = 0; i < r; ++i) {
      fits(svd.sigma[m * r + i], cpu.sigma[m * r + i], top, "sigma");
      for (int64_t j = 0; j < r; ++j) {
        double unit_left = 0.0, unit_right = 0.0, product = 0.0;
        for (int64_t k = 0; k < r; ++k) {
          unit_left += left(k, i) * left(k, j);
          unit_right += right(k, i) * right(k, j);
          product += left(i, k) * svd.sigma[m * r + k] * right(j, k);
        }
        fits(unit_left, i == j, 1.0, "left");
        if (svd.sigma[m * r + i] > 0.0 && svd.sigma[m * r + j] > 0.0) {
          fits(unit_right, i == j, 1.0, "right");
        }
        fits(product, cores[(m * r + i) * r + j], top, "product");
      }
    }
  }
}

void check_jacobi(int64_t r, int64_t limit) {
  const int64_t count = pick({1, 2, 3}), bad = rng() % 3 ? -1 : count - 1;
  Buffer<double> cores(count * r * r, static_cast<int64_t>(rng() % 3));
  const double grade = std::pow(10.0, -static_cast<double>(rng() % 12) / static_cast<double>(r));
  for (int64_t i = 0; i < cores.size(); ++i) {
    cores[i] = uniform() * std::pow(grade, static_cast<double>(i / r % r));
  }
  if (r > 2 && rng() % 2) {
    for (int64_t i = 0; i < r; ++i) cores[i * r + 1] = cores[i * r];  // a column twice
  }
  if (bad >= 0) cores[bad * r * r + r / 2] = std::numeric_limits<double>::quiet_NaN();
  const std::string what = describe(count, r, limit);
  Svd first(count, r, true), values(count, r, false);
  emulation::set_schedule(0);
  run(cores, count, r, true, limit, first);
  check_against_cpu(cores, count, r, bad, first, what);
  if (bad >= 0 &&
      (first.info[bad] != -1 || !std::isnan(first.sigma[bad * r]) ||
       !std::isnan(first.left[bad * r * r]) || !std::isnan(first.right[(bad + 1) * r * r - 1]))) {
    fail(what + ": a matrix with NaN has results");
  }
  for (uint32_t schedule = 1; schedule < emulation::kSchedules; ++schedule) {
    Svd other(count, r, true);
    emulation::set_schedule(schedule);
    run(cores, count, r, true, limit, other);
    if (!same(first.sigma, other.sigma) || !same(first.left, other.left) ||
        !same(first.right, other.right)) {
      fail(what + ": the order of threads changes the result");
    }
  }
  run(cores, count, r, false, limit, values);
  if (!same(first.sigma, values.sigma)) fail(what + ": other values without vectors");
  emulation::set_schedule(0);
}

void check_roots(int64_t r, int64_t limit) {
  const int64_t length = r + 5, dead = r > 3 ? 2 : -1;
  Buffer<double> factor(length * r), gram(r * r);
  for (int64_t i = 0; i < factor.size(); ++i) factor[i] = i % r == dead ? 0.0 : uniform();
  for (int64_t i = 0; i < r * r; ++i) {
    gram[i] = 0.0;
    for (int64_t k = 0; k < length; ++k) gram[i] += factor[k * r + i / r] * factor[k * r + i % r];
  }
  Buffer<double> first(r * r);
  for (uint32_t schedule = 0; schedule < emulation::kSchedules; ++schedule) {
    Buffer<double> root(r * r), inverse(r * r), norms(r);
    Buffer<double> workspace(cuda_jacobi_workspace(r, true, limit));
    CudaGramRootsArgs args;
    args.grams = gram.data(), args.count = 1, args.r = r, args.roots = root.data();
    args.inverses = inverse.data(), args.norms = norms.data(), args.workspace = workspace.data();
    args.workspace_len = workspace.size(), args.shared_limit = limit;
    emulation::set_schedule(schedule);
    if (cuda_gram_roots(args, nullptr)) fail("gram_roots: not launched");
    for (int64_t i = 0; i < r * r; ++i) {
      double sum = 0.0;
      for (int64_t t = 0; t < r; ++t) sum += root[t * r + i / r] * root[t * r + i % r];
      sum *= norms[i / r] * norms[i % r];
      if (!(std::fabs(sum - gram[i]) <= 1e-11)) fail("gram_roots: product");
      double unit = 0.0;  // root D inverse
      for (int64_t k = 0; k < r; ++k)
        unit += root[i / r * r + k] * norms[k] * inverse[k * r + i % r];
      const int64_t rank = dead < 0 ? r : r - 1;
      const double wanted = i / r == i % r && i / r < rank ? 1.0 : 0.0;
      if (!(std::fabs(unit - wanted) <= 1e-9)) fail("gram_roots: inverse");
      if (schedule == 0) first[i] = root[i];
    }
    if (!same(first, root)) fail("gram_roots: the order of threads changes the result");
  }
  emulation::set_schedule(0);
}

void check_malformed() {
  const int64_t r = 70, limit = 60000;
  Buffer<double> cores(r * r), workspace(cuda_jacobi_workspace(r, true, limit));
  Svd svd(1, r, true);
  for (int64_t i = 0; i < r * r; ++i) cores[i] = i % (r + 1) == 0;
  CudaJacobiSvdArgs good;
  good.cores = cores.data(), good.count = 1, good.r = r, good.sweeps = 1;
  good.sigma = svd.sigma.data(), good.left = svd.left.data(), good.right = svd.right.data();
  good.info = svd.info.data(), good.workspace = workspace.data();
  good.workspace_len = workspace.size(), good.shared_limit = limit;
  const Damages<CudaJacobiSvdArgs> damages = {
      [](auto& a) { a.count = -1; },       [](auto& a) { a.count = int64_t{1} << 55; },
      [](auto& a) { a.r = 129; },          [](auto& a) { a.r = -1; },
      [](auto& a) { a.sweeps = -1; },      [](auto& a) { a.cores = nullptr; },
      [](auto& a) { a.sigma = nullptr; },  [](auto& a) { a.left = nullptr; },
      [](auto& a) { a.info = nullptr; },   [](auto& a) { a.workspace = nullptr; },
      [](auto& a) { --a.workspace_len; },  [](auto& a) { a.shared_limit = -1; },
      [](auto& a) { a.shared_limit = 9; },
  };
  const auto call = [](const CudaJacobiSvdArgs& args) { return cuda_jacobi_svd(args, nullptr); };
  if (call(good)) fail("jacobi_svd: not launched");
  check_refusals("jacobi_svd", good, damages, call);
}

}  // namespace

void check_cuda_low_rank_svd() {
  for (int64_t r : {1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 24, 31, 32, 33, 47}) check_jacobi(r, 0);
  for (int64_t limit : {0, 60000, 46000, 4000}) {  // all of Q, most, some, and not even X
    check_jacobi(66, limit);
    check_roots(65, limit);
  }
  for (int64_t r : {1, 2, 3, 16, 17, 40}) check_roots(r, 0);
  check_malformed();
}
