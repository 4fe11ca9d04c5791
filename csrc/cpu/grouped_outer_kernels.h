// Gradients of grouped factors, g = scale s^T x per group, for any Math and Tiles as in
// grouped_linear_kernels.h. Compiled once per instruction set.
#pragma once

#include "grouped_tiles.h"

namespace peftkern {
namespace {
namespace grouped {

// A factor's gradient, a strip of columns of one group at a time: s and x go by a block of rows
// at a time. Where the groups lie innermost, as PEFT keeps lora_B, a cache line holds a value of
// each of them: then a task is a strip of all groups, turned around while it is in cache.
template <class Math, class Tiles>
struct Outer {
  const GroupedOuterArgs& args;
  const GroupedPlan& plan;
  int64_t column = 0;  // of the first of g

  static constexpr int64_t kStep = Tiles::kStep;
  static constexpr int64_t kColumns = 128;
  static constexpr int64_t kPairs = kColumns / kPairSide;
  static constexpr int64_t kSteps = 4;  // of a block of rows
  static constexpr int64_t kThird = kSteps * kPair;
  static constexpr int64_t kProducts = Tiles::kParts > 1 ? 2 : 1;  // of sixteen ranks and a pair

  int64_t source(int64_t row) const {
    return (args.groups.rows ? args.groups.rows[row] : row) * args.K;
  }

  // Rows [row, row + count) of s, sixteen ranks of them.
  void load_s(int64_t row, int64_t count, int64_t rank0, uint32_t* out) const {
    const int n = static_cast<int>(min64(16, args.r - rank0));
    for (int64_t t = 0; t < ceil_div(count, kStep); ++t) {
      float s[kStep * 16];
      for (int64_t i = 0; i < kStep; ++i) {
        const bool valid = t * kStep + i < count;
        const float* from = args.s + (row + t * kStep + i) * args.r + rank0;
        f32_store(s + 16 * i, valid ? load_any(from, DType::kFloat32, 0, n) : f32_zero());
      }
      Tiles::outer_rows(s, out + t * kPair, kThird);
    }
  }

  void load_x(int64_t row, int64_t count, int64_t k0, int64_t columns, uint32_t* out) const {
    for (int64_t t = 0; t < ceil_div(count, kStep); ++t) {
      int64_t starts[kStep];
      const int64_t rows = min64(kStep, count - t * kStep);
      for (int64_t i = 0; i < rows; ++i) starts[i] = source(row + t * kStep + i) + k0;
      for (int64_t j = 0; j < columns; j += kPairSide) {
        Tiles::lanes(args.x, args.dtype, starts, rows, min64(kPairSide, columns - j),
                     out + (j / kPairSide * kSteps + t) * kPair);
        for (int64_t i = 0; i < rows; ++i) starts[i] += kPairSide;
      }
    }
  }

  void strip(const GroupedChunk& chunk, int64_t k0, int64_t columns, float* scratch) const {
    const int64_t ranks = ceil_div(args.r, 16);
    uint32_t* x = reinterpret_cast<uint32_t*>(scratch);
    uint32_t* s = x + kPairs * kThird;
    float* sums = scratch + kPairs * kThird + 2 * kThird;
    for (int64_t m = 0; m < chunk.count; m += kSteps * kStep) {
      const int64_t count = min64(kSteps * kStep, chunk.count - m), steps = ceil_div(count, kStep);
      load_x(chunk.begin + m, count, k0, columns, x);
      for (int64_t g = 0; g < ranks; ++g) {
        load_s(chunk.begin + m, count, 16 * g, s);
        for (int64_t j = 0; j < columns; j += kPairSide) {
          float* c = sums + (g * kPairs + j / kPairSide) * kProducts * kProduct;
          const uint32_t* lanes = x + j / kPairSide * kThird;
          const bool two = columns - j > kSide;
          multiply<Math>(s, lanes, c, steps, m == 0, Tiles::kParts > 1 ? 32 : 16, two);
          if (Tiles::kParts > 1) {
            multiply<Math>(s + kThird, lanes, c + kProduct, steps, m == 0, 16, two);
          }
        }
      }
    }
    for (int64_t g = 0; g < ranks; ++g) {
      for (int64_t j = 0; j < columns; j += kSide) {
        float* c = sums + (g * kPairs + j / kPairSide) * kProducts * kProduct;
        finish(quadrant(c, 0, j % kPairSide), chunk.group, 16 * g, k0 + j);
      }
    }
  }

  // g[group, rank0 : rank0 + 16, column0 : column0 + 16]
  void finish(float* c, int64_t group, int64_t rank0, int64_t column0) const {
    const FactorStrides& by = args.strides;
    const int64_t ranks = min64(16, args.r - rank0), columns = min64(16, args.K - column0);
    float block[kTile], turned[kTile];
    for (int64_t i = 0; i < 16; ++i) {
      F32x16 sum = f32_load(c + 16 * i);
      if (Tiles::kParts > 1) {
        const F32x16 rest =
            f32_add(f32_load(c + 2 * kTile + 16 * i), f32_load(c + kProduct + 16 * i));
        sum = f32_add(sum, rest);
      }
      f32_store(block + 16 * i, f32_mul(sum, f32_set1(args.scale)));
    }
    const int64_t at = group * by.group + rank0 * by.rank + (column0 - column) * by.column;
    if (by.column == 1) {
      for (int64_t i = 0; i < ranks; ++i) {
        store_any(args.g, args.g_dtype, at + i * by.rank, f32_load(block + 16 * i),
                  static_cast<int>(columns));
      }
      return;
    }
    transpose_tile(reinterpret_cast<const uint32_t*>(block), 16,
                   reinterpret_cast<uint32_t*>(turned));
    for (int64_t j = 0; j < columns; ++j) {
      const int64_t to = at + j * by.column;
      if (by.rank == 1) {
        store_any(args.g, args.g_dtype, to, f32_load(turned + 16 * j), static_cast<int>(ranks));
        continue;
      }
      for (int64_t i = 0; i < ranks; ++i) {
        store_any(args.g, args.g_dtype, to + i * by.rank, f32_set1(turned[16 * j + i]), 1);
      }
    }
  }

  // Zero for the group whose gradient nobody computes.
  void clear(int64_t group, int64_t k0) const {
    const FactorStrides& by = args.strides;
    const int64_t columns = min64(kColumns, args.K - k0), size = size_of(args.g_dtype);
    if (by.column == 1 && by.rank == args.K) {  // as many values, all together
      std::memset(static_cast<char*>(args.g) + (group * by.group + k0 * args.r) * size, 0,
                  static_cast<size_t>(columns * args.r * size));
      return;
    }
    const bool along = by.column == 1;
    const int64_t lines = along ? args.r : columns, length = along ? columns : args.r;
    const int64_t line = along ? by.rank : by.column, step = along ? by.column : by.rank;
    const int64_t at = group * by.group + k0 * by.column;
    for (int64_t i = 0; i < lines; ++i) {
      char* p = static_cast<char*>(args.g) + (at + i * line) * size;
      if (step == 1) {
        std::memset(p, 0, static_cast<size_t>(length * size));
        continue;
      }
      for (int64_t j = 0; j < length; ++j) {
        std::memset(p + j * step * size, 0, static_cast<size_t>(size));
      }
    }
  }

  void run() const {
    const int64_t ranks = ceil_div(args.r, 16);
    const int64_t own = kPairs * kThird + 2 * kThird + ranks * kPairs * kProducts * kProduct;
    Scratch scratch(args.threads * own * 4);
    const FactorStrides& by = args.strides;
    const int64_t line = args.r * args.groups.E;  // of a column
    if (by.group == 1 && by.rank == args.groups.E && by.column == line) {
      const int64_t columns = columns_at_once(line);
      Scratch stacks(args.threads * columns * line * 4);
      parallel_for(args.threads, ceil_div(args.K, columns), [&](int64_t task, int thread) {
        const int64_t k0 = task * columns;
        char* stack = static_cast<char*>(stacks.data) + thread * columns * line * 4;
        strip_of_all(k0, min64(columns, args.K - k0), scratch.floats() + thread * own, stack);
      });
      return;
    }
    const int64_t strips = ceil_div(args.K, kColumns), full = plan.count * strips;
    parallel_for(args.threads, full + plan.empty_count * strips, [&](int64_t task, int thread) {
      const int64_t k0 = (task < full ? task : task - full) % strips * kColumns;
      if (task >= full) {
        clear(plan.empty[(task - full) / strips], k0);
        return;
      }
      typename Math::Session session;
      (void)session;
      strip(plan.chunks[task / strips], k0, min64(kColumns, args.K - k0),
            scratch.floats() + thread * own);
    });
  }

  // Some for every thread, and a quarter of a second-level cache at most.
  int64_t columns_at_once(int64_t line) const {
    const int64_t cached = (1 << 19) / (line * size_of(args.g_dtype) + 1);
    const int64_t fair = args.K / (4 * args.threads);
    const int64_t columns = min64(cached, fair) / kPairSide * kPairSide;
    return columns < kPairSide ? kPairSide : min64(columns, kColumns);
  }

  // [E, columns, r] of a strip, and from there to [columns, r, E].
  void strip_of_all(int64_t k0, int64_t columns, float* scratch, void* stack) const {
    typename Math::Session session;
    (void)session;
    GroupedOuterArgs own = args;
    own.g = stack;
    own.strides = {columns * args.r, 1, args.r};
    const Outer part{own, plan, k0};
    for (int64_t i = 0; i < plan.count; ++i) part.strip(plan.chunks[i], k0, columns, scratch);
    if (args.g_dtype == DType::kFloat32) return spread<float>(k0, columns, stack);
    spread<uint16_t>(k0, columns, stack);
  }

  template <class T>
  void spread(int64_t k0, int64_t columns, const void* stack) const {
    const int64_t E = args.groups.E, values = columns * args.r;
    T* out = static_cast<T*>(args.g) + k0 * args.strides.column;
    if (plan.empty_count > 0) std::memset(out, 0, static_cast<size_t>(values * E) * sizeof(T));
    constexpr int64_t kLine = 32;  // values of each group that are read together
    for (int64_t first = 0; first < values; first += kLine) {
      const int64_t count = min64(kLine, values - first);
      for (int64_t i = 0; i < plan.count; ++i) {
        const int64_t e = plan.chunks[i].group;
        const T* from = static_cast<const T*>(stack) + e * values + first;
        T* to = out + first * E + e;
        for (int64_t j = 0; j < count; ++j) to[j * E] = from[j];
      }
    }
  }
};

template <class Math, class Tiles>
void outer(const GroupedOuterArgs& args, const GroupedPlan& plan) {
  Outer<Math, Tiles>{args, plan, 0}.run();
}

}  // namespace grouped
}  // namespace
}  // namespace peftkern
