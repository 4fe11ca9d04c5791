// Operands of nf4_lora_linear_sm90a.cu's products: x in their order, s, and the update's factors as
// columns beside x and W.
#pragma once

#include "intrinsics_sm90a.cuh"
#include "launch.cuh"

namespace peftkern {
namespace {

constexpr int kThreads = 256;  // two warpgroups
constexpr int kUnit = 64;      // columns of W in a step
constexpr int kSlice = 256;    // columns of x, for one partial sum of s
constexpr int kSliceRows = 32;

// Position of column c of 64 that puts lane t's 16 columns from 16t on into its A registers:
// 16t+4j+{0,1} is step j's 2t+{0,1}, 16t+4j+{2,3} its 2t+8+{0,1}.
__host__ __device__ constexpr int position(int c) {
  return c % 16 / 4 * 16 + c % 4 / 2 * 8 + c / 16 * 2 + c % 2;
}

// ---- prologue: x in the order of the products, and s in slices of K

struct PrologueArgument {
  int M, r;
  int64_t K, rows;
  void* ordered;   // [steps, rows, 64]
  float* s_parts;  // [slices, M, r]
};

// A warp's sums of 32 values, value i in lane i: each step halves what a lane still has.
__device__ __forceinline__ float lanes_sums(float (&value)[32]) {
#pragma unroll
  for (int step = 0; step < 5; ++step) {
    const int half = 16 >> step;
    const bool upper = lane_index() & half;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      if (i >= half) continue;
      const float mine = upper ? value[i + half] : value[i];
      const float other = upper ? value[i] : value[i + half];
      value[i] = mine + __shfl_xor_sync(kFullMask, other, half);
    }
  }
  return value[0];
}

// Block (slice of K, 32 rows of x), four of them a warp's.
template <typename T, typename A>
__global__ void __launch_bounds__(kThreads)
    prologue_kernel(const __grid_constant__ PrologueArgument a, const T* __restrict__ x,
                    const A* __restrict__ lora_A) {
  allow_following();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kSlice;
  const int first_row = static_cast<int>(blockIdx.y) * kSliceRows;
#pragma unroll
  for (int i = 0; i < kSliceRows * (kSlice / 8) / kThreads; ++i) {
    const int piece = static_cast<int>(threadIdx.x) % (kSlice / 8);  // 16 bytes of what is written
    const int row =
        first_row + i * (kThreads / (kSlice / 8)) + static_cast<int>(threadIdx.x) / (kSlice / 8);
    const int64_t unit = first + piece / 8 * kUnit;
    if (unit >= a.K) continue;
    uint4 values = make_uint4(0, 0, 0, 0);
    const int pair = piece % 8;  // 2j + h: columns 16t + 4j + 2h of every t
    if (row < a.M) {
      const uint32_t* from = reinterpret_cast<const uint32_t*>(x + row * a.K + unit) + pair;
      values = make_uint4(__ldg(from), __ldg(from + 8), __ldg(from + 16), __ldg(from + 24));
    }
    static_cast<uint4*>(a.ordered)[(unit / kUnit * a.rows + row) * 8 + pair] = values;
  }
  if (a.r == 0) return;

  const int64_t k = first + 8 * lane_index();
  const bool in_k = k < a.K;  // a multiple of 64
  const int warp_row = first_row + 4 * warp_index();
  float value[4][8] = {};
#pragma unroll
  for (int m = 0; m < 4; ++m) {
    if (in_k && warp_row + m < a.M) load_eight(x + (warp_row + m) * a.K + k, value[m]);
  }
#pragma unroll 1
  for (int rank = 0; rank < a.r; rank += 8) {
    float sums[32];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float factor[8] = {};
      if (in_k && rank + j < a.r) load_eight(lora_A + (rank + j) * a.K + k, factor);
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        sums[8 * m + j] = 0.0f;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          sums[8 * m + j] = __fmaf_rn(value[m][i], factor[i], sums[8 * m + j]);
        }
      }
    }
    const float sum = lanes_sums(sums);
    const int row = warp_row + lane_index() / 8, own = rank + lane_index() % 8;
    if (row < a.M && own < a.r) {
      a.s_parts[(static_cast<int64_t>(blockIdx.x) * a.M + row) * a.r + own] = sum;
    }
  }
}

// ---- adapters: s, and both factors of the update as bfloat16 columns beside x and W

struct AdapterArgument {
  int M, N, r, extra, slices, units;
  int64_t rows;
  float scaling;
  float *s, *s_parts;
  uint16_t *ordered, *b;  // [steps, rows, 64], [N, extra]
};

// The value rounded to bfloat16, or what that leaves, rounded. What is not finite is in kHigh
// alone: beside a zero of the other factor it would make a NaN of an infinity.
enum Part { kHigh, kHighIfFinite, kRest };
__device__ __forceinline__ uint16_t part_of(float value, Part part) {
  const BF16 high = from_float<BF16>(value);
  if (part == kHigh) return high.bits;
  if ((high.bits & 0x7f80) == 0x7f80) return 0;
  if (part == kHighIfFinite) return high.bits;
  return from_float<BF16>(__fsub_rn(value, to_float(high))).bits;
}

// Column c: rank c % r of (b high)(s high), (b high)(s rest) or (b rest)(s high), for c / r = 0,
// 1, 2.
template <typename B>
__global__ void __launch_bounds__(kThreads)
    adapter_kernel(const __grid_constant__ AdapterArgument a, const B* __restrict__ lora_B) {
  allow_following();
  wait_for_preceding();
  const int64_t items = (a.rows + a.N) * a.extra;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < items;
       i += stride) {
    const int64_t row = i / a.extra;
    const int column = static_cast<int>(i % a.extra), term = column / a.r, rank = column % a.r;
    if (row < a.rows) {
      uint16_t bits = 0;
      if (term < 3 && row < a.M) {
        float sum = 0.0f;
        for (int slice = 0; slice < a.slices; ++slice) {
          sum += a.s_parts[(slice * static_cast<int64_t>(a.M) + row) * a.r + rank];
        }
        if (term == 0) a.s[row * a.r + rank] = sum;
        bits = part_of(sum, term == 0 ? kHigh : term == 1 ? kRest : kHighIfFinite);
      }
      const int64_t step = a.units + column / kUnit;
      a.ordered[(step * a.rows + row) * kUnit + position(column % kUnit)] = bits;
    } else {
      const int64_t n = row - a.rows;
      uint16_t bits = 0;
      if (term < 3) {
        const float factor = a.scaling * to_float(lora_B[n * a.r + rank]);
        bits = part_of(factor, term == 0 ? kHigh : term == 1 ? kHighIfFinite : kRest);
      }
      a.b[n * a.extra + column] = bits;
    }
  }
}

}  // namespace
}  // namespace peftkern
