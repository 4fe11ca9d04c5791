// RoSA's sparse products: argument checks, and values in the order of the entries.
#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "peftkern/checks.h"
#include "tasks.h"

namespace peftkern {
namespace {

constexpr int64_t kCheckedAtOnce = 1 << 16;  // indices

// Throws std::invalid_argument unless every one of `count` indices is in [0, limit).
template <class Index>
void check_indices(const void* data, int64_t count, int64_t limit, int threads,
                   const char* message) {
  const Index* index = static_cast<const Index*>(data);
  const int64_t tasks = ceil_div(count, kCheckedAtOnce);
  std::vector<char> bad(static_cast<size_t>(tasks), 0);
  parallel_for(threads, tasks, [&](int64_t i, int) {
    const int64_t end = std::min(count, (i + 1) * kCheckedAtOnce);
    bool outside = false;
    for (int64_t j = i * kCheckedAtOnce; j < end; ++j) {
      outside |= index[j] < 0 || static_cast<int64_t>(index[j]) >= limit;
    }
    bad[static_cast<size_t>(i)] = outside;
  });
  require(std::find(bad.begin(), bad.end(), 1) == bad.end(), message);
}

template <class Index>
void check_entries(const SparseMatrix& s, int threads) {
  const Index* starts = static_cast<const Index*>(s.starts);
  bool ascending = starts[0] == 0 && starts[s.rows] == s.nnz;
  for (int64_t i = 0; i < s.rows; ++i) ascending &= starts[i] <= starts[i + 1];
  require(ascending, "starts: expected to ascend from 0 to the number of entries");
  check_indices<Index>(s.index, s.nnz, s.columns, threads, "index: a column is out of range");
}

// Throws std::invalid_argument naming what does not fit.
void check_matrix(const SparseMatrix& s, int64_t T, int threads) {
  require(threads >= 1, "threads: expected at least 1");
  // With room for a panel of 64 float32 per column for each thread, and in whole vectors.
  checked_mul(checked_mul(s.columns, 4096, "columns"), threads, "columns: panels");
  checked_mul(s.rows, 4096, "rows");
  checked_mul(s.nnz, 64, "nnz");
  checked_mul(checked_mul(T, s.columns, "x: T x columns"), 4, "x: bytes");
  checked_mul(checked_mul(T, s.rows, "y: T x rows"), 4, "y: bytes");
  require(s.starts && (s.nnz == 0 || s.index), "starts, index: null pointer");
  s.wide ? check_entries<int64_t>(s, threads) : check_entries<int32_t>(s, threads);
}

template <class Index>
void gather(const SpmmArgs& args, float* out) {
  const Index* order = static_cast<const Index*>(args.order);
  check_indices<Index>(order, args.s.nnz, args.s.nnz, args.threads,
                       "order: a place is out of range");
  const int64_t nnz = args.s.nnz;
  parallel_for(args.threads, ceil_div(nnz, kCheckedAtOnce), [&](int64_t i, int) {
    const int64_t end = std::min(nnz, (i + 1) * kCheckedAtOnce);
    for (int64_t j = i * kCheckedAtOnce; j < end; ++j) out[j] = args.values[order[j]];
  });
}

}  // namespace

void rosa_spmm(Isa isa, const SpmmArgs& args) {
  const RosaKernels& kernels = kernels_for(isa).rosa;
  check_matrix(args.s, args.T, args.threads);
  if (args.T == 0 || args.s.nnz == 0) return;
  require(args.values && args.x && args.y, "values, x, y: null pointer");
  if (!args.order) {
    kernels.spmm(args);
    return;
  }
  Scratch scratch(args.s.nnz * 4);
  SpmmArgs ordered = args;
  float* values = scratch.floats();
  args.s.wide ? gather<int64_t>(args, values) : gather<int32_t>(args, values);
  ordered.values = values;
  ordered.order = nullptr;
  kernels.spmm(ordered);
}

void rosa_sddmm(Isa isa, const SddmmArgs& args) {
  const RosaKernels& kernels = kernels_for(isa).rosa;
  check_matrix(args.s, args.T, args.threads);
  if (args.s.nnz == 0) return;
  require(args.values, "values: null pointer");
  if (args.T == 0) {
    std::memset(args.values, 0, static_cast<size_t>(args.s.nnz) * 4);
    return;
  }
  require(args.dy && args.x, "dy, x: null pointer");
  kernels.sddmm(args);
}

}  // namespace peftkern
