// The low-rank SVD: argument checks and the order of the steps.
//
// Work is cut into tiles of fixed size, and the sums of a layer's tiles are added up in order, so
// that no bit depends on how many threads there are.
#include <cmath>
#include <cstring>
#include <string>
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

void require_room(const char* name, const float* out, int64_t length, int64_t offset,
                  int64_t numel) {
  if (numel == 0) return;
  if (!out || offset < 0 || length < numel || offset > length - numel) {
    fail(std::string(name) + ": expected room for " + std::to_string(numel) +
         " values from offset " + std::to_string(offset) + " on, got " + std::to_string(length));
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

void low_rank_rotate(Isa isa, const LowRankRotateArgs& args) {
  validate(args.count, args.r, args.threads);
  validate(args.pairs, args.count, args.r);
  const int64_t r = args.r, ld = round_up(r, kLowRankPad);
  if (args.count == 0 || r == 0) return;
  require(args.inverse && args.left && args.right && args.rank, "inverse .. rank: null pointer");
  require(args.u_offsets && args.vh_offsets, "u_offsets, vh_offsets: null pointer");
  const LowRankKernels& kernels = kernels_for(isa).low_rank;
  const auto size = [&](int64_t i) { return min64(r, min64(args.pairs[i].m, args.pairs[i].n)); };
  for (int64_t i = 0; i < args.count; ++i) {
    require_room("u", args.u, args.u_len, args.u_offsets[i], args.pairs[i].m * size(i));
    require_room("vh", args.vh, args.vh_len, args.vh_offsets[i], args.pairs[i].n * size(i));
    require(args.rank[i] >= -1 && args.rank[i] <= size(i), "rank: expected -1 to min(r, m, n)");
  }
  Scratch memory(2 * args.count * r * ld * 8);
  double* t = static_cast<double*>(memory.data);
  for_each(kernels, r, args.threads, 2 * args.count, [&](int64_t i, double* scratch) {
    const double* w = (i % 2 ? args.right : args.left) + i / 2 * r * r;
    const int64_t rank = args.rank[i / 2] < 0 ? 0 : args.rank[i / 2];
    kernels.combine(args.inverse + i * r * r, w, r, rank, t + i * r * ld, scratch);
  });
  const std::vector<Tile> tiles = tiles_of(args.pairs, r, all_factors(args.count));
  for_each(
      kernels, r, args.threads, static_cast<int64_t>(tiles.size()),
      [&](int64_t index, double* scratch) {
        const Tile& tile = tiles[static_cast<size_t>(index)];
        const int64_t pair = tile.factor / 2, k = size(pair);
        if (k == 0) return;
        const LowRankFactor factor = factor_of(args.pairs, r, tile.factor);
        float* out = factor.wide ? args.vh + args.vh_offsets[pair] : args.u + args.u_offsets[pair];
        if (args.rank[pair] >= 0) {
          kernels.rotate(factor, tile.begin, tile.end, t + tile.factor * r * ld, k, out, scratch);
          return;
        }
        const int64_t rows = factor.wide ? k : tile.end - tile.begin;
        const int64_t columns = factor.wide ? tile.end - tile.begin : k;
        const int64_t stride = factor.wide ? factor.length : k;
        float* corner = out + tile.begin * (factor.wide ? 1 : k);
        for (int64_t i = 0; i < rows; ++i) {
          for (int64_t j = 0; j < columns; ++j) corner[i * stride + j] = NAN;
        }
      });
}

}  // namespace peftkern
