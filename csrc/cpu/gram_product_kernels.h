// Both products of a step of block Lanczos. Compiled once per instruction set.
//
// A panel is cut into groups of 4 rows and blocks of 32 columns, a block of a group contiguous, so
// that the first product streams through it. Twelve sums stay in registers: of 4 rows with 3
// vectors, then of 32 columns with as many vectors as fit.
#pragma once

#include "nf4_panel.h"
#include "peftkern/gram_product.h"

namespace peftkern {
namespace {
namespace gram_product {

#if defined(__AVX2__) && !defined(__AVX512F__)
struct Floats {
  __m256 v;
};
inline Floats floats_set1(float x) { return {_mm256_set1_ps(x)}; }
inline Floats floats_load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline void floats_store(float* p, Floats a) { _mm256_storeu_ps(p, a.v); }
inline Floats floats_add(Floats a, Floats b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Floats floats_fma(Floats a, Floats b, Floats c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline float floats_sum(Floats a) { return f32_sum({a.v, _mm256_setzero_ps()}); }
#else
using Floats = F32x16;
inline Floats floats_set1(float x) { return f32_set1(x); }
inline Floats floats_load(const float* p) { return f32_load(p); }
inline void floats_store(float* p, const Floats& a) { f32_store(p, a); }
inline Floats floats_add(const Floats& a, const Floats& b) { return f32_add(a, b); }
inline Floats floats_fma(const Floats& a, const Floats& b, const Floats& c) {
  return f32_fma(a, b, c);
}
inline float floats_sum(const Floats& a) { return f32_sum(a); }
#endif

constexpr int64_t kRows = 64;   // of a panel
constexpr int kGroup = 4;       // rows of a group
constexpr int64_t kBlock = 32;  // columns of a block
constexpr int64_t kChunk = 32;  // blocks whose products are summed in registers
constexpr int kFloats = sizeof(Floats) / sizeof(float);
constexpr int kVectors = kBlock / kFloats;  // registers
constexpr int kDots = 3;                    // vectors of x at a time
constexpr int kOuter = 12 / kVectors;       // vectors of y at a time
constexpr int64_t kGroupBlock = kGroup * kBlock;

// Where the next panel is in memory, a line of which is fetched with each block of this one.
struct Ahead {
  const char* at = nullptr;
  const char* end = nullptr;
  int lines = 0;
  [[gnu::always_inline]] void fetch() {
    for (int i = 0; i < lines && at < end; ++i, at += 64) __builtin_prefetch(at, 0, 2);
  }
};

// y[i][c] += rows i of a group times vectors c of x, over `blocks` blocks.
template <int kC>
inline void dots(const float* group, const float* x, int64_t x_step, int64_t blocks, float* y,
                 int64_t width, Ahead& ahead) {
  Floats acc[kGroup][kC];
  for (auto& row : acc) {
    for (Floats& sum : row) sum = floats_set1(0.0f);
  }
  for (int64_t b = 0; b < blocks; ++b, group += kGroupBlock, x += x_step) {
    ahead.fetch();
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      Floats right[kC];
      for (int c = 0; c < kC; ++c) right[c] = floats_load(x + c * kBlock + v * kFloats);
#pragma GCC unroll 4
      for (int i = 0; i < kGroup; ++i) {
        const Floats left = floats_load(group + i * kBlock + v * kFloats);
        for (int c = 0; c < kC; ++c) acc[i][c] = floats_fma(left, right[c], acc[i][c]);
      }
    }
  }
  for (int i = 0; i < kGroup; ++i) {
    for (int c = 0; c < kC; ++c) y[i * width + c] += floats_sum(acc[i][c]);
  }
}

// z[c][32] += sum over rows of y[i][c] times a block of row i.
template <int kC>
inline void outer(const float* block, int64_t group_step, int64_t groups, const float* y,
                  int64_t width, float* z) {
  Floats acc[kC][kVectors];
  for (auto& row : acc) {
    for (Floats& sum : row) sum = floats_set1(0.0f);
  }
  for (int64_t g = 0; g < groups; ++g, block += group_step) {
#pragma GCC unroll 4
    for (int i = 0; i < kGroup; ++i, y += width) {
      Floats left[kC];
      for (int c = 0; c < kC; ++c) left[c] = floats_set1(y[c]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const Floats right = floats_load(block + i * kBlock + v * kFloats);
        for (int c = 0; c < kC; ++c) acc[c][v] = floats_fma(left[c], right, acc[c][v]);
      }
    }
  }
  for (int c = 0; c < kC; ++c) {
    for (int v = 0; v < kVectors; ++v) {
      float* sum = z + c * kBlock + v * kFloats;
      floats_store(sum, floats_add(floats_load(sum), acc[c][v]));
    }
  }
}

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// function(kC) for the kC <= kMost vectors that are left, as a constant.
template <int kMost, class Function>
inline void with_count(int64_t count, const Function& function) {
  if constexpr (kMost > 1) {
    if (count < kMost) return with_count<kMost - 1>(count, function);
  }
  function(Constant<kMost>{});
}

// The scratch of a call, and what of it the sizes are.
class Products {
 public:
  explicit Products(const GramProductArgs& args)
      : args_(args),
        width_(args.width),
        blocks_(ceil_div(args.n, kBlock)),
        group_step_(blocks_ * kGroupBlock + 16),
        panel_((kRows / kGroup * group_step_ + 16) * 4),
        x_((blocks_ * width_ * kBlock + 16) * 4),
        z_(((args.z ? blocks_ * width_ * kBlock : 0) + 16) * 4),
        y_((kRows * width_ + 16) * 4),
        absmax_(((args.weight ? 0 : kRows * args.n / args.w.blocksize) + 32) * 4) {}

  void run() {
    pack_x();
    if (args_.z) std::memset(z_.floats(), 0, blocks_ * width_ * kBlock * 4);
    for (int64_t begin = 0; begin < args_.m; begin += kRows) {
      const int64_t rows = min64(kRows, args_.m - begin), groups = ceil_div(rows, kGroup);
      pack_rows(begin, rows, groups);
      if (args_.squares) panel_squares(rows, args_.squares + begin);
      multiply(groups, ahead_of(begin + rows));
      for (int64_t c = 0; c < width_; ++c) {
        for (int64_t i = 0; i < rows; ++i) {
          args_.y[c * args_.m + begin + i] = y_.floats()[i * width_ + c];
        }
      }
      if (!args_.z) continue;
      const int64_t padded = groups * kGroup - rows;  // where an Inf of x times zeros is NaN
      std::memset(y_.floats() + rows * width_, 0, static_cast<size_t>(padded * width_) * 4);
      multiply_back(groups);
    }
    if (args_.z) unpack_z();
  }

 private:
  int64_t columns(int64_t block) const { return min64(kBlock, args_.n - block * kBlock); }

  void pack_x() {
    float* out = x_.floats();
    for (int64_t b = 0; b < blocks_; ++b) {
      for (int64_t c = 0; c < width_; ++c, out += kBlock) {
        copy(args_.x, DType::kFloat32, c * args_.n + b * kBlock, columns(b), out);
      }
    }
  }

  // A block of 32 floats of n values, zero behind them.
  static void copy(const void* src, DType dtype, int64_t at, int64_t n, float* out) {
    for (int64_t i = 0; i < kBlock; i += 16) {
      const int count = static_cast<int>(min64(16, n - i));
      f32_store(out + i, count > 0 ? load_any(src, dtype, at + i, count) : f32_zero());
    }
  }

  void pack_rows(int64_t begin, int64_t rows, int64_t groups) {
    float* panel = panel_.floats();
    Absmax absmax = {};
    if (!args_.weight) {
      absmax = expand_rows(args_.w, begin * args_.n, rows * args_.n, absmax_.floats());
    }
    for (int64_t i = 0; i < groups * kGroup; ++i) {
      float* row = panel + i / kGroup * group_step_ + i % kGroup * kBlock;
      const int64_t n = i < rows ? args_.n : 0, at = (begin + i) * args_.n;
      int64_t b = 0;
      if (args_.weight) {
        for (; b * kBlock < n; ++b) {
          copy(args_.weight, args_.dtype, at + b * kBlock, columns(b), row + b * kGroupBlock);
        }
      } else if (n > 0) {
        const auto target = [=](int64_t j) {
          return reinterpret_cast<uint32_t*>(row + j / 2 * kGroupBlock + j % 2 * 16);
        };
        Float32Math::decode(args_.w, absmax, at, n, DType::kFloat32, target);
        if (ceil_div(n, 16) % 2) std::memset(target(ceil_div(n, 16)), 0, 64);
        b = blocks_;
      }
      for (; b < blocks_; ++b) std::memset(row + b * kGroupBlock, 0, kBlock * 4);
    }
  }

  void panel_squares(int64_t rows, float* squares) const {
    for (int64_t i = 0; i < rows; ++i) {
      const float* row = panel_.floats() + i / kGroup * group_step_ + i % kGroup * kBlock;
      Floats sums[kVectors];
      for (Floats& sum : sums) sum = floats_set1(0.0f);
      for (int64_t b = 0; b < blocks_; ++b, row += kGroupBlock) {
        for (int v = 0; v < kVectors; ++v) {
          const Floats value = floats_load(row + v * kFloats);
          sums[v] = floats_fma(value, value, sums[v]);
        }
      }
      squares[i] = 0.0f;
      for (const Floats& sum : sums) squares[i] += floats_sum(sum);
    }
  }

  Ahead ahead_of(int64_t begin) const {
    if (!args_.weight || width_ == 0) return {};
    const int64_t item = args_.dtype == DType::kFloat32 ? 4 : 2, row = args_.n * item;
    const char* data = static_cast<const char*>(args_.weight) + begin * row;
    const int64_t lines = kGroupBlock * item / 64;  // of a block of a group
    return {data, data + min64(kRows, args_.m - begin) * row,
            static_cast<int>(ceil_div(lines, ceil_div(width_, kDots)))};
  }

  void multiply(int64_t groups, Ahead ahead) {
    float* y = y_.floats();
    std::memset(y, 0, groups * kGroup * width_ * 4);
    const int64_t x_step = width_ * kBlock;
    for (int64_t b = 0; b < blocks_; b += kChunk) {
      const int64_t count = min64(kChunk, blocks_ - b);
      for (int64_t g = 0; g < groups; ++g) {
        const float* group = panel_.floats() + g * group_step_ + b * kGroupBlock;
        for (int64_t c = 0; c < width_; c += kDots) {
          with_count<kDots>(width_ - c, [&](auto vectors) {
            dots<vectors.value>(group, x_.floats() + b * x_step + c * kBlock, x_step, count,
                                y + g * kGroup * width_ + c, width_, ahead);
          });
        }
      }
    }
  }

  void multiply_back(int64_t groups) {
    for (int64_t b = 0; b < blocks_; ++b) {
      const float* block = panel_.floats() + b * kGroupBlock;
      float* z = z_.floats() + b * width_ * kBlock;
      int64_t next = 0;  // group of the next block, which is fetched meanwhile
      for (int64_t c = 0; c < width_; c += kOuter) {
        const int64_t stop = min64(groups, next + ceil_div(groups * kOuter, width_));
        for (; next < stop; ++next) {
          const float* ahead = block + kGroupBlock + next * group_step_;
          for (int64_t i = 0; i < kGroupBlock; i += 16) __builtin_prefetch(ahead + i);
        }
        with_count<kOuter>(width_ - c, [&](auto vectors) {
          outer<vectors.value>(block, group_step_, groups, y_.floats() + c, width_, z + c * kBlock);
        });
      }
    }
  }

  void unpack_z() {
    const float* z = z_.floats();
    for (int64_t b = 0; b < blocks_; ++b) {
      for (int64_t c = 0; c < width_; ++c, z += kBlock) {
        std::memcpy(args_.z + c * args_.n + b * kBlock, z, columns(b) * 4);
      }
    }
  }

  const GramProductArgs& args_;
  const int64_t width_, blocks_, group_step_;
  Scratch panel_, x_, z_, y_, absmax_;
};

void run(const GramProductArgs& args) { Products(args).run(); }

}  // namespace gram_product
}  // namespace
}  // namespace peftkern
