// Linear layers with low-rank updates over groups of rows, such as a mixture's experts. Torch-free.
//
//   s = s_scale x a^T,  y = x W^T + base + scaling s b + bias       for the rows of each group
//   g = scale s^T x                                                 a factor's gradient
//
// Rows are sorted by group. A group's factors are stacks of [r, columns] matrices of any strides;
// activations are read through `rows`, so that no gathered copy of them is needed. Backward is the
// same two: dx, dS of dy, with the factors exchanged and the weight's orientation turned around.
// Sums are float32, y is rounded once. A group's weight is read once for every 512 of its rows.
#pragma once

#include "peftkern/base.h"
#include "peftkern/isa.h"
#include "peftkern/row_groups.h"

namespace peftkern {

// Element (group, rank, column) of a stack of factors is at the sum of the products with these.
struct FactorStrides {
  int64_t group = 0, rank = 0, column = 0;
};
struct FactorStack {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
  FactorStrides strides;
  bool collected = false;  // of the groups with rows alone, as grouped_collect leaves them
};

struct GroupedLinearArgs {
  RowGroups groups;
  int64_t N = 0, K = 0, r = 0;
  const void* x = nullptr;  // [T, K]
  DType dtype = DType::kFloat32;
  const void* weight = nullptr;  // of dtype, [N, K] a group, or [K, N]; null: without
  bool transposed = false;
  int64_t weight_group = 0, weight_row = 0;  // strides
  const float* base = nullptr;               // [R, N], or null
  const void* bias = nullptr;                // [E, N] of dtype, or null
  FactorStack a, b;                          // [E, r, K], [E, r, N]
  float s_scale = 1.0f, scaling = 1.0f;
  float* s = nullptr;  // [R, r]
  void* y = nullptr;   // [R, N] of dtype; null: s alone
  int threads = 1;
};
void grouped_linear(Isa isa, const GroupedLinearArgs& args);

struct GroupedOuterArgs {
  RowGroups groups;
  int64_t K = 0, r = 0;
  const void* x = nullptr;  // [T, K]
  DType dtype = DType::kFloat32;
  const float* s = nullptr;  // [R, r]
  float scale = 1.0f;
  void* g = nullptr;  // [E, r, K]: zero for groups without rows
  DType g_dtype = DType::kFloat32;
  FactorStrides strides;
  int threads = 1;
};
void grouped_outer(Isa isa, const GroupedOuterArgs& args);

// out[i, c] = in[c, e], e being the i-th group that has rows. PEFT keeps lora_B so, with the groups
// innermost, where the values of one lie on cache lines of others.
struct GroupedCollectArgs {
  RowGroups groups;  // E and offsets
  int64_t columns = 0;
  DType dtype = DType::kFloat32;
  const void* in = nullptr;  // [columns, E]
  void* out = nullptr;       // [groups with rows, columns]
  int threads = 1;
};
void grouped_collect(const GroupedCollectArgs& args);

constexpr int64_t kGroupedRows = 512;  // of a chunk at most: what is packed of x, and the sums of a
                                       // strip, have to stay in the second-level cache

// Rows [begin, begin + count) of a group, the `place`-th of those with rows. Its activations lie
// packed from a multiple of sixteen rows on: `slot`, which is even if there are more than sixteen.
struct GroupedChunk {
  int64_t group, place, begin, count, slot;
};
struct GroupedPlan {
  const GroupedChunk* chunks;  // the longest first
  int64_t count, slots;
  int64_t end;           // of the last group
  const int64_t* empty;  // groups without rows
  int64_t empty_count;
};

}  // namespace peftkern
