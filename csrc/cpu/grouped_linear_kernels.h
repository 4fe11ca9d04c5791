// y = x W^T + scaling s b and s = x a^T over groups of rows, for any Math that multiplies tiles and
// the Tiles that go with it. Compiled once per instruction set.
//
// The activations of a chunk (at most 512 rows of a group) are packed once as rows tiles, sixteen
// rows a slot, and s is computed while they are at hand. Then each task takes a strip of outputs of
// one chunk: it turns a block of the weight into lanes tiles in cache, multiplies, and goes on
// along the reduction; the ranks of s b are a few more steps of that product, so that the update
// costs no pass of its own and y is rounded once. Where a chunk has few rows, rows of the weight
// and of the factors are multiplied as they stream by, without tiles of their own. Nobody writes
// what another task writes and every sum has one fixed order: results do not depend on the number
// of threads.
#pragma once

#include "grouped_tiles.h"

namespace peftkern {
namespace {
namespace grouped {

template <class Math, class Tiles>
struct Linear {
  const GroupedLinearArgs& args;
  const GroupedPlan& plan;

  static constexpr int64_t kStep = Tiles::kStep;
  static constexpr int64_t kShrinkRows = 128;                   // that share one turned factor
  static constexpr int64_t kShrinkBlock = 8 * kStep;            // columns of it at a time
  static constexpr int64_t kRanks = Tiles::kRankSteps * kPair;  // dwords of 16 ranks of two tiles

  // What the tasks of the second pass read: x and s of every slot, as [pair of slots][step][2].
  struct Packed {
    uint32_t *x, *s;
    int64_t steps, rank_steps;
    uint32_t* x_at(int64_t slot) const { return x + slot / 2 * steps * kPair + slot % 2 * kTile; }
    uint32_t* s_at(int64_t slot) const {
      return s + slot / 2 * rank_steps * kPair + slot % 2 * kTile;
    }
  };

  // Rows of a chunk up to which a product with a factor takes less time than making tiles of it.
  static constexpr int64_t kBareRows = 4;
  static constexpr int64_t kDotBlock = 1024;  // of the reduction: sums of it start at zero

  static constexpr int64_t kWidest = 256;
  static constexpr int64_t kLanes = kWidest / kPairSide * 8 * kPair;  // dwords of the largest block

  // A task's share of a weight: so many outputs, so much of the reduction at a time.
  struct Strip {
    int64_t columns, block;
  };
  // Rows that run along the outputs are read in wide pieces: a page of memory holds few rows. A few
  // rows of x leave the sums in the first-level cache, where they are added to after every block.
  Strip strip_of(int64_t rows) const {
    if (!args.transposed) return {64, 8 * kStep};
    return {kWidest, rows <= kPairSide ? 2 * kStep : 8 * kStep};
  }

  int64_t source(int64_t row) const {  // element of x where a sorted row begins
    return (args.groups.rows ? args.groups.rows[row] : row) * args.K;
  }

  // Sixteen rows from `row` on, of which `count` exist, as rows tiles. What is multiplied along
  // with them is zero: leftovers in memory may be slow to multiply.
  void pack_rows(int64_t row, int64_t count, uint32_t* tile, int64_t steps) const {
    for (int64_t i = count; i < round_up(count, 4); ++i) {
      for (int64_t t = 0; t < steps; ++t) std::memset(tile + t * kPair + 16 * i, 0, 64);
    }
    for (int64_t i = 0; i < count; ++i) {
      const int64_t from = source(row + i);
      for (int64_t t = 0; t < steps; ++t) {
        Math::load_dwords(args.x, args.dtype, from + t * kStep, args.K - t * kStep,
                          tile + t * kPair + 16 * i);
      }
    }
  }

  // s[row : row + count, rank0 : rank0 + 16] from the sums of a piece, and its tiles.
  void finish_shrink(float* c, int64_t row, int64_t count, int64_t rank0, uint32_t* tiles) const {
    const int n = static_cast<int>(min64(16, args.r - rank0));
    for (int64_t i = 0; i < count; ++i) {
      F32x16 sum = f32_load(c + 16 * i);
      if (Tiles::kParts > 1) {
        const F32x16 rest = f32_add(f32_load(c + kTile + 16 * i), f32_load(c + kProduct + 16 * i));
        sum = f32_add(sum, rest);
      }
      sum = f32_mul(sum, f32_set1(args.s_scale));
      float* out = args.s + (row + i) * args.r + rank0;
      if (n == 16) {
        f32_store(out, sum);
      } else {
        f32_store_n(out, sum, n);
        sum = f32_load_n(out, n);  // an Inf of x times the zeros beyond r is NaN
      }
      Tiles::expand_row(f32_mul(sum, f32_set1(args.scaling)), tiles + 16 * i);
    }
    for (int64_t i = count; i < round_up(count, 4); ++i) {
      Tiles::expand_row(f32_zero(), tiles + 16 * i);
    }
  }

  // s of sixteen ranks for a piece of a chunk.
  void shrink(const Packed& p, const GroupedChunk& chunk, int64_t first, int64_t count,
              int64_t rank0, float* scratch) const {
    constexpr int64_t kSums = kShrinkRows / kPairSide * 2 * kProduct;
    uint32_t* lanes = reinterpret_cast<uint32_t*>(scratch + kSums);
    constexpr int64_t kThird = kShrinkBlock / kStep * kPair;
    for (int64_t k0 = 0; k0 < args.K; k0 += kShrinkBlock) {
      const int64_t steps = ceil_div(min64(kShrinkBlock, args.K - k0), kStep);
      for (int64_t t = 0; t < steps; ++t) {
        float blocks[Tiles::kBlocks * kTile];
        for (int64_t i = 0; i < Tiles::kBlocks; ++i) {
          fetch_block(args.a, chunk, rank0, k0 + t * kStep + 16 * i, args.r, args.K,
                      blocks + i * kTile);
        }
        Tiles::shrink_lanes(blocks, lanes + t * kPair, kThird);
      }
      for (int64_t m = 0; m < count; m += kPairSide) {
        const uint32_t* rows = p.x_at(chunk.slot + (first + m) / kSide) + k0 / kStep * kPair;
        float* c = scratch + m / kPairSide * 2 * kProduct;
        multiply<Math>(rows, lanes, c, steps, k0 == 0, count - m, Tiles::kParts > 1);
        if (Tiles::kParts > 1) {
          multiply<Math>(rows, lanes + kThird, c + kProduct, steps, k0 == 0, count - m, false);
        }
      }
    }
    for (int64_t m = 0; m < count; m += kSide) {
      float* c = quadrant(scratch + m / kPairSide * 2 * kProduct, m % kPairSide, 0);
      finish_shrink(c, chunk.begin + first + m, min64(kSide, count - m), rank0,
                    p.s_at(chunk.slot + (first + m) / kSide) + rank0 / 16 * kRanks);
    }
  }

  // Whether a chunk has so few rows that its factors are multiplied as they are, without tiles.
  static bool bare_factors(const GroupedChunk& chunk) { return chunk.count <= kBareRows; }

  // s of sixteen ranks for a chunk of few rows. Ranks that lie in rows are read one row at a time,
  // as memory is fast where it is read in order; others go by as blocks of sixteen columns.
  void shrink_few(const GroupedChunk& chunk, int64_t rank0, float* scratch) const {
    float* block = scratch + kBareRows * kTile;
    const FactorStack& a = args.a;
    const int ranks = static_cast<int>(min64(16, args.r - rank0));
    std::memset(scratch, 0, static_cast<size_t>(chunk.count * kTile) * 4);
    if (a.strides.column == 1) {
      const int64_t group = a.collected ? chunk.place : chunk.group;
      for (int64_t i = 0; i < ranks; ++i) {
        const int64_t at = group * a.strides.group + (rank0 + i) * a.strides.rank;
        for (int64_t m = 0; m < chunk.count; ++m) {
          f32_store(scratch + m * kTile + 16 * i, dot_row(a, at, source(chunk.begin + m)));
        }
      }
    } else {
      for (int64_t k = 0; k < args.K; k += 16) {
        fetch_block(a, chunk, rank0, k, args.r, args.K, block);
        const int n = static_cast<int>(min64(16, args.K - k));
        for (int64_t m = 0; m < chunk.count; ++m) {
          const F32x16 x = load_any(args.x, args.dtype, source(chunk.begin + m) + k, n);
          float* sums = scratch + m * kTile;
          for (int64_t i = 0; i < kTile; i += 16) {
            f32_store(sums + i, f32_fma(x, f32_load(block + i), f32_load(sums + i)));
          }
        }
      }
    }
    for (int64_t m = 0; m < chunk.count; ++m) {
      transpose_tile(reinterpret_cast<const uint32_t*>(scratch + m * kTile), 16,
                     reinterpret_cast<uint32_t*>(block));
      F32x16 sum = f32_load(block);
      for (int64_t i = 16; i < kTile; i += 16) sum = f32_add(sum, f32_load(block + i));
      float* out = args.s + (chunk.begin + m) * args.r + rank0;
      f32_store_n(out, f32_mul(sum, f32_set1(args.s_scale)), ranks);
    }
  }

  // Sixteen sums that add up to the product of a row of a, from an element on, and one of x.
  F32x16 dot_row(const FactorStack& a, int64_t at, int64_t x) const {
    const int64_t size = size_of(a.dtype);
    const char* next = static_cast<const char*>(a.data) + (at + a.strides.rank) * size;
    for (int64_t i = 0; i < args.K * size; i += 64) __builtin_prefetch(next + i, 0, 2);
    F32x16 sums[2] = {f32_zero(), f32_zero()};
    int64_t k = 0;
    for (; k + 32 <= args.K; k += 32) {
      for (int64_t i = 0; i < 2; ++i) {
        const F32x16 values = load_any(args.x, args.dtype, x + k + 16 * i, 16);
        sums[i] = f32_fma(values, load_any(a.data, a.dtype, at + k + 16 * i, 16), sums[i]);
      }
    }
    for (; k < args.K; k += 16) {
      const int n = static_cast<int>(min64(16, args.K - k));
      const F32x16 values = load_any(args.x, args.dtype, x + k, n);
      sums[0] = f32_fma(values, load_any(a.data, a.dtype, at + k, n), sums[0]);
    }
    return f32_add(sums[0], sums[1]);
  }

  // Adds the ranks of b, times s, to a strip's sums of few rows.
  void expand_few(const GroupedChunk& chunk, int64_t n0, int64_t columns, float* block,
                  float* sums) const {
    for (int64_t rank = 0; rank < args.r; rank += 16) {
      const int64_t ranks = min64(16, args.r - rank);
      for (int64_t j = 0; j < columns; j += kSide) {
        fetch_block(args.b, chunk, rank, n0 + j, args.r, args.N, block);
        float* sum = quadrant(sums + j / kPairSide * kProduct, 0, j % kPairSide);
        for (int64_t m = 0; m < chunk.count; ++m, sum += 16) {
          const float* s = args.s + (chunk.begin + m) * args.r + rank;
          F32x16 acc = f32_load(sum);
          for (int64_t i = 0; i < ranks; ++i) {
            acc = f32_fma(f32_set1(args.scaling * s[i]), f32_load(block + 16 * i), acc);
          }
          f32_store(sum, acc);
        }
      }
    }
  }

  // Rows [first, first + count) of a chunk: x, and s from it.
  void prepare(const Packed& p, const GroupedChunk& chunk, int64_t first, int64_t count,
               float* scratch) const {
    if (bare_factors(chunk)) {
      for (int64_t rank = 0; rank < args.r; rank += 16) shrink_few(chunk, rank, scratch);
      if (!args.weight) return;
    }
    for (int64_t m = 0; m < count; m += kSide) {
      pack_rows(chunk.begin + first + m, min64(kSide, count - m),
                p.x_at(chunk.slot + (first + m) / kSide), p.steps);
    }
    if (bare_factors(chunk)) return;
    for (int64_t rank = 0; rank < args.r; rank += 16) {
      shrink(p, chunk, first, count, rank, scratch);
    }
  }

  int64_t weight_at(int64_t group, int64_t row, int64_t column) const {
    return group * args.weight_group + row * args.weight_row + column;
  }

  void prefetch(int64_t element, int64_t bytes) const {
    const char* p = static_cast<const char*>(args.weight) + element * size_of(args.dtype);
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, 2);
  }

  // Outputs [n0, n0 + columns) and reduction [k0, k0 + count) of a group's weight, in pairs of
  // lanes tiles `stride` dwords apart. What is needed next lies `ahead` elements further.
  void load_weight(int64_t group, int64_t n0, int64_t columns, int64_t k0, int64_t count,
                   int64_t ahead, uint32_t* out, int64_t stride) const {
    const int64_t steps = ceil_div(count, kStep), size = size_of(args.dtype);
    if (args.transposed) {
      for (int64_t t = 0; t < steps; ++t) {
        int64_t starts[kStep];
        const int64_t rows = min64(kStep, count - t * kStep);
        for (int64_t i = 0; i < rows; ++i) {
          starts[i] = weight_at(group, k0 + t * kStep + i, n0);
          prefetch(starts[i] + ahead, columns * size);
        }
        for (int64_t j = 0; j < columns; j += kPairSide) {
          Tiles::lanes(args.weight, args.dtype, starts, rows, min64(kPairSide, columns - j),
                       out + j / kPairSide * stride + t * kPair);
          for (int64_t i = 0; i < rows; ++i) starts[i] += kPairSide;
        }
      }
      return;
    }
    for (int64_t j = 0; j < columns; j += kSide) {
      uint32_t* tile = out + j / kPairSide * stride + j % kPairSide / kSide * kTile;
      const int64_t rows = min64(kSide, columns - j);
      int64_t starts[kSide];
      for (int64_t i = 0; i < rows; ++i) starts[i] = weight_at(group, n0 + j + i, k0);
      for (int64_t t = 0; t < steps; ++t, tile += kPair) {
        for (int64_t i = 0; i < rows; ++i) prefetch(starts[i] + ahead, kStep * size);
        Tiles::turned(args.weight, args.dtype, starts, rows, min64(kStep, count - t * kStep), tile);
        for (int64_t i = 0; i < rows; ++i) starts[i] += kStep;
      }
    }
  }

  // Adds to sum + 16 m the dot products of a row of the weight, from an element on, with kM rows of
  // x that lie as [step][kM][16]. One row at a time: memory is fast where it is read in order.
  template <DType kType, int kM>
  void dot(int64_t element, int64_t count, const float* x, float* sum) const {
    F32x16 acc[kM];
    for (F32x16& lanes : acc) lanes = f32_zero();
    const auto step = [&](int64_t k, int n) {
      const F32x16 weight = load_any(args.weight, kType, element + k, n);
      for (int m = 0; m < kM; ++m) acc[m] = f32_fma(weight, f32_load(x + 16 * m), acc[m]);
      x += kM * 16;
    };
    const int64_t whole = count / 16 * 16;
    for (int64_t k = 0; k < whole; k += 16) step(k, 16);
    if (whole < count) step(whole, static_cast<int>(count - whole));
    for (int m = 0; m < kM; ++m) sum[16 * m] += f32_sum(acc[m]);
  }

  // Adds to a strip's sums its products with kM rows of a slot, whose tiles are `tiles`.
  template <DType kType, int kM>
  void dot_strip(int64_t group, int64_t n0, int64_t columns, const uint32_t* tiles, float* x,
                 float* sums) const {
    for (int64_t k0 = 0; k0 < args.K; k0 += kDotBlock, tiles += kDotBlock / kStep * kPair) {
      const int64_t count = min64(kDotBlock, args.K - k0);
      for (int64_t t = 0; t < ceil_div(count, kStep); ++t) {
        for (int64_t m = 0; m < kM; ++m) {
          std::memcpy(x + (t * kM + m) * 16, tiles + t * kPair + 16 * m, 64);
        }
      }
      for (int64_t j = 0; j < columns; ++j) {
        float* product = sums + j / kPairSide * kProduct;
        dot<kType, kM>(weight_at(group, n0 + j, k0), count, x,
                       quadrant(product, 0, j % kPairSide) + j % kSide);
      }
    }
  }

  // The same where rows of the weight run along the outputs: each is added, times an element of x.
  template <DType kType, int kM>
  void axpy_strip(int64_t group, int64_t n0, int64_t columns, const uint32_t* tiles,
                  float* sums) const {
    constexpr int64_t kRows = 8;  // whose sum starts at zero
    const int64_t size = size_of(args.dtype);
    for (int64_t k0 = 0; k0 < args.K; k0 += kRows) {
      const int64_t rows = min64(kRows, args.K - k0), first = weight_at(group, k0, n0);
      const float* x = reinterpret_cast<const float*>(tiles + k0 / kStep * kPair + k0 % kStep);
      for (int64_t i = 0; i < rows; ++i) {
        prefetch(first + (kRows + i) * args.weight_row, columns * size);
      }
      for (int64_t j = 0; j < columns; j += kSide) {
        const int n = static_cast<int>(min64(kSide, columns - j));
        F32x16 acc[kM];
        for (F32x16& lanes : acc) lanes = f32_zero();
        for (int64_t i = 0; i < rows; ++i) {
          const F32x16 weight = load_any(args.weight, kType, first + i * args.weight_row + j, n);
          for (int m = 0; m < kM; ++m) acc[m] = f32_fma(weight, f32_set1(x[16 * m + i]), acc[m]);
        }
        float* sum = quadrant(sums + j / kPairSide * kProduct, 0, j % kPairSide);
        for (int m = 0; m < kM; ++m, sum += 16) f32_store(sum, f32_add(f32_load(sum), acc[m]));
      }
    }
  }

  template <DType kType, int kM>
  void few_strip(int64_t group, int64_t n0, int64_t columns, const uint32_t* tiles, float* x,
                 float* sums) const {
    args.transposed ? axpy_strip<kType, kM>(group, n0, columns, tiles, sums)
                    : dot_strip<kType, kM>(group, n0, columns, tiles, x, sums);
  }

  template <DType kType>
  void few_rows(const Packed& p, const GroupedChunk& chunk, int64_t n0, int64_t columns, float* x,
                float* sums) const {
    for (int64_t m = 0; m < chunk.count; m += 4) {
      const uint32_t* tiles = p.x_at(chunk.slot) + 16 * m;
      float* to = sums + 16 * m;
      switch (min64(4, chunk.count - m)) {
        case 1:
          few_strip<kType, 1>(chunk.group, n0, columns, tiles, x, to);
          break;
        case 2:
          few_strip<kType, 2>(chunk.group, n0, columns, tiles, x, to);
          break;
        case 3:
          few_strip<kType, 3>(chunk.group, n0, columns, tiles, x, to);
          break;
        default:
          few_strip<kType, 4>(chunk.group, n0, columns, tiles, x, to);
      }
    }
  }

  // Adds a strip's products for few rows, by rows of the weight as they stream by: made into tiles,
  // each would be written and read again for little else.
  void multiply_few(const Packed& p, const GroupedChunk& chunk, int64_t n0, int64_t columns,
                    float* x, float* sums) const {
    switch (args.dtype) {
      case DType::kFloat32:
        return few_rows<DType::kFloat32>(p, chunk, n0, columns, x, sums);
      case DType::kBFloat16:
        return few_rows<DType::kBFloat16>(p, chunk, n0, columns, x, sums);
      default:
        return few_rows<DType::kFloat16>(p, chunk, n0, columns, x, sums);
    }
  }

  // From a block of a strip to the strip's next, or to the first of the one this thread may have
  // next.
  int64_t ahead_of(int64_t k0, const Strip& shape) const {
    const int64_t along = args.transposed ? args.weight_row : 1;
    const int64_t across = args.transposed ? 1 : args.weight_row;
    if (k0 + shape.block < args.K) return shape.block * along;
    return shape.columns * args.threads * across - k0 * along;
  }

  // The ranks of b for a strip.
  void load_ranks(const GroupedChunk& chunk, int64_t n0, int64_t columns, int64_t rank0,
                  uint32_t* out, int64_t stride) const {
    for (int64_t j = 0; j < columns; j += kSide) {
      float block[kTile];
      fetch_block(args.b, chunk, rank0, n0 + j, args.r, args.N, block);
      Tiles::expand_lanes(block, out + j / kPairSide * stride + j % kPairSide / kSide * kTile);
    }
  }

  // Sums of a strip over so many steps, `lanes` being pairs `stride` dwords apart.
  void multiply_strip(const GroupedChunk& chunk, const uint32_t* rows, int64_t pair_stride,
                      const uint32_t* lanes, int64_t stride, int64_t columns, int64_t steps,
                      bool first, float* sums) const {
    const int64_t pairs = ceil_div(columns, kPairSide);
    for (int64_t m = 0; m < chunk.count; m += kPairSide, rows += pair_stride) {
      for (int64_t j = 0; j < pairs; ++j, sums += kProduct) {
        multiply<Math>(rows, lanes + j * stride, sums, steps, first, chunk.count - m,
                       columns - j * kPairSide > kSide);
      }
    }
  }

  // y of sixteen rows and up to 32 columns from two tiles of sums.
  void finish(const float* c, const GroupedChunk& chunk, int64_t row0, int64_t rows, int64_t n0,
              int64_t columns) const {
    const int low = static_cast<int>(min64(kSide, columns));
    const int high = static_cast<int>(columns - low);
    F32x16 bias[2] = {f32_zero(), f32_zero()};
    const auto add = [&](DType dtype, const void* values, int64_t at, F32x16& a, F32x16& b) {
      a = f32_add(a, load_any(values, dtype, at, low));
      if (high > 0) b = f32_add(b, load_any(values, dtype, at + kSide, high));
    };
    if (args.bias) add(args.dtype, args.bias, chunk.group * args.N + n0, bias[0], bias[1]);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t at = (row0 + i) * args.N + n0;
      F32x16 a = f32_load(c + 16 * i), b = high > 0 ? f32_load(c + kTile + 16 * i) : f32_zero();
      if (args.base) add(DType::kFloat32, args.base, at, a, b);
      if (args.bias) a = f32_add(a, bias[0]), b = f32_add(b, bias[1]);
      Tiles::store(args.y, args.dtype, at, a, b, columns);
    }
  }

  // Sums of a strip over the weight.
  void multiply_weight(const Packed& p, const GroupedChunk& chunk, int64_t n0, int64_t columns,
                       const Strip& shape, uint32_t* lanes, float* sums) const {
    if constexpr (Tiles::kFewRows > 0) {
      if (chunk.count <= Tiles::kFewRows) {
        const int64_t values = sums_of(chunk, ceil_div(columns, kPairSide));
        std::memset(sums, 0, static_cast<size_t>(values) * 4);
        multiply_few(p, chunk, n0, columns, reinterpret_cast<float*>(lanes), sums);
        return;
      }
    }
    const int64_t stride = shape.block / kStep * kPair;
    for (int64_t k0 = 0; k0 < args.K; k0 += shape.block) {
      const int64_t count = min64(shape.block, args.K - k0);
      load_weight(chunk.group, n0, columns, k0, count, ahead_of(k0, shape), lanes, stride);
      multiply_strip(chunk, p.x_at(chunk.slot) + k0 / kStep * kPair, p.steps * kPair, lanes, stride,
                     columns, ceil_div(count, kStep), k0 == 0, sums);
    }
  }

  void strip(const Packed& p, const GroupedChunk& chunk, int64_t n0, float* scratch) const {
    const Strip shape = strip_of(chunk.count);
    const int64_t columns = min64(shape.columns, args.N - n0);
    const int64_t pairs = ceil_div(columns, kPairSide);
    uint32_t* lanes = reinterpret_cast<uint32_t*>(scratch);
    float* sums = scratch + kLanes;
    bool first = !args.weight || args.K == 0;
    if (!first) multiply_weight(p, chunk, n0, columns, shape, lanes, sums);
    if (bare_factors(chunk)) {
      if (first) std::memset(sums, 0, static_cast<size_t>(sums_of(chunk, pairs)) * 4);
      expand_few(chunk, n0, columns, scratch, sums);
      return finish_strip(chunk, n0, columns, sums);
    }
    for (int64_t rank = 0; rank < args.r; rank += 16) {
      load_ranks(chunk, n0, columns, rank, lanes, kRanks);
      multiply_strip(chunk, p.s_at(chunk.slot) + rank / 16 * kRanks, p.rank_steps * kPair, lanes,
                     kRanks, columns, Tiles::kRankSteps, first, sums);
      first = false;
    }
    if (first) std::memset(sums, 0, static_cast<size_t>(sums_of(chunk, pairs)) * 4);
    finish_strip(chunk, n0, columns, sums);
  }

  void finish_strip(const GroupedChunk& chunk, int64_t n0, int64_t columns, float* sums) const {
    const int64_t pairs = ceil_div(columns, kPairSide);
    for (int64_t m = 0; m < chunk.count; m += kSide) {
      for (int64_t j = 0; j < columns; j += kPairSide) {
        float* product = sums + (m / kPairSide * pairs + j / kPairSide) * kProduct;
        finish(quadrant(product, m % kPairSide, 0), chunk, chunk.begin + m,
               min64(kSide, chunk.count - m), n0 + j, min64(kPairSide, columns - j));
      }
    }
  }

  static int64_t sums_of(const GroupedChunk& chunk, int64_t pairs) {
    return ceil_div(chunk.count, kPairSide) * pairs * kProduct;
  }

  void run() const {
    const int64_t steps = args.weight || args.r > 0 ? ceil_div(args.K, kStep) : 0;
    const int64_t rank_steps = ceil_div(args.r, 16) * Tiles::kRankSteps;
    const int64_t slot_pairs = ceil_div(plan.slots, 2);
    Scratch x(slot_pairs * steps * kPair * 4), s(slot_pairs * rank_steps * kPair * 4);
    const Packed p{static_cast<uint32_t*>(x.data), static_cast<uint32_t*>(s.data), steps,
                   rank_steps};
    constexpr int64_t kShrink = kShrinkRows / kPairSide * 2 * kProduct + 2 * 8 * kPair;
    constexpr int64_t kStrip = kLanes + kGroupedRows / kPairSide * (kWidest / kPairSide) * kProduct;
    constexpr int64_t kOwn = kShrink > kStrip ? kShrink : kStrip;
    Scratch scratch(args.threads * kOwn * 4);

    // Pieces of chunks and strips of chunks, in the order of the chunks.
    Scratch first(2 * (plan.count + 1) * 8);
    int64_t* pieces = static_cast<int64_t*>(first.data);
    int64_t* strips = pieces + plan.count + 1;
    pieces[0] = strips[0] = 0;
    for (int64_t i = 0; i < plan.count; ++i) {
      const int64_t rows = plan.chunks[i].count;
      pieces[i + 1] = pieces[i] + ceil_div(rows, kShrinkRows);
      strips[i + 1] = strips[i] + (args.y ? ceil_div(args.N, strip_of(rows).columns) : 0);
    }
    parallel_for(args.threads, pieces[plan.count], [&](int64_t task, int thread) {
      typename Math::Session session;
      (void)session;
      const int64_t i = chunk_of(pieces, task), at = (task - pieces[i]) * kShrinkRows;
      const GroupedChunk& chunk = plan.chunks[i];
      prepare(p, chunk, at, min64(kShrinkRows, chunk.count - at), scratch.floats() + thread * kOwn);
    });
    parallel_for(args.threads, strips[plan.count], [&](int64_t task, int thread) {
      typename Math::Session session;
      (void)session;
      const int64_t i = chunk_of(strips, task);
      const GroupedChunk& chunk = plan.chunks[i];
      strip(p, chunk, (task - strips[i]) * strip_of(chunk.count).columns,
            scratch.floats() + thread * kOwn);
    });
    clear_rest();
  }

  // The chunk that a task belongs to: the last whose first task is not after it.
  int64_t chunk_of(const int64_t* first, int64_t task) const {
    int64_t low = 0, high = plan.count;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (first[middle] <= task ? low : high) = middle;
    }
    return low;
  }

  // Rows of no group.
  void clear_rest() const {
    const int64_t rows = args.groups.R - plan.end;
    if (rows == 0) return;
    if (args.y) {
      const int64_t size = args.N * size_of(args.dtype);
      std::memset(static_cast<char*>(args.y) + plan.end * size, 0,
                  static_cast<size_t>(rows * size));
    }
    if (args.r > 0) {
      std::memset(args.s + plan.end * args.r, 0, static_cast<size_t>(rows * args.r) * 4);
    }
  }
};

template <class Math, class Tiles>
void linear(const GroupedLinearArgs& args, const GroupedPlan& plan) {
  Linear<Math, Tiles>{args, plan}.run();
}

}  // namespace grouped
}  // namespace
}  // namespace peftkern
