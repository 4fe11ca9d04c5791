// y = x W^T + scaling s lora_B^T + bias with W in NF4, s = x lora_A^T, for 1 to 32 rows of x: a
// prologue for s and the products, launches that overlap (the products alone without an adapter).
//
// Bytes per weight, blocks of 64, nested: 0.5 codes + 1/64 absmax. At 4.3 TB/s an H200 (132 SMs at
// 1.76 GHz) moves 18.5 B per SM and clock: 4096 x 4096 takes 2.0 us, 28672 x 8192 28.2 us. A unit
// of 16 rows x 64 columns comes in 27.7 clocks, 111 issue slots, of which sm_90 code uses 78 to
// 86%: hence a table of pairs in shared memory (3 instructions for two weights; prmt on byte planes
// takes 21 integer ones for eight, 42 clocks), absmax on the float32 sum of a block, so that a
// weight is rounded once, as its code, and mma.m16n8k16 with W on the left, nothing of it repacked.
// Counted, not measured.
#include <algorithm>

#include "launch.cuh"
#include "nf4.cuh"
#include "nf4_lora_linear.cuh"

namespace peftkern {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kUnit = 64;    // columns
constexpr int kCopies = 32;  // of the table

// By kRowGroups, groups of eight rows of x: 16-row tiles of W in a warp (with more of them x is
// read less often), how many units ahead codes are loaded (up to 128 B a lane in flight, 64 KiB on
// an SM; half of that above one group, where x from L2 and the tensor cores weigh more), blocks on
// an SM.
__host__ __device__ constexpr int tiles_of(int row_groups) { return row_groups == 4 ? 4 : 2; }
__host__ __device__ constexpr int depth_of(int row_groups) { return row_groups == 1 ? 4 : 2; }
__host__ __device__ constexpr int blocks_per_sm(int row_groups) { return row_groups == 4 ? 1 : 2; }

// Work items are tiles x splits of K: blocks stay resident and loop over them, with the next item's
// loads under way while one is finished. K is split where tiles alone do not fill the GPU evenly.
struct Plan {
  int row_groups, rows;  // of x, eight rows each; of W in a tile
  int tiles, splits, items;
  int units, split_units, warp_units;  // along K: all, of a split, of a warp in a split
  int64_t counter_bytes, workspace;
};

// Clocks of an SM: 55 for 1 KiB of codes, 300 to finish an item, 1000 for the last arrival.
// Estimates that only have to rank splits.
int64_t cost_of(int64_t tiles, int64_t rows, int64_t units, int64_t splits, int64_t processors) {
  const int64_t rounds = (tiles * splits + processors - 1) / processors;
  const int64_t item = (units + splits - 1) / splits * rows * 55 / 32 + 300;
  return rounds * item + (splits > 1 ? 1000 : 0);
}

Plan plan_of(int64_t M, int64_t N, int64_t K, int64_t splits) {
  Plan p = {};
  p.row_groups = M <= 8 ? 1 : M <= 16 ? 2 : 4;
  p.rows = 16 * tiles_of(p.row_groups);
  p.tiles = static_cast<int>((N + p.rows - 1) / p.rows);
  p.units = static_cast<int>(K / kUnit);
  if (splits == 0) {
    const int64_t processors = multiprocessors();
    splits = 1;
    for (int64_t s = 2; s <= 16 && s * kWarps <= p.units; ++s) {
      if (cost_of(p.tiles, p.rows, p.units, s, processors) <
          cost_of(p.tiles, p.rows, p.units, splits, processors)) {
        splits = s;
      }
    }
  }
  p.split_units = static_cast<int>((p.units + splits - 1) / splits);
  p.splits = (p.units + p.split_units - 1) / p.split_units;  // none is empty
  p.warp_units = (p.split_units + kWarps - 1) / kWarps;
  p.items = p.tiles * p.splits;
  if (p.splits > 1) {
    p.counter_bytes = (int64_t{p.tiles} * 4 + 255) / 256 * 256;
    p.workspace = p.counter_bytes + int64_t{p.items} * p.rows * M * 4;
  }
  return p;
}

// ---- prologue: s in float32 on plain cores, and counters of arrivals set to zero

struct PrologueArgument {
  int M, r, tiles;  // tiles = 0: no counters
  int64_t K;
  float* s;
  unsigned* counters;
};

// Block (rank, eight rows of x): K over the threads, then the sums of lanes and of warps in order.
template <typename T, typename A>
__global__ void __launch_bounds__(kThreads)
    prologue_kernel(const __grid_constant__ PrologueArgument a, const T* __restrict__ x,
                    const A* __restrict__ lora_A) {
  allow_following();
  const int blocks = static_cast<int>(gridDim.x * gridDim.y);
  const int block = static_cast<int>(blockIdx.y * gridDim.x + blockIdx.x);
  for (int i = block * kThreads + static_cast<int>(threadIdx.x); i < a.tiles;
       i += blocks * kThreads) {
    a.counters[i] = 0;
  }
  if (a.r == 0) return;
  PEFTKERN_SHARED(sums, float[kWarps][8]);
  const int rank = static_cast<int>(blockIdx.x), first = static_cast<int>(blockIdx.y) * 8;
  const A* factor = lora_A + rank * a.K;
  float sum[8] = {};
#pragma unroll 1
  for (int64_t k = int64_t{threadIdx.x} * 8; k < a.K; k += kThreads * 8) {
    float weight[8];
    load_eight(factor + k, weight);
#pragma unroll
    for (int m = 0; m < 8; ++m) {
      if (first + m >= a.M) continue;
      float value[8];
      load_eight(x + (first + m) * a.K + k, value);
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[m] = __fmaf_rn(value[i], weight[i], sum[m]);
    }
  }
#pragma unroll
  for (int m = 0; m < 8; ++m) {
    sum[m] = lanes_sum(sum[m]);
    if (lane_index() == 0) sums[warp_index()][m] = sum[m];
  }
  __syncthreads();
  const int m = static_cast<int>(threadIdx.x);
  if (m < 8 && first + m < a.M) {
    float total = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) total += sums[warp][m];
    a.s[int64_t{first + m} * a.r + rank] = total;
  }
}

// ---- the products

struct LinearArgument {
  NF4Argument w;
  const void *x, *bias, *lora_B;
  const float* s;
  void* y;
  float* parts;  // [items, M, rows]
  unsigned* counters;
  int M, N, K, r;
  int row_blocks, unit_shift;  // K / blocksize; unit >> unit_shift is a row's block
  DType b_dtype;
  float scaling;
  int splits, items, units, split_units, warp_units;
};

// table[byte * kDuplicates + copy]: the pair of weights of a byte, the high nibble's in the low
// half. Lanes that read a copy of their own never meet in a bank.
template <typename T, int kDuplicates>
__device__ __forceinline__ void fill_table(uint32_t* table, const NF4Argument& w) {
  static_assert(kThreads == 256 && kDuplicates % 4 == 0, "a byte per thread, four copies a store");
  const float code = w.code[lane_index() & 15];
  const int byte = static_cast<int>(threadIdx.x);
  const float high = __shfl_sync(kFullMask, code, byte >> 4);
  const float low = __shfl_sync(kFullMask, code, byte & 15);
  const uint32_t pair = pack2<T>(high, low);
#pragma unroll
  for (int i = 0; i < kDuplicates / 4; ++i) {
    const int copy = (i + lane_index()) % (kDuplicates / 4);  // or all lanes meet in four banks
    reinterpret_cast<uint4*>(table)[byte * (kDuplicates / 4) + copy] =
        make_uint4(pair, pair, pair, pair);
  }
}

// The pair of byte i of `word`; `copies` is the address of the lane's copy of pair 0.
template <int kDuplicates>
__device__ __forceinline__ uint32_t look_up(uint32_t copies, uint32_t word, int i) {
  const uint32_t byte = permute_bytes(word, 0, 0x4440u + static_cast<uint32_t>(i));
  return load_shared(byte * (4 * kDuplicates) + copies);
}

// Up to kDepth units that a warp takes one after the other.
struct Panel {
  int row;         // this lane's first: g of the tile
  int unit, left;  // units from here to the end of the warp's piece; none if left <= 0
};

__device__ __forceinline__ int tile_of(const LinearArgument& a, int item) {
  return a.splits == 1 ? item : item / a.splits;
}

// A row of W that there is: what the rows past the end give is not stored.
__device__ __forceinline__ int row_at(const LinearArgument& a, int row) {
  return min(row, a.N - 1);
}

// absmax of a panel: of its kTiles x kDepth pairs (tile, unit), lane (g, t) has pair 4 slot + t,
// for rows g and g+8.
template <int kRowGroups>
struct Scales {
  static constexpr int kSlots = tiles_of(kRowGroups) * depth_of(kRowGroups) / 4;
  uint32_t raw[kSlots][2];
  float value[kSlots][2];

  // Past the last unit there is, that one's comes again.
  __device__ __forceinline__ static uint32_t block(const LinearArgument& a, const Panel& panel,
                                                   int slot, int half) {
    const int pair = 4 * slot + lane_index() % 4;
    const int row = row_at(a, panel.row + pair / depth_of(kRowGroups) * 16 + half * 8);
    const int unit = panel.unit + min(pair % depth_of(kRowGroups), panel.left - 1);
    return static_cast<uint32_t>(row * a.row_blocks + (unit >> a.unit_shift));
  }
  template <bool kNested>
  __device__ __forceinline__ void load(const LinearArgument& a, const Panel& panel) {
    if (panel.left <= 0) return;
#pragma unroll
    for (int i = 0; i < 2 * kSlots; ++i) {
      raw[i / 2][i % 2] = load_raw_absmax<kNested>(a.w, block(a, panel, i / 2, i % 2));
    }
  }
  template <bool kNested>
  __device__ __forceinline__ void finish(const LinearArgument& a, const Panel& panel) {
    if (panel.left <= 0) return;
    const float offset = load_offset<kNested>(a.w);
#pragma unroll
    for (int i = 0; i < 2 * kSlots; ++i) {
      value[i / 2][i % 2] =
          absmax_value<kNested>(a.w, block(a, panel, i / 2, i % 2), raw[i / 2][i % 2], offset);
    }
  }
  __device__ __forceinline__ float of(int tile, int unit, int half) const {
    const int pair = tile * depth_of(kRowGroups) + unit;
    return __shfl_sync(kFullMask, value[pair / 4][half], (lane_index() & ~3) + pair % 4);
  }
};

// Columns 16t .. 16t+15 of a unit for rows 8c + g of x, as mma takes them. Of two parts one has 16t
// .. 16t+7, the other the rest. `line` is where they begin in row g, or in the last if there are
// fewer. A row 8c + g that does not exist is another one: its products are not stored.
template <int kRowGroups, int kParts>
__device__ __forceinline__ void load_x(const LinearArgument& a, const uint8_t* line, int part,
                                       uint32_t (&x)[kRowGroups][8 / kParts]) {
#pragma unroll
  for (int c = 0; c < kRowGroups; ++c) {
    const bool exists = 8 * c + lane_index() / 4 < a.M;
    const uint32_t below = c > 0 && exists ? 16u * c * static_cast<uint32_t>(a.K) : 0;
    const uint4* p = reinterpret_cast<const uint4*>(line + below) + part;
#pragma unroll
    for (int i = 0; i < 2 / kParts; ++i) {
      const uint4 word = p[i];
      x[c][4 * i] = word.x, x[c][4 * i + 1] = word.y;
      x[c][4 * i + 2] = word.z, x[c][4 * i + 3] = word.w;
    }
  }
}

// The update as one more piece of K: rank r is warp r % 8's.
template <typename B, int kTiles, int kRowGroups>
__device__ __forceinline__ void add_update(const LinearArgument& a, int row, int warp,
                                           float (&acc)[kTiles][kRowGroups][4]) {
  const B* lora_B = static_cast<const B*>(a.lora_B);
  const int t = lane_index() % 4;
#pragma unroll(kRowGroups == 1 ? 2 : 1)
  for (int rank = warp; rank < a.r; rank += kWarps) {
    B factor[kTiles][2];
    float s[kRowGroups][2];
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) {
      factor[i / 2][i % 2] = lora_B[int64_t{row_at(a, row + 8 * i)} * a.r + rank];
    }
#pragma unroll
    for (int j = 0; j < 2 * kRowGroups; ++j) {
      const int m = j / 2 * 8 + 2 * t + j % 2;
      s[j / 2][j % 2] = m < a.M ? load_l2(a.s + m * a.r + rank) : 0.0f;
    }
#pragma unroll
    for (int j = 0; j < 2 * kRowGroups; ++j) {
      const float scaled = a.scaling * s[j / 2][j % 2];
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i) {
        float& sum = acc[i / 2][j / 2][i % 2 * 2 + j % 2];
        sum = __fmaf_rn(to_float(factor[i / 2][i % 2]), scaled, sum);
      }
    }
  }
}

template <typename T>
__device__ __forceinline__ void store_y(const LinearArgument& a, int m, int n, float value) {
  if (n >= a.N) return;
  if (a.bias) value += to_float(T{__ldg(static_cast<const uint16_t*>(a.bias) + n)});
  static_cast<T*>(a.y)[int64_t{m} * a.N + n] = from_float<T>(value);
}

// Floats from one row of x to the next in `sums`: the lanes of a warp store to 32 banks.
__host__ __device__ constexpr int pitch_of(int rows) { return rows + 4; }

constexpr int kSlices = kWarps / 2;  // of `sums`: two warps share one

// Adds what the warps have in `sums`; of a split K, the last block to come adds what all have.
template <typename T, int kRowGroups>
__device__ __forceinline__ void finish_item(const LinearArgument& a, int item, const float* sums,
                                            unsigned* arrivals) {
  constexpr int kRows = 16 * tiles_of(kRowGroups);
  const int tile = tile_of(a, item), outputs = a.M * kRows;
  const int row = tile * kRows;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < outputs; i += kThreads) {
    const int m = i / kRows, n = i % kRows;
    float total = 0.0f;
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
      total += sums[(slice * 8 * kRowGroups + m) * pitch_of(kRows) + n];
    }
    if (a.splits == 1) {
      store_y<T>(a, m, row + n, total);
    } else {
      __stcg(a.parts + int64_t{item} * outputs + i, total);
    }
  }
  if (a.splits == 1) return;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *arrivals = atomicAdd(a.counters + tile, 1u);
  __syncthreads();
  if (*arrivals != static_cast<unsigned>(a.splits) - 1) return;
  __threadfence();
  const float* parts = a.parts + int64_t{tile} * a.splits * outputs;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < outputs; i += kThreads) {
    float total = 0.0f;
    for (int split = 0; split < a.splits; ++split) {
      total += load_l2(parts + int64_t{split} * outputs + i);
    }
    store_y<T>(a, i / kRows, row + i % kRows, total);
  }
}

constexpr size_t shared_bytes(int row_groups) {
  return 4 * (256 * kCopies + kSlices * 8 * row_groups * pitch_of(16 * tiles_of(row_groups)) + 4);
}

// Eight warps cut an item's K into contiguous pieces, whose sums are added in order in shared
// memory. Lane (g, t) has bytes 8t .. 8t+7 of a unit's rows g and g+8, so weights 16t .. 16t+15:
// step j of a unit's four takes 16t+4j+{0,1} for the instruction's columns 2t, 2t+1 and
// 16t+4j+{2,3} for 2t+8, 2t+9. Of x a lane so needs 32 contiguous bytes.
template <typename T, bool kNested, int kRowGroups>
__global__ void __launch_bounds__(kThreads, blocks_per_sm(kRowGroups))
    linear_kernel(const __grid_constant__ LinearArgument a) {
  constexpr int kTiles = tiles_of(kRowGroups), kDepth = depth_of(kRowGroups), kRows = 16 * kTiles;
  constexpr bool kAhead = kRowGroups == 1;  // x, by one unit: a tile's work is too short to hide it
  constexpr int kParts = kAhead ? 1 : 2;    // of a unit: two need fewer registers, and scale twice
  constexpr int kWords = 8 / kParts;
  const int g = lane_index() / 4, t = lane_index() % 4;
  const int warp = __shfl_sync(kFullMask, warp_index(), 0);  // equal in all lanes: ptxas sees it
  const int rounds = (a.warp_units + kDepth - 1) / kDepth;
  const int step = static_cast<int>(gridDim.x);
  uint32_t* table = dynamic_shared<uint32_t>();
  float* sums = reinterpret_cast<float*>(table + 256 * kCopies);
  unsigned* arrivals =
      reinterpret_cast<unsigned*>(sums + kSlices * 8 * kRowGroups * pitch_of(kRows));
  const uint32_t copies = shared_address(table + lane_index() % kCopies);

  uint2 codes[kDepth][kTiles][2];
  uint32_t x[kAhead ? 2 : 1][kRowGroups][kWords];
  Scales<kRowGroups> scales;
  Panel next = {};
  const uint8_t* line = nullptr;       // where `next` has the codes of its first row
  uint32_t below[2 * kTiles] = {};     // and how far from there those of the others are
  const auto row_below = [&](int i) {  // in place of a row past the last the first comes again
    return next.row + 8 * i < a.N ? 4u * i * static_cast<uint32_t>(a.K) : 0u;
  };
  const auto begin_item = [&](int item) {
    next.left = 0;
    if (item >= a.items) return;
    const int tile = tile_of(a, item), first = (item - tile * a.splits) * a.split_units;
    next.row = tile * kRows + g;
    next.unit = first + warp * a.warp_units;
    next.left = min(min(next.unit + a.warp_units, first + a.split_units), a.units) - next.unit;
    line = a.w.packed +
           (int64_t{row_at(a, next.row)} * (a.K / 2) + int64_t{next.unit} * (kUnit / 2) + 8 * t);
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) below[i] = row_below(i);
    if (first > 0 || a.r == 0) return;
    // The item will need these rows of lora_B, which from memory would come late then.
    const int64_t size = (a.b_dtype == DType::kFloat32 ? 4 : 2) * int64_t{a.r};
    const int64_t begin = tile * kRows * size, end = min(begin + kRows * size, a.N * size);
#pragma unroll 1
    for (int64_t at = begin + threadIdx.x * 32; at < end; at += kThreads * 32) {
      prefetch_l2(static_cast<const char*>(a.lora_B) + at);
    }
  };
  const auto x_at = [&](int unit) {
    return static_cast<const uint8_t*>(a.x) +
           2 * (int64_t{min(g, a.M - 1)} * a.K + int64_t{unit} * kUnit + 16 * t);
  };
  const auto load_codes = [&](int u) {
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) {
      const uint32_t down = kRowGroups == 1 ? below[i] : row_below(i);
      codes[u][i / 2][i % 2] = load_once8(line + down + u * (kUnit / 2));
    }
  };
  // acc += absmax * (unit u of tile i) x, a part of the unit's four steps.
  const auto multiply_part = [&](int u, int part, int i,
                                 const uint32_t (&right)[kRowGroups][kWords],
                                 float (&acc)[kRowGroups][4]) {
    uint32_t left[kWords / 2][4];  // of a step, in the order of the instruction
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int b = 0; b < kWords; ++b) {
        const int byte = part * kWords + b;
        const uint2 both = codes[u][i][half];
        left[b / 2][half + b % 2 * 2] =
            look_up<kCopies>(copies, byte < 4 ? both.x : both.y, byte % 4);
      }
    }
    const float scale[2] = {scales.of(i, u, 0), scales.of(i, u, 1)};
#pragma unroll
    for (int c = 0; c < kRowGroups; ++c) {
      float sum[4];
#pragma unroll
      for (int j = 0; j < kWords / 2; ++j) {
        const uint32_t pair[2] = {right[c][2 * j], right[c][2 * j + 1]};
        if (j == 0) {
          mma_m16n8k16_first<T>(sum, left[j], pair);
        } else {
          mma_m16n8k16<T>(sum, left[j], pair);
        }
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[c][e] = __fmaf_rn(sum[e], scale[e / 2], acc[c][e]);
    }
  };

  int item = static_cast<int>(blockIdx.x);
  begin_item(item);
#pragma unroll
  for (int u = 0; u < kDepth; ++u) {
    if (u < next.left) load_codes(u);
  }
  scales.template load<kNested>(a, next);
  if (kAhead && next.left > 0) load_x<kRowGroups, kParts>(a, x_at(next.unit), 0, x[0]);
  fill_table<T, kCopies>(table, a.w);
  __syncthreads();

  for (; item < a.items; item += step) {
    float acc[kTiles][kRowGroups][4] = {};
#pragma unroll 1
    for (int round = 0; round < rounds; ++round) {
      const Panel now = next;
      const uint8_t* x_now = x_at(now.unit);
      scales.template finish<kNested>(a, now);
      if (round + 1 < rounds) {
        next.unit += kDepth, next.left -= kDepth;
        line += kDepth * (kUnit / 2);
      } else {
        begin_item(item + step);
      }
      scales.template load<kNested>(a, next);
      if (kAhead && now.left <= 0 && next.left > 0) {
        load_x<kRowGroups, kParts>(a, x_at(next.unit), 0, x[0]);
      }
#pragma unroll
      for (int u = 0; u < kDepth; ++u) {
        if (u < now.left) {
          // The unit after the panel's last is the first of the next, which begins with x[0].
          const bool last = u + 1 == kDepth || u + 1 == now.left;
          if (kAhead && !last) {
            load_x<kRowGroups, kParts>(a, x_now + (u + 1) * (2 * kUnit), 0, x[(u + 1) % 2]);
          }
#pragma unroll
          for (int part = 0; part < kParts; ++part) {
            const auto& right = x[kAhead ? u % 2 : 0];
            if (!kAhead) load_x<kRowGroups, kParts>(a, x_now + u * (2 * kUnit), part, x[0]);
#pragma unroll
            for (int i = 0; i < kTiles; ++i) {
              multiply_part(u, part, i, right, acc[i]);
              if (kRowGroups > 1) __syncwarp();  // or all tiles' lookups move up here, and spill
            }
          }
          if (kAhead && last && next.left > 0) {
            load_x<kRowGroups, kParts>(a, x_at(next.unit), 0, x[0]);
          }
        }
        if (u < next.left) load_codes(u);
      }
    }

    wait_for_preceding();
    const int tile = tile_of(a, item);
    if (a.r > 0 && item == tile * a.splits) {
      const int row = tile * kRows + g;
      if (a.b_dtype == DType::kFloat32) add_update<float, kTiles, kRowGroups>(a, row, warp, acc);
      if (a.b_dtype == DType::kBFloat16) add_update<BF16, kTiles, kRowGroups>(a, row, warp, acc);
      if (a.b_dtype == DType::kFloat16) add_update<FP16, kTiles, kRowGroups>(a, row, warp, acc);
    }
    float* mine = sums + warp % kSlices * (8 * kRowGroups * pitch_of(kRows));
#pragma unroll
    for (int turn = 1; turn >= 0; --turn) {  // the upper four warps, then the lower four add theirs
      __syncthreads();
      if (warp / kSlices != turn) continue;
#pragma unroll
      for (int i = 0; i < kTiles * kRowGroups * 4; ++i) {
        const int tile_row = i / 4 / kRowGroups * 16 + g + i % 4 / 2 * 8;
        const int m = i / 4 % kRowGroups * 8 + 2 * t + i % 2;
        float& sum = mine[m * pitch_of(kRows) + tile_row];
        const float value = acc[i / 4 / kRowGroups][i / 4 % kRowGroups][i % 4];
        sum = turn == 1 ? value : sum + value;
      }
    }
    __syncthreads();
    finish_item<T, kRowGroups>(a, item, sums, arrivals);
  }
}

// ---- launchers

template <typename T, typename A>
cudaError_t launch_prologue(const PrologueArgument& a, const void* x, const void* lora_A,
                            Chain& chain) {
  const dim3 grid(static_cast<unsigned>(a.r > 0 ? a.r : 1),
                  static_cast<unsigned>(a.r > 0 ? (a.M + 7) / 8 : 1));
  return chain.launch(prologue_kernel<T, A>, grid, kThreads, 0, a, static_cast<const T*>(x),
                      static_cast<const A*>(lora_A));
}

template <typename T, int kRowGroups>
cudaError_t launch_linear(const LinearArgument& a, bool nested, Chain& chain) {
  const auto kernel =
      nested ? linear_kernel<T, true, kRowGroups> : linear_kernel<T, false, kRowGroups>;
  const unsigned blocks = static_cast<unsigned>(
      std::min(int64_t{a.items}, int64_t{blocks_per_sm(kRowGroups)} * multiprocessors()));
  return chain.launch(kernel, blocks, kThreads, shared_bytes(kRowGroups), a);
}

template <typename T>
cudaError_t forward(const CudaNF4LinearArgs& args, const Plan& plan, cudaStream_t stream) {
  LinearArgument a = {};
  a.w = nf4_argument(args.w);
  a.x = args.x, a.bias = args.bias, a.lora_B = args.lora_B;
  a.s = args.s;
  a.y = args.y;
  a.counters = static_cast<unsigned*>(args.workspace);
  a.parts = reinterpret_cast<float*>(static_cast<char*>(args.workspace) + plan.counter_bytes);
  a.M = static_cast<int>(args.M), a.N = static_cast<int>(args.N);
  a.K = static_cast<int>(args.K), a.r = static_cast<int>(args.r);
  a.row_blocks = a.K >> a.w.blocksize_log2;
  a.unit_shift = a.w.blocksize_log2 - 6;
  a.b_dtype = args.b_dtype;
  a.scaling = args.scaling;
  a.splits = plan.splits, a.items = plan.items;
  a.units = plan.units, a.split_units = plan.split_units, a.warp_units = plan.warp_units;

  Chain chain(stream);
  if (a.r > 0 || plan.splits > 1) {
    const PrologueArgument prologue = {a.M, a.r,    plan.splits > 1 ? plan.tiles : 0,
                                       a.K, args.s, a.counters};
    const auto run = args.a_dtype == DType::kFloat32    ? launch_prologue<T, float>
                     : args.a_dtype == DType::kBFloat16 ? launch_prologue<T, BF16>
                                                        : launch_prologue<T, FP16>;
    const cudaError_t error = run(prologue, args.x, args.lora_A, chain);
    if (error != cudaSuccess) return error;
  }
  const auto run = plan.row_groups == 1   ? launch_linear<T, 1>
                   : plan.row_groups == 2 ? launch_linear<T, 2>
                                          : launch_linear<T, 4>;
  return run(a, args.w.nested, chain);
}

void check_sizes(int64_t M, int64_t N, int64_t K, int64_t splits) {
  require(M >= 0 && M <= kCudaLinearRows, "M", M, "at most 32 rows of x");
  require(N > 0 && N <= kCudaLinearSize, "N", N, "1 to 2^26");
  require(K > 0 && K <= kCudaLinearSize && K % kUnit == 0, "K", K, "a multiple of 64 up to 2^26");
  require(splits >= 0 && splits <= 16, "splits", splits, "0 to 16");
}

}  // namespace

int64_t cuda_nf4_lora_linear_workspace(int64_t M, int64_t N, int64_t K, int64_t splits) {
  check_sizes(M, N, K, splits);
  return plan_of(M, N, K, splits).workspace;
}

int cuda_nf4_lora_linear_forward(const CudaNF4LinearArgs& args, CudaStream stream) {
  check_sizes(args.M, args.N, args.K, args.splits);
  require(args.r >= 0 && args.r <= kCudaLinearRank, "r", args.r, "at most 64");
  check_linear_args(args, 2);
  require(args.K % args.w.blocksize == 0, "blocksize", args.w.blocksize,
          ("a divisor of K = " + std::to_string(args.K)).c_str());
  require(args.w.nblocks() < int64_t{1} << 31, "w", args.w.nblocks(), "fewer than 2^31 blocks");
  if (args.M == 0) return cudaSuccess;
  const Plan plan = plan_of(args.M, args.N, args.K, args.splits);
  check_workspace(args, plan.workspace);
  return args.dtype == DType::kBFloat16 ? forward<BF16>(args, plan, stream)
                                        : forward<FP16>(args, plan, stream);
}

}  // namespace peftkern
