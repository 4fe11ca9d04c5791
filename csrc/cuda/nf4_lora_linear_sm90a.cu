// y = x W^T + scaling s lora_B^T + bias with W in NF4, s = x lora_A^T, for 33 to 512 rows of x on
// sm_90a: up to four launches, each of which begins while the previous one ends.
//
//   prologue  writes x in the order of the products, and s in slices of K
//   adapter   adds up s; writes s and scaling lora_B as bfloat16 columns beside x and W (if r > 0)
//   product   y^T = W x^T by wgmma, W from registers; where K is split, its parts
//   reduce    adds the parts up in order
//
// A block has 128 rows of W and C = 64, 128 or 256 of x. Clocks of a step of 64 columns with C =
// 128: tensor cores 512, issue 384, integer pipe 482, shared memory 480, x from L2 683: L2 is the
// limit from 128 rows on, at best 75% of the tensor cores, the integer pipe below. If 50 to 65% of
// 790 TFLOP/s are left, dequantizing and cuBLAS break even at 235 to 436 rows. Counted, not
// measured.
#include <algorithm>

#include "intrinsics_sm90a.cuh"
#include "launch.cuh"
#include "nf4.cuh"
#include "nf4_lora_linear.cuh"
#include "nf4_operands_sm90a.cuh"
#include "peftkern/cuda_nf4_lora_linear_sm90a.h"

namespace peftkern {
namespace {

constexpr int kRows = 128;      // of W in a block
constexpr int kChunk = 32;      // rows of y that are stored together
constexpr int kStoreRow = 136;  // 128 values and 16 bytes, so that rows begin in different banks

// By kColumns, the rows of x in a block: how many steps' tiles of x are in shared memory.
__host__ __device__ constexpr int stages_of(int columns) { return columns == 256 ? 5 : 6; }
__host__ __device__ constexpr int shared_bytes(int columns) {
  return stages_of(columns) * columns * 128 + (4 * kRows + 256) * 4;
}

struct Plan {
  int columns, row_tiles, column_tiles, splits;
  int units, steps, split_steps;            // units of W's columns; steps: those and the adapters'
  int slices, extra;                        // of s; columns for the adapters
  int64_t rows;                             // of x, filled up with zeros to whole tiles
  int64_t x, b, s_parts, parts, workspace;  // offsets, and their end
};

// Clocks of an SM for a step: of the tensor cores, or of the integer pipe.
int64_t step_cost(int columns) { return std::max<int64_t>(4 * columns, 480); }

Plan plan_of(int64_t M, int64_t N, int64_t K, int64_t r, int64_t splits) {
  Plan p = {};
  int64_t best = 0;
  for (int columns : {64, 128, 256}) {
    const int64_t cost = (M + columns - 1) / columns * step_cost(columns);
    if (p.columns == 0 || cost <= best) p.columns = columns, best = cost;
  }
  p.row_tiles = static_cast<int>((N + kRows - 1) / kRows);
  p.column_tiles = static_cast<int>((M + p.columns - 1) / p.columns);
  p.units = static_cast<int>(K / kUnit);
  p.extra = static_cast<int>((3 * r + kUnit - 1) / kUnit * kUnit);
  p.steps = p.units + p.extra / kUnit;
  if (splits == 0) {  // as many blocks as fit at once, eight steps each at least
    const int64_t tiles = int64_t{p.row_tiles} * p.column_tiles;
    splits = std::min<int64_t>({multiprocessors() / tiles, p.steps / 8, kCudaPrefillSplits});
    splits = std::max<int64_t>(splits, 1);
  }
  p.split_steps = static_cast<int>((p.steps + splits - 1) / splits);
  p.splits = (p.steps + p.split_steps - 1) / p.split_steps;  // none is empty
  p.slices = static_cast<int>((K + kSlice - 1) / kSlice);
  p.rows = int64_t{p.column_tiles} * p.columns;
  const auto take = [&p](int64_t bytes) {
    const int64_t begin = p.workspace;
    p.workspace += (bytes + 255) / 256 * 256;
    return begin;
  };
  p.x = take(p.steps * p.rows * kUnit * 2);
  p.b = take(N * p.extra * 2);
  p.s_parts = take(p.slices * M * r * 4);
  const int64_t tile = int64_t{kRows} * p.columns * 4;
  p.parts = take(p.splits > 1 ? p.splits * p.column_tiles * p.row_tiles * tile : 0);
  return p;
}

// ---- y

struct ProductArgument {
  NF4Argument w;
  int M, N, units, steps, split_steps, extra;
  int64_t K, rows;
  const void *ordered, *bias;
  const uint16_t* b;
  void* y;
  float* parts;  // null: y is written
};

// Sixteen values code * absmax of a row, rounded to T, as planes of low and of high bytes. A quad
// has a row: each lane scales the four codes from 4t on and gets the others' at [lane ^ t].
struct Planes {
  uint32_t low[4], high[4];
};
template <typename T>
__device__ __forceinline__ Planes make_planes(const float (&code)[4], float absmax) {
  const uint32_t first = pack2<T>(__fmul_rn(code[0], absmax), __fmul_rn(code[1], absmax));
  const uint32_t second = pack2<T>(__fmul_rn(code[2], absmax), __fmul_rn(code[3], absmax));
  Planes planes;
  planes.low[0] = permute_bytes(first, second, 0x6420);
  planes.high[0] = permute_bytes(first, second, 0x7531);
#pragma unroll
  for (int i = 1; i < 4; ++i) {
    planes.low[i] = __shfl_xor_sync(kFullMask, planes.low[0], i);
    planes.high[i] = __shfl_xor_sync(kFullMask, planes.high[0], i);
  }
  return planes;
}

// The selectors of a lane: its planes are in the order of lane ^ t, so codes are, too.
struct Selectors {
  uint32_t flip, halves;
};
__device__ __forceinline__ Selectors make_selectors() {
  const uint32_t flip = static_cast<uint32_t>(lane_index() & 3) * 0x44444444u;
  return {flip, (flip >> 1 & 0x44444444u) ^ 0x32103210u};
}

// Four codes (16 bits) to two pairs of values: bit 3 of a code chooses between two lookups.
__device__ __forceinline__ void decode_four(const Planes& planes, uint32_t codes, uint32_t halves,
                                            uint32_t& first, uint32_t& second) {
  const uint32_t low = permute_bytes(permute_bytes(planes.low[0], planes.low[1], codes),
                                     permute_bytes(planes.low[2], planes.low[3], codes), halves);
  const uint32_t high = permute_bytes(permute_bytes(planes.high[0], planes.high[1], codes),
                                      permute_bytes(planes.high[2], planes.high[3], codes), halves);
  first = permute_bytes(low, high, 0x4051);  // the even weight is the byte's high half
  second = permute_bytes(low, high, 0x6273);
}

// A lane's 16 codes of one row: registers kRow and kRow + 2 of the four steps.
template <int kRow>
__device__ __forceinline__ void decode_row(const Planes& planes, uint2 codes,
                                           const Selectors& select, uint32_t (&A)[4][4]) {
  const uint32_t word[2] = {codes.x, codes.y};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t index = (word[i] ^ select.flip) & 0x77777777u;
    const uint32_t halves = (word[i] >> 1 & 0x44444444u) ^ select.halves;
    decode_four(planes, index, halves, A[2 * i][kRow], A[2 * i][kRow + 2]);
    decode_four(planes, index >> 16, halves >> 16, A[2 * i + 1][kRow], A[2 * i + 1][kRow + 2]);
  }
}

// The same from 16 values of lora_B's columns as they are.
template <int kRow>
__device__ __forceinline__ void load_adapter(const uint16_t* from, uint32_t (&A)[4][4]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint4 pairs = reinterpret_cast<const uint4*>(from)[i];
    A[2 * i][kRow] = pairs.x, A[2 * i][kRow + 2] = pairs.y;
    A[2 * i + 1][kRow] = pairs.z, A[2 * i + 1][kRow + 2] = pairs.w;
  }
}

// 32 rows of y from all 256 threads, sums[q] those of rows 8q ... 8q+7 of them: through shared
// memory, for a lane's sums are two rows' each. `first_n` is the block's first column of y.
template <typename T>
__device__ __forceinline__ void store_chunk(const float (&sums)[4][4], uint16_t* buffer, T* y,
                                            int first_m, int64_t first_n, int M, int64_t N) {
  const int lane = lane_index(), g = lane / 4, t = lane % 4;
  __syncthreads();  // whatever the buffer was before is read
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    const uint32_t low = pack2<T>(sums[q][0], sums[q][1]), high = pack2<T>(sums[q][2], sums[q][3]);
    uint16_t* place = buffer + (8 * q + 2 * t) * kStoreRow + 16 * warp_index() + g;
    place[0] = static_cast<uint16_t>(low);
    place[kStoreRow] = static_cast<uint16_t>(low >> 16);
    place[8] = static_cast<uint16_t>(high);
    place[kStoreRow + 8] = static_cast<uint16_t>(high >> 16);
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kChunk * (kRows / 8) / kThreads; ++i) {
    const int row = (i * kThreads + static_cast<int>(threadIdx.x)) / (kRows / 8);
    const int piece = static_cast<int>(threadIdx.x) % (kRows / 8);
    const int64_t m = first_m + row, n = first_n + 8 * piece;
    if (m >= M || n >= N) continue;
    const uint16_t* from = buffer + row * kStoreRow + 8 * piece;
    T* to = y + m * N + n;
    if (n + 8 <= N && (N % 8) == 0) {
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    } else {
      for (int j = 0; j < 8 && n + j < N; ++j) to[j] = T{from[j]};
    }
  }
}

// bias of rows 16 warp + g and 8 more of the block's.
template <typename T>
__device__ __forceinline__ float2 load_bias(const void* bias, int64_t first_n, int64_t N) {
  if (!bias) return make_float2(0.0f, 0.0f);
  const int64_t n = first_n + 16 * warp_index() + lane_index() / 4;
  const T* values = static_cast<const T*>(bias);
  return make_float2(n < N ? to_float(values[n]) : 0.0f,
                     n + 8 < N ? to_float(values[n + 8]) : 0.0f);
}

template <typename T, bool kNested, int kColumns>
__global__ void __launch_bounds__(kThreads, 1)
    product_kernel(const __grid_constant__ ProductArgument a) {
  constexpr int kStages = stages_of(kColumns), kAhead = kStages - 2;
  constexpr int kStage = kColumns * 128;
  unsigned char* ring = dynamic_shared<unsigned char>();
  float* absmax_ring = reinterpret_cast<float*>(ring + kStages * kStage);  // [2][2][kRows]
  float* nested_code = absmax_ring + 4 * kRows;
  const int thread = static_cast<int>(threadIdx.x), lane = lane_index(), g = lane / 4, t = lane % 4;
  const int64_t first_n = static_cast<int64_t>(blockIdx.x) * kRows, last_n = a.N - 1;
  const int first_m = static_cast<int>(blockIdx.y) * kColumns;
  const int first_step = static_cast<int>(blockIdx.z) * a.split_steps;
  const int steps = min(a.split_steps, a.steps - first_step);
  const int units = min(max(a.units - first_step, 0), steps);  // the adapters' steps follow

  // Two rows of W are a lane's; rows past the end are the last one again, and are not stored.
  const int own = 16 * warp_index() + g;
  const int64_t row = min(first_n + own, last_n), row8 = min(first_n + own + 8, last_n);
  const uint8_t* codes_at = a.w.packed + row * (a.K / 2) + first_step * (kUnit / 2) + 8 * t;
  const uint8_t* codes8_at = a.w.packed + row8 * (a.K / 2) + first_step * (kUnit / 2) + 8 * t;
  uint2 codes[2], codes8[2];  // of the next two steps
  const auto load_codes = [&](int step, uint2& low, uint2& high) {
    if (step >= units) return;
    low = load_once8(codes_at + step * (kUnit / 2));
    high = load_once8(codes8_at + step * (kUnit / 2));
  };

  // absmax of two steps is one value per thread, in shared memory a pair of steps ahead.
  const int64_t absmax_row = min(first_n + thread % kRows, last_n) * a.K;
  uint32_t raw;
  float scale;
  const auto load_absmax = [&](int step) {
    const int unit = min(first_step + step + thread / kRows, a.units - 1);
    const int64_t block = (absmax_row + int64_t{unit} * kUnit) >> a.w.blocksize_log2;
    raw = load_raw_absmax<kNested>(a.w, block);
    if constexpr (kNested) scale = __ldg(a.w.nested_absmax + (block >> a.w.nested_log2));
  };
  const float offset = load_offset<kNested>(a.w);
  const auto store_absmax = [&](int step) {
    float value = __uint_as_float(raw);
    if constexpr (kNested) value = __fadd_rn(__fmul_rn(nested_code[raw], scale), offset);
    absmax_ring[step % 4 / 2 * 2 * kRows + thread] = value;
  };

  load_codes(0, codes[0], codes8[0]);
  load_codes(1, codes[1], codes8[1]);
  load_absmax(0);
  if constexpr (kNested) {
    nested_code[thread] = __ldg(a.w.nested_code + thread);
    __syncthreads();
  }
  store_absmax(0);
  load_absmax(2);
  float code[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) code[i] = a.w.code[4 * t + i];
  const Selectors select = make_selectors();

  // Tiles of x: 16 bytes of every 32nd row are a thread's.
  wait_for_preceding();
  const unsigned char* copy_from = static_cast<const unsigned char*>(a.ordered) +
                                   (first_step * a.rows + first_m) * 128 + thread * 16;
  unsigned char* copy_to = ring + swizzled(thread / 8, thread % 8);
  int copy_stage = 0;
  const auto copy_step = [&](int step) {
    if (step < steps) {
#pragma unroll
      for (int i = 0; i < kColumns / 32; ++i) {
        copy_async16(copy_to + copy_stage * kStage + 32 * i * 128, copy_from + 32 * i * 128);
      }
    }
    copy_async_commit();
    copy_from += a.rows * 128;
    copy_stage = copy_stage + 1 == kStages ? 0 : copy_stage + 1;
  };
  for (int step = 0; step < kAhead; ++step) copy_step(step);
  __syncthreads();  // absmax

  // A step's tile of x is there for all, and the products before the last have ended in both
  // warpgroups, so that the tile they read can be overwritten.
  float sums[kColumns / 2] = {};
  const uint64_t first_tile = shared_tile(ring);
  int stage = 0;
  const auto tile_arrives = [&]() {
    copy_async_wait<kAhead - 1>();
    fence_shared();
    __syncthreads();
    const uint64_t tile = first_tile + static_cast<uint64_t>(stage * (kStage / 16));
    stage = stage + 1 == kStages ? 0 : stage + 1;
    return tile;
  };

  const auto decode_unit = [&](int step, uint2 low, uint2 high, uint32_t (&unit)[4][4]) {
    const float* absmax = absmax_ring + step % 4 * kRows + own;
    decode_row<0>(make_planes<T>(code, absmax[0]), low, select, unit);
    decode_row<1>(make_planes<T>(code, absmax[8]), high, select, unit);
  };

  // While the products of one unit run, the next is decoded. ptxas sees that they use other
  // registers only in a loop without a way out of its middle.
  uint32_t A[2][4][4];
#pragma unroll 1
  for (int pair = 0; pair < units / 2 * 2; pair += 2) {
    store_absmax(pair + 2);
    load_absmax(pair + 4);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int step = pair + i;
      decode_unit(step, codes[i], codes8[i], A[i]);
      load_codes(step + 2, codes[i], codes8[i]);
      const uint64_t tile = tile_arrives();
      products_fence();
#pragma unroll
      for (int j = 0; j < 4; ++j) product_m64k16<T, kColumns>(sums, A[i][j], tile + 2 * j);
      products_commit();
      copy_step(step + kAhead);
      products_wait<1>();
    }
  }
  products_wait<0>();
  if (units % 2) {
    decode_unit(units - 1, codes[0], codes8[0], A[0]);
    const uint64_t tile = tile_arrives();
    products_fence();
#pragma unroll
    for (int j = 0; j < 4; ++j) product_m64k16<T, kColumns>(sums, A[0][j], tile + 2 * j);
    products_commit();
    copy_step(units - 1 + kAhead);
    products_wait<0>();
  }
#pragma unroll 1
  for (int step = units; step < steps; ++step) {
    const int column = (first_step + step - a.units) * kUnit + 16 * t;
    load_adapter<0>(a.b + row * a.extra + column, A[0]);
    load_adapter<1>(a.b + row8 * a.extra + column, A[0]);
    const uint64_t tile = tile_arrives();
    products_fence();
#pragma unroll
    for (int j = 0; j < 4; ++j) product_m64k16<BF16, kColumns>(sums, A[0][j], tile + 2 * j);
    products_commit();
    copy_step(step + kAhead);
    products_wait<0>();
  }

  if (a.parts) {
    const int64_t tile =
        (static_cast<int64_t>(blockIdx.z) * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    float4* to = reinterpret_cast<float4*>(a.parts) + tile * (kColumns / 8) * kThreads + thread;
#pragma unroll
    for (int q = 0; q < kColumns / 8; ++q) {
      to[q * kThreads] =
          make_float4(sums[4 * q], sums[4 * q + 1], sums[4 * q + 2], sums[4 * q + 3]);
    }
    return;
  }
  const float2 bias = load_bias<T>(a.bias, first_n, a.N);
#pragma unroll
  for (int chunk = 0; chunk < kColumns / kChunk; ++chunk) {
    if (first_m + chunk * kChunk >= a.M) break;
    float part[4][4];
#pragma unroll
    for (int q = 0; q < 4; ++q) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        part[q][i] = sums[16 * chunk + 4 * q + i] + (i < 2 ? bias.x : bias.y);
      }
    }
    store_chunk(part, reinterpret_cast<uint16_t*>(ring), static_cast<T*>(a.y),
                first_m + chunk * kChunk, first_n, a.M, a.N);
  }
}

// ---- the sums of splits, in their order. Block (row tile, 32 rows of y, column tile).

struct ReduceArgument {
  int M, N, columns, splits;
  const float* parts;
  const void* bias;
  void* y;
};

template <typename T>
__global__ void __launch_bounds__(kThreads)
    reduce_kernel(const __grid_constant__ ReduceArgument a) {
  wait_for_preceding();
  PEFTKERN_SHARED(buffer, uint4[kChunk * kStoreRow / 8]);
  const int first_m =
      static_cast<int>(blockIdx.z) * a.columns + static_cast<int>(blockIdx.y) * kChunk;
  if (first_m >= a.M) return;
  const int64_t first_n = static_cast<int64_t>(blockIdx.x) * kRows;
  const int64_t tile = int64_t{a.columns / 8} * kThreads;
  const float4* from = reinterpret_cast<const float4*>(a.parts) +
                       (static_cast<int64_t>(blockIdx.z) * gridDim.x + blockIdx.x) * tile +
                       static_cast<int64_t>(blockIdx.y) * 4 * kThreads + threadIdx.x;
  float sums[4][4] = {};
  for (int split = 0; split < a.splits; ++split) {
    float4 part[4];
#pragma unroll
    for (int q = 0; q < 4; ++q) part[q] = load_l2(from + q * kThreads);
    from += int64_t{gridDim.z} * gridDim.x * tile;
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      sums[q][0] += part[q].x, sums[q][1] += part[q].y;
      sums[q][2] += part[q].z, sums[q][3] += part[q].w;
    }
  }
  const float2 bias = load_bias<T>(a.bias, first_n, a.N);
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    sums[q][0] += bias.x, sums[q][1] += bias.x, sums[q][2] += bias.y, sums[q][3] += bias.y;
  }
  store_chunk(sums, reinterpret_cast<uint16_t*>(&buffer), static_cast<T*>(a.y), first_m, first_n,
              a.M, a.N);
}

// ---- launches

template <typename T>
cudaError_t launch_prologue(const CudaNF4LinearArgs& args, const Plan& p, const PrologueArgument& b,
                            Chain& chain) {
  const dim3 grid(static_cast<unsigned>(p.slices), static_cast<unsigned>(p.rows / kSliceRows));
  const T* x = static_cast<const T*>(args.x);
  const auto with = [&](const auto* lora_A) {
    using A = std::decay_t<decltype(*lora_A)>;
    return chain.launch(prologue_kernel<T, A>, grid, kThreads, 0, b, x, lora_A);
  };
  if (args.a_dtype == DType::kFloat32) return with(static_cast<const float*>(args.lora_A));
  if (args.a_dtype == DType::kBFloat16) return with(static_cast<const BF16*>(args.lora_A));
  return with(static_cast<const FP16*>(args.lora_A));
}

cudaError_t launch_adapter(const CudaNF4LinearArgs& args, const AdapterArgument& a, Chain& chain) {
  const unsigned grid = grid_size((a.rows + args.N) * a.extra, kThreads);
  const auto with = [&](const auto* lora_B) {
    using B = std::decay_t<decltype(*lora_B)>;
    return chain.launch(adapter_kernel<B>, grid, kThreads, 0, a, lora_B);
  };
  if (args.b_dtype == DType::kFloat32) return with(static_cast<const float*>(args.lora_B));
  if (args.b_dtype == DType::kBFloat16) return with(static_cast<const BF16*>(args.lora_B));
  return with(static_cast<const FP16*>(args.lora_B));
}

template <typename T>
cudaError_t launch_product(const Plan& p, bool nested, const ProductArgument& a, Chain& chain) {
  const dim3 grid(static_cast<unsigned>(p.row_tiles), static_cast<unsigned>(p.column_tiles),
                  static_cast<unsigned>(p.splits));
  const auto with = [&](auto kernel) {
    return chain.launch(kernel, grid, kThreads, static_cast<size_t>(shared_bytes(p.columns)), a);
  };
  if (p.columns == 64) {
    return nested ? with(product_kernel<T, true, 64>) : with(product_kernel<T, false, 64>);
  }
  if (p.columns == 128) {
    return nested ? with(product_kernel<T, true, 128>) : with(product_kernel<T, false, 128>);
  }
  return nested ? with(product_kernel<T, true, 256>) : with(product_kernel<T, false, 256>);
}

template <typename T>
cudaError_t forward(const CudaNF4LinearArgs& args, const Plan& p, cudaStream_t stream) {
  unsigned char* work = static_cast<unsigned char*>(args.workspace);
  const int M = static_cast<int>(args.M), N = static_cast<int>(args.N);
  const int r = static_cast<int>(args.r);
  uint16_t* ordered = reinterpret_cast<uint16_t*>(work + p.x);
  uint16_t* b = reinterpret_cast<uint16_t*>(work + p.b);
  float* s_parts = reinterpret_cast<float*>(work + p.s_parts);
  float* parts = p.splits > 1 ? reinterpret_cast<float*>(work + p.parts) : nullptr;

  Chain chain(stream);
  cudaError_t error = launch_prologue<T>(args, p, {M, r, args.K, p.rows, ordered, s_parts}, chain);
  if (error != cudaSuccess) return error;
  if (r > 0) {
    const AdapterArgument adapter = {
        M, N, r, p.extra, p.slices, p.units, p.rows, args.scaling, args.s, s_parts, ordered, b};
    error = launch_adapter(args, adapter, chain);
    if (error != cudaSuccess) return error;
  }
  const ProductArgument product = {nf4_argument(args.w),
                                   M,
                                   N,
                                   p.units,
                                   p.steps,
                                   p.split_steps,
                                   p.extra,
                                   args.K,
                                   p.rows,
                                   ordered,
                                   args.bias,
                                   b,
                                   args.y,
                                   parts};
  error = launch_product<T>(p, args.w.nested, product, chain);
  if (error != cudaSuccess || p.splits == 1) return error;
  const dim3 grid(static_cast<unsigned>(p.row_tiles), static_cast<unsigned>(p.columns / kChunk),
                  static_cast<unsigned>(p.column_tiles));
  const ReduceArgument reduce = {M, N, p.columns, p.splits, parts, args.bias, args.y};
  return chain.launch(reduce_kernel<T>, grid, kThreads, 0, reduce);
}

void check_sizes(int64_t M, int64_t N, int64_t K, int64_t r, int64_t splits) {
  constexpr int64_t kMost = int64_t{1} << 28;
  require(M >= 0 && M <= kCudaPrefillRows, "M", M, "0 to 512 rows");
  require(N > 0 && N <= kMost, "N", N, "1 to 2^28");
  require(K > 0 && K <= kMost && K % kCudaPrefillUnit == 0, "K", K, "a multiple of 64 up to 2^28");
  require(r >= 0 && r <= kCudaPrefillRank, "r", r, "at most 256");
  require(splits >= 0 && splits <= kCudaPrefillSplits, "splits", splits, "at most 16");
}

}  // namespace

int64_t cuda_nf4_lora_linear_sm90a_workspace(int64_t M, int64_t N, int64_t K, int64_t r,
                                             int64_t splits) {
  check_sizes(M, N, K, r, splits);
  return M == 0 ? 0 : plan_of(M, N, K, r, splits).workspace;
}

int cuda_nf4_lora_linear_sm90a_forward(const CudaNF4LinearArgs& args, CudaStream stream) {
  check_sizes(args.M, args.N, args.K, args.r, args.splits);
  check_linear_args(args, 16);
  if (args.M == 0) return cudaSuccess;
  const Plan plan = plan_of(args.M, args.N, args.K, args.r, args.splits);
  check_workspace(args, plan.workspace);
  return args.dtype == DType::kBFloat16 ? forward<BF16>(args, plan, stream)
                                        : forward<FP16>(args, plan, stream);
}

}  // namespace peftkern
