// Grouped linear layers: argument checks, and the division of groups into chunks.
#include "peftkern/grouped_linear.h"

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "peftkern/checks.h"
#include "tasks.h"

namespace peftkern {
namespace {

// The distance from a stack's first element to its last fits int64, in bytes.
void check_stack(const char* name, const void* data, const FactorStrides& by, int64_t E, int64_t r,
                 int64_t columns) {
  require(by.group >= 0 && by.rank >= 0 && by.column >= 0, "strides: expected at least 0");
  int64_t last = 0;
  const int64_t sizes[] = {E, r, columns}, strides[] = {by.group, by.rank, by.column};
  for (int i = 0; i < 3; ++i) {
    const int64_t reach = checked_mul(sizes[i], strides[i], name);
    require(!__builtin_add_overflow(last, reach, &last), "strides: too large");
  }
  checked_mul(last, 8, name);
  require(E * r * columns == 0 || data, name);
}

// r and columns, with room for tiles around them.
void check_sizes(const RowGroups& groups, int64_t r, int64_t columns, int threads) {
  require(threads >= 1, "threads: expected at least 1");
  checked_mul(r, 4096, "r");
  const int64_t bytes = checked_mul(checked_mul(columns, r + 64, "columns"), 1024, "columns");
  checked_mul(groups.R, bytes, "R x columns: bytes");
  checked_mul(groups.T, bytes, "T x columns: bytes");
  checked_mul(groups.E, bytes, "E x r x columns: bytes");
  checked_mul(checked_mul(r, 1 << 14, "r"), threads, "r x threads");
}

class Plan {
 public:
  // Chunks of at most `longest` rows.
  Plan(const RowGroups& groups, int64_t longest) {
    for (int64_t e = 0; e < groups.E; ++e) {
      const int64_t begin = end_, rows = groups.offsets[e] - begin;
      const int64_t place = e - static_cast<int64_t>(empty_.size());
      if (rows == 0) empty_.push_back(e);
      for (int64_t at = 0; at < rows; at += longest) {
        chunks_.push_back({e, place, begin + at, std::min(longest, rows - at), 0});
      }
      end_ = groups.offsets[e];
    }
    std::stable_sort(chunks_.begin(), chunks_.end(),
                     [](const auto& a, const auto& b) { return a.count > b.count; });
    for (GroupedChunk& chunk : chunks_) {  // the long ones come first, and at even slots
      chunk.slot = slots_;
      slots_ += chunk.count > 16 ? (chunk.count + 31) / 32 * 2 : 1;
    }
  }

  GroupedPlan view() const {
    GroupedPlan plan;
    plan.chunks = chunks_.data();
    plan.count = static_cast<int64_t>(chunks_.size());
    plan.slots = slots_;
    plan.end = end_;
    plan.empty = empty_.data();
    plan.empty_count = static_cast<int64_t>(empty_.size());
    return plan;
  }

 private:
  std::vector<GroupedChunk> chunks_;
  std::vector<int64_t> empty_;
  int64_t slots_ = 0, end_ = 0;
};

const GroupedKernels& kernels_of(Isa isa, DType dtype) {
  const CpuKernels& kernels = kernels_for(isa);
  return dtype == DType::kBFloat16 ? kernels.grouped_bf16 : kernels.grouped;
}

// Copies the groups' values block by block: of a few groups a line of each, so that memory is read
// in order, of many as much as the first-level cache holds. What is read next is fetched meanwhile,
// a part of it with each group.
template <class T>
void collect(const GroupedCollectArgs& args, const std::vector<int64_t>& groups) {
  constexpr int64_t kLine = 64 / sizeof(T), kCached = (1 << 14) / sizeof(T);
  const int64_t E = args.groups.E, total = args.columns * E;
  const bool few = groups.size() <= 16;
  const int64_t block = few ? kLine : std::max(kCached / (E + 1), kLine);  // columns
  const int64_t ahead = few ? kCached / 2 : 2 * kCached;
  const int64_t at_once = round_up(std::max((1 << 15) / E, block), block);  // columns of a task
  const int64_t part = ceil_div(block * E, static_cast<int64_t>(groups.size()));
  parallel_for(args.threads, ceil_div(args.columns, at_once), [&](int64_t task, int) {
    const int64_t end = min64(args.columns, (task + 1) * at_once);
    for (int64_t first = task * at_once; first < end; first += block) {
      const int64_t count = min64(block, end - first);
      const T* in = static_cast<const T*>(args.in) + first * E;
      T* out = static_cast<T*>(args.out) + first;
      int64_t next = first * E + ahead;
      for (const int64_t e : groups) {
        const int64_t last = min64(next + part, total);
        for (; next < last; next += kLine) {
          __builtin_prefetch(static_cast<const T*>(args.in) + next, 0, 2);
        }
        for (int64_t c = 0; c < count; ++c) out[c] = in[c * E + e];
        out += args.columns;
      }
    }
  });
}

}  // namespace

void grouped_collect(const GroupedCollectArgs& args) {
  validate(args.groups);
  require(args.threads >= 1, "threads: expected at least 1");
  const int64_t E = args.groups.E;
  checked_mul(checked_mul(args.columns, 8, "columns"), E, "columns x E: bytes");
  std::vector<int64_t> groups;
  for (int64_t e = 0; e < E; ++e) {
    if (args.groups.offsets[e] > (e > 0 ? args.groups.offsets[e - 1] : 0)) groups.push_back(e);
  }
  require(args.columns * E == 0 || args.in, "in: null pointer");
  require(args.columns == 0 || groups.empty() || args.out, "out: null pointer");
  if (groups.empty()) return;
  args.dtype == DType::kFloat32 ? collect<uint32_t>(args, groups) : collect<uint16_t>(args, groups);
}

void grouped_linear(Isa isa, const GroupedLinearArgs& args) {
  const GroupedKernels& kernels = kernels_of(isa, args.dtype);
  const RowGroups& groups = args.groups;
  validate(groups);
  check_sizes(groups, args.r, args.K, args.threads);
  check_sizes(groups, args.r, args.N, args.threads);
  const int64_t rows = args.transposed ? args.K : args.N;
  const Plan plan(groups, kGroupedRows);
  const auto count = [&](const FactorStack& f) {
    return f.collected ? groups.E - plan.view().empty_count : groups.E;
  };
  const FactorStrides weight{args.weight_group, args.weight_row, 1};
  if (args.weight) {
    check_stack("weight: bytes", args.weight, weight, groups.E, rows, args.N + args.K - rows);
  }
  if (args.r > 0) {
    check_stack("a: bytes, or a null pointer", args.a.data, args.a.strides, count(args.a), args.r,
                args.K);
    if (args.y) {
      check_stack("b: bytes, or a null pointer", args.b.data, args.b.strides, count(args.b), args.r,
                  args.N);
    }
    require(groups.R == 0 || args.s, "s: null pointer");
  }
  require(groups.T * args.K == 0 || args.x, "x: null pointer");
  kernels.linear(args, plan.view());
}

void grouped_outer(Isa isa, const GroupedOuterArgs& args) {
  const GroupedKernels& kernels = kernels_of(isa, args.dtype);
  const RowGroups& groups = args.groups;
  validate(groups);
  check_sizes(groups, args.r, args.K, args.threads);
  check_stack("g: bytes, or a null pointer", args.g, args.strides, groups.E, args.r, args.K);
  require(groups.T * args.K == 0 || args.x, "x: null pointer");
  require(groups.R * args.r == 0 || args.s, "s: null pointer");
  kernels.outer(args, Plan(groups, groups.R + 1).view());
}

}  // namespace peftkern
