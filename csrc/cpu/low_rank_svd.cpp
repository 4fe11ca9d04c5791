// The low-rank SVD: argument checks and the order of the steps.
//
// Work is cut into tiles of fixed size, and the sums of a layer's tiles are added up in order, so
// that no bit depends on how many threads there are.
#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <new>
#include <utility>
#include <vector>

#include "kernels.h"
#include "peftkern/checks.h"
#include "peftkern/jacobi.h"
#include "tasks.h"

namespace peftkern {
namespace {

constexpr int64_t kTileRows = 1024;

void validate(int64_t count, int64_t r, int threads) {
  // With room for the tiles and for a matrix per lane.
  checked_mul(checked_mul(checked_mul(r, r, "r x r"), 1 << 16, "r x r"), count, "count x r x r");
  require(threads >= 1, "threads: expected at least 1");
}

void validate(const LowRankPair* pairs, int64_t count, int64_t r) {
  require(count == 0 || pairs, "pairs: null pointer");
  for (int64_t i = 0; i < count; ++i) {
    checked_mul(checked_mul(pairs[i].m, r, "lora_B: m x r"), 64, "lora_B: bytes");
    checked_mul(checked_mul(pairs[i].n, r, "lora_A: r x n"), 64, "lora_A: bytes");
    require(pairs[i].m * r == 0 || pairs[i].b, "lora_B: null pointer");
    require(pairs[i].n * r == 0 || pairs[i].a, "lora_A: null pointer");
  }
}

int64_t width(const LowRankPair& pair, int64_t r) { return min64(r, min64(pair.m, pair.n)); }

void validate_results(const LowRankPair* pairs, int64_t count, int64_t r, bool vectors) {
  for (int64_t i = 0; i < count; ++i) {
    if (width(pairs[i], r) == 0) continue;
    require(pairs[i].s, "s: null pointer");
    require(!vectors || (pairs[i].u && pairs[i].vh), "u, vh: null pointer");
  }
}

LowRankFactor factor_of(const LowRankPair* pairs, int64_t r, int64_t index) {
  const LowRankPair& pair = pairs[index / 2];
  if (index % 2) return {pair.a, pair.a_dtype, pair.n, r, true};
  return {pair.b, pair.b_dtype, pair.m, r, false};
}

struct Tile {
  int64_t factor, begin, end;
};

std::vector<Tile> tiles_of(const LowRankPair* pairs, int64_t r,
                           const std::vector<int64_t>& factors) {
  std::vector<Tile> tiles;
  for (int64_t index : factors) {
    const int64_t length = factor_of(pairs, r, index).length;
    for (int64_t begin = 0; begin < length; begin += kTileRows) {
      tiles.push_back({index, begin, min64(length, begin + kTileRows)});
    }
  }
  return tiles;
}

std::vector<int64_t> all_factors(int64_t count) {
  std::vector<int64_t> factors;
  for (int64_t i = 0; i < 2 * count; ++i) factors.push_back(i);
  return factors;
}

// Runs `task(index, scratch)` for every index, each thread with scratch of its own.
template <class Task>
void for_each(const LowRankKernels& kernels, int64_t r, int threads, int64_t tasks, Task task) {
  const int64_t per_thread = round_up(kernels.scratch_doubles(r), 64);
  const int used = static_cast<int>(min64(threads, tasks));
  Scratch scratch(used * per_thread * 8);
  parallel_for(used, tasks, [&](int64_t index, int thread) {
    task(index, static_cast<double*>(scratch.data) + thread * per_thread);
  });
}

// Decomposition of a factor: its Gram matrix and from that root, inverse and norms.
struct Decomposition {
  double* gram;
  double* root;
  double* inverse;
  double* norms;
  double kappa = 0.0;
  int64_t rank = 0;
};

class Cores {
 public:
  Cores(const LowRankKernels& kernels, const LowRankCoresArgs& args)
      : kernels_(kernels),
        args_(args),
        size_(args.r * args.r),
        memory_(args.count * 2 * (2 * size_ + args.r) * 8),
        factors_(static_cast<size_t>(2 * args.count)) {
    double* next = static_cast<double*>(memory_.data);
    for (int64_t i = 0; i < 2 * args.count; ++i) {
      Decomposition& d = factors_[static_cast<size_t>(i)];
      d.gram = next, next += size_;
      d.root = next, next += size_;
      d.norms = next, next += args.r;
      d.inverse = args.inverse + i * size_;
    }
  }

  void run() {
    const std::vector<int64_t> all = all_factors(args_.count);
    gram(all, false);
    parallel(2 * args_.count, [&](int64_t i, double* scratch) { first(i, scratch); });
    std::vector<int64_t> again;
    for (int64_t i : all) {
      if (args_.second_pass && factors_[i].kappa > kSecondPass) again.push_back(i);
    }
    if (!again.empty()) {
      gram(again, true);
      parallel(static_cast<int64_t>(again.size()),
               [&](int64_t i, double* scratch) { second(again[i], scratch); });
    }
    parallel(args_.count, [&](int64_t i, double*) { core(i); });
  }

 private:
  template <class Task>
  void parallel(int64_t tasks, Task task) {
    for_each(kernels_, args_.r, args_.threads, tasks, task);
  }

  void gram(const std::vector<int64_t>& which, bool of_q) {
    const std::vector<Tile> tiles = tiles_of(args_.pairs, args_.r, which);
    const int64_t ld = round_up(args_.r, kLowRankPad);
    Scratch partials(static_cast<int64_t>(tiles.size()) * ld * ld * 8);
    double* partial = static_cast<double*>(partials.data);
    parallel(static_cast<int64_t>(tiles.size()), [&](int64_t t, double* scratch) {
      const Tile& tile = tiles[t];
      kernels_.gram(factor_of(args_.pairs, args_.r, tile.factor), tile.begin, tile.end,
                    of_q ? factors_[tile.factor].inverse : nullptr, partial + t * ld * ld, scratch);
    });
    for (int64_t index : which) std::memset(factors_[index].gram, 0, size_ * 8);
    for (size_t t = 0; t < tiles.size(); ++t) {
      double* sum = factors_[tiles[t].factor].gram;
      const double* part = partial + static_cast<int64_t>(t) * ld * ld;
      for (int64_t i = 0; i < args_.r; ++i) {
        for (int64_t j = i; j < args_.r; ++j) {
          sum[i * args_.r + j] += part[i * ld + j];
          sum[j * args_.r + i] = sum[i * args_.r + j];
        }
      }
    }
  }

  void first(int64_t index, double* scratch) {
    Decomposition& d = factors_[index];
    double trace = 0.0;  // NaN or Inf if anything is
    for (int64_t i = 0; i < args_.r; ++i) trace += d.gram[i * args_.r + i];
    if (!std::isfinite(trace)) {
      std::memset(d.gram, 0, size_ * 8);
      d.rank = -1;
      return;
    }
    d.rank = kernels_.factorize(d.gram, args_.r, d.root, d.inverse, d.norms, &d.kappa, scratch);
  }

  // Q' = Q inverse' with Q^T Q = D root'^T root' D, so root becomes root' D root.
  void second(int64_t index, double* scratch) {
    Decomposition& d = factors_[index];
    const int64_t r = args_.r;
    double* root = scratch;
    double* inverse = root + size_;
    double* norms = inverse + size_;
    double* work = norms + r;
    double kappa;
    d.rank = kernels_.factorize(d.gram, r, root, inverse, norms, &kappa, work);
    scale_columns(root, norms);
    kernels_.product(root, d.root, false, r, work);
    std::memcpy(d.root, work, size_ * 8);
    kernels_.product(d.inverse, inverse, false, r, work);
    std::memcpy(d.inverse, work, size_ * 8);
  }

  void scale_columns(double* matrix, const double* by) {
    for (int64_t i = 0; i < size_; ++i) matrix[i] *= by[i % args_.r];
  }

  void core(int64_t pair) {
    const Decomposition &b = factors_[2 * pair], &a = factors_[2 * pair + 1];
    const int64_t r = args_.r;
    double* core = args_.cores + pair * size_;
    const double scaling = args_.scaling[pair];
    const bool bad = b.rank < 0 || a.rank < 0 || !std::isfinite(scaling);
    args_.info[pair] = bad ? -1 : 0;
    args_.scale[pair] = args_.floor[pair] = 0.0;
    std::memset(core, 0, size_ * 8);
    if (bad) {
      std::memset(b.inverse, 0, 2 * size_ * 8);
      return;
    }
    double scale = 0.0, sum = 0.0;
    for (int64_t l = 0; l < r; ++l) scale = std::fmax(scale, b.norms[l] * a.norms[l]);
    if (!(scale > 0.0) || scaling == 0.0) return;
    for (int64_t l = 0; l < r; ++l) {
      b.norms[l] = b.norms[l] * a.norms[l] / scale;  // the weight of column l times row l
      sum += b.norms[l];
      if (scaling < 0.0) b.norms[l] = -b.norms[l];
    }
    scale_columns(b.root, b.norms);
    kernels_.product(b.root, a.root, true, r, core);
    args_.scale[pair] = scale * std::fabs(scaling);
    args_.floor[pair] = static_cast<double>(r) * 0x1p-52 * sum;
  }

  const LowRankKernels& kernels_;
  const LowRankCoresArgs& args_;
  const int64_t size_;
  Scratch memory_;
  std::vector<Decomposition> factors_;
};

// S, rank and info of a pair.
void values(const LowRankResultsArgs& args, int64_t pair) {
  const double* sigma = args.sigma + pair * args.r;
  const int64_t k = width(args.pairs[pair], args.r);
  const bool bad = args.info[pair] == -1;
  int64_t rank = 0;
  while (rank < k && sigma[rank] > args.floor[pair]) ++rank;
  args.rank[pair] = rank;
  for (int64_t i = 0; i < k; ++i) {
    const float value = i < rank ? static_cast<float>(sigma[i] * args.scale[pair]) : 0.0f;
    args.pairs[pair].s[i] = bad ? NAN : value;
    const bool normal = value >= FLT_MIN && value <= FLT_MAX;
    if (i < rank && !normal && args.info[pair] == 0) args.info[pair] = -2;
  }
}

void fill_nan(const LowRankFactor& factor, const Tile& tile, int64_t k, float* out) {
  const int64_t length = tile.end - tile.begin, rows = factor.wide ? k : length;
  const int64_t columns = factor.wide ? length : k, stride = factor.wide ? factor.length : k;
  float* corner = out + tile.begin * (factor.wide ? 1 : k);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) corner[i * stride + j] = NAN;
  }
}

void vectors(const LowRankKernels& kernels, const LowRankResultsArgs& args) {
  const int64_t r = args.r, ld = round_up(r, kLowRankPad);
  Scratch memory(2 * args.count * r * ld * 8);
  double* t = static_cast<double*>(memory.data);
  for_each(kernels, r, args.threads, 2 * args.count, [&](int64_t i, double* scratch) {
    const double* w = (i % 2 ? args.right : args.left) + i / 2 * r * r;
    kernels.combine(args.inverse + i * r * r, w, r, args.rank[i / 2], t + i * r * ld, scratch);
  });
  const std::vector<Tile> tiles = tiles_of(args.pairs, r, all_factors(args.count));
  const int64_t last = static_cast<int64_t>(tiles.size()) - 1;
  for_each(kernels, r, args.threads, last + 1, [&](int64_t index, double* scratch) {
    const Tile& tile = tiles[last - index];  // what the Gram matrices read last is cached best
    const LowRankPair& pair = args.pairs[tile.factor / 2];
    const int64_t k = width(pair, r);
    if (k == 0) return;
    const LowRankFactor factor = factor_of(args.pairs, r, tile.factor);
    float* out = factor.wide ? pair.vh : pair.u;
    if (args.info[tile.factor / 2] == -1) return fill_nan(factor, tile, k, out);
    kernels.rotate(factor, tile.begin, tile.end, t + tile.factor * r * ld, k, args.stream, out,
                   scratch);
  });
}

// All steps over some of the pairs.
void steps(Isa isa, const LowRankSvdArgs& args, int64_t first, int64_t count, int threads) {
  const int64_t r = args.r, size = r * r;
  const int64_t matrices = args.vectors ? 5 : 3;  // core, two inverses, left and right
  Scratch memory(count * (matrices * size + r + 2 + 1) * 8);
  double* next = static_cast<double*>(memory.data);
  const auto take = [&](int64_t doubles) { return std::exchange(next, next + doubles); };
  LowRankCoresArgs cores;
  cores.pairs = args.pairs + first, cores.count = count, cores.r = r, cores.threads = threads;
  cores.scaling = args.scaling + first, cores.second_pass = args.second_pass;
  cores.cores = take(count * size), cores.inverse = take(2 * count * size);
  cores.scale = take(count), cores.floor = take(count), cores.info = args.info + first;
  low_rank_cores(isa, cores);
  JacobiSvdArgs svd;
  svd.cores = cores.cores, svd.count = count, svd.r = r;
  svd.sweeps = args.sweeps, svd.threads = threads, svd.sigma = take(count * r);
  if (args.vectors) svd.left = take(count * size), svd.right = take(count * size);
  svd.info = reinterpret_cast<int64_t*>(take(count));
  jacobi_svd(isa, svd);
  for (int64_t i = 0; i < count; ++i) {
    if (cores.info[i] == 0) cores.info[i] = svd.info[i];
  }
  LowRankResultsArgs results;
  results.pairs = cores.pairs, results.count = count, results.r = r, results.threads = threads;
  results.inverse = cores.inverse, results.left = svd.left, results.right = svd.right;
  results.sigma = svd.sigma, results.scale = cores.scale, results.floor = cores.floor;
  results.stream = args.stream, results.rank = args.rank + first, results.info = cores.info;
  low_rank_results(isa, results);
}

}  // namespace

void low_rank_cores(Isa isa, const LowRankCoresArgs& args) {
  validate(args.count, args.r, args.threads);
  validate(args.pairs, args.count, args.r);
  if (args.count == 0) return;
  require(args.scaling && args.scale && args.floor && args.info, "scaling .. info: null pointer");
  if (args.r == 0) {
    for (int64_t i = 0; i < args.count; ++i) args.scale[i] = args.floor[i] = 0.0, args.info[i] = 0;
    return;
  }
  require(args.cores && args.inverse, "cores, inverse: null pointer");
  Cores(kernels_for(isa).low_rank, args).run();
}

void jacobi_svd(Isa isa, const JacobiSvdArgs& args) {
  validate(args.count, args.r, args.threads);
  require(args.sweeps >= 0, "sweeps: expected at least 0");
  require(!args.left == !args.right, "left, right: expected both or none");
  if (args.count == 0) return;
  require(args.info, "info: null pointer");
  for (int64_t i = 0; i < args.count; ++i) args.info[i] = 0;
  if (args.r == 0) return;
  require(args.cores && args.sigma, "cores, sigma: null pointer");
  const LowRankKernels& kernels = kernels_for(isa).low_rank;
  const int64_t groups = (args.count + kernels.lanes - 1) / kernels.lanes;
  for_each(kernels, args.r, args.threads, groups, [&](int64_t group, double* scratch) {
    const int64_t first = group * kernels.lanes;
    kernels.jacobi(args, first, min64(kernels.lanes, args.count - first), scratch);
  });
}

void low_rank_results(Isa isa, const LowRankResultsArgs& args) {
  validate(args.count, args.r, args.threads);
  validate(args.pairs, args.count, args.r);
  require(!args.left == !args.right, "left, right: expected both or none");
  if (args.count == 0) return;
  require(args.rank && args.info, "rank, info: null pointer");
  if (args.r == 0) {
    for (int64_t i = 0; i < args.count; ++i) args.rank[i] = 0;
    return;
  }
  require(args.sigma && args.scale && args.floor, "sigma, scale, floor: null pointer");
  validate_results(args.pairs, args.count, args.r, args.left);
  for (int64_t i = 0; i < args.count; ++i) values(args, i);
  if (!args.left) return;
  require(args.inverse, "inverse: null pointer");
  vectors(kernels_for(isa).low_rank, args);
}

void low_rank_svd(Isa isa, const LowRankSvdArgs& args) {
  validate(args.count, args.r, args.threads);
  validate(args.pairs, args.count, args.r);
  validate_results(args.pairs, args.count, args.r, args.vectors);
  require(args.sweeps >= 0, "sweeps: expected at least 0");
  require(args.count == 0 || (args.scaling && args.rank && args.info),
          "scaling, rank, info: null pointer");
  // A thread takes the vector lanes' worth of pairs from their Gram matrices to their vectors, so
  // that factors are read again from its caches and no thread waits for another between the steps.
  // Pairs that do not make as many groups for each thread are cut into tiles for all of them.
  const int64_t group = kernels_for(isa).low_rank.lanes;
  const int64_t groups = args.count / group / args.threads * args.threads;
  std::atomic<bool> no_memory{false};  // nothing may be thrown across the threads' runtime
  parallel_for(args.threads, groups, [&](int64_t i, int) {
    try {
      steps(isa, args, i * group, group, 1);
    } catch (const std::bad_alloc&) {
      no_memory = true;
    }
  });
  if (no_memory) throw std::bad_alloc();
  if (groups * group == args.count) return;
  steps(isa, args, groups * group, args.count - groups * group, args.threads);
}

}  // namespace peftkern
