// Operands of grouped products as tiles (nf4_panel.h): activations and weights in their own type,
// float32 factors in as many tiles as it takes. Float32Tiles are float32 throughout.
#pragma once

#include "nf4_panel.h"
#include "peftkern/grouped_linear.h"

namespace peftkern {
namespace {
namespace grouped {

constexpr int64_t kProduct = 4 * kTile;  // floats of a product of two pairs

// How many rows tiles two by two products take: one for up to sixteen rows.
template <class Math>
void multiply(const uint32_t* rows, const uint32_t* lanes, float* c, int64_t steps, bool first,
              int64_t count, bool two_lanes) {
  if (two_lanes) {
    Math::template multiply<2>(rows, lanes, c, steps, first, min64(count, kPairSide));
  } else {
    Math::template multiply<1>(rows, lanes, c, steps, first, min64(count, kPairSide));
  }
}

inline float* quadrant(float* c, int64_t row, int64_t lane) {
  return c + (row / kSide * 2 + lane / kSide) * kTile;
}

inline int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Elements (group of the chunk, rank0 + i, column0 + j), i and j < 16, as float32; zero past r and
// columns.
inline void fetch_block(const FactorStack& f, const GroupedChunk& chunk, int64_t rank0,
                        int64_t column0, int64_t r, int64_t columns, float* block) {
  const FactorStrides& by = f.strides;
  const int64_t group = f.collected ? chunk.place : chunk.group;
  const int64_t at = group * by.group + rank0 * by.rank + column0 * by.column;
  const int ranks = static_cast<int>(min64(16, r - rank0));
  const int n = static_cast<int>(min64(16, columns - column0));
  if (ranks < 16 || n < 16) std::memset(block, 0, kTile * 4);
  if (n <= 0) return;
  if (by.column == 1) {
    for (int i = 0; i < ranks; ++i) {
      f32_store(block + 16 * i, load_any(f.data, f.dtype, at + i * by.rank, n));
    }
    return;
  }
  float turned[kTile] = {};
  const bool whole = by.rank == 1;
  for (int j = 0; j < n; ++j) {
    const int64_t from = at + j * by.column;
    if (whole) {
      f32_store(turned + 16 * j, load_any(f.data, f.dtype, from, ranks));
      continue;
    }
    for (int i = 0; i < ranks; ++i) {
      float lanes[16];
      f32_store(lanes, load_any(f.data, f.dtype, from + i * by.rank, 1));
      turned[16 * j + i] = lanes[0];
    }
  }
  transpose_tile(reinterpret_cast<const uint32_t*>(turned), 16, reinterpret_cast<uint32_t*>(block));
}

struct Float32Tiles {
  static constexpr int64_t kStep = 16;   // elements of the reduction in a tile
  static constexpr int kParts = 1;       // tiles that make up a float32 operand
  static constexpr int kRankSteps = 1;   // steps of sixteen ranks in s b
  static constexpr int64_t kBlocks = 1;  // of sixteen columns in a step
  // Rows of a group up to which products with rows of its weight take less time than tiles; of one
  // slot at most.
  static constexpr int64_t kFewRows = kSide;

  // A step of `rows` rows, each from its own element on, and up to 32 columns, as lanes tiles.
  static void lanes(const void* in, DType dtype, const int64_t* starts, int64_t rows,
                    int64_t columns, uint32_t* pair) {
    for (int64_t i = 0; i < 16; ++i) {
      for (int64_t j = 0; j < 2; ++j) {
        const int64_t n = i < rows ? columns - 16 * j : 0;
        Float32Math::load_dwords(in, dtype, n > 0 ? starts[i] + 16 * j : 0, n,
                                 pair + j * kTile + 16 * i);
      }
    }
  }

  // A lanes tile of columns along the reduction: up to sixteen rows, each from its own element on,
  // of which n elements exist.
  static void turned(const void* in, DType dtype, const int64_t* starts, int64_t rows, int64_t n,
                     uint32_t* tile) {
    uint32_t lines[kTile];
    for (int64_t i = 0; i < 16; ++i) {
      Float32Math::load_dwords(in, dtype, i < rows ? starts[i] : 0, i < rows ? n : 0,
                               lines + 16 * i);
    }
    transpose_tile(lines, 16, tile);
  }

  // Two tiles' parts of a row of y, n <= 32 values.
  static void store(void* out, DType dtype, int64_t i, const F32x16& a, const F32x16& b,
                    int64_t n) {
    store_any(out, dtype, i, a, static_cast<int>(min64(n, 16)));
    if (n > 16) store_any(out, dtype, i + 16, b, static_cast<int>(n - 16));
  }

  // Columns along the reduction: a lane per rank.
  static void shrink_lanes(const float* blocks, uint32_t* out, int64_t) {
    transpose_tile(reinterpret_cast<const uint32_t*>(blocks), 16, out);
  }
  // Ranks along the reduction: a lane per column.
  static void expand_lanes(const float* block, uint32_t* out) {
    std::memcpy(out, block, kTile * 4);
  }
  // Sixteen ranks of a row of s.
  static void expand_row(const F32x16& s, uint32_t* out) {
    f32_store(reinterpret_cast<float*>(out), s);
  }
  // Rows of s along the reduction: s[16][16] to a row per rank.
  static void outer_rows(const float* s, uint32_t* out, int64_t) {
    transpose_tile(reinterpret_cast<const uint32_t*>(s), 16, out);
  }
};

}  // namespace grouped
}  // namespace
}  // namespace peftkern
