// NF4 on a GPU: dequantize (FP4, too), nested or plain, and quantize, one launch each.
//
// Bytes per weight, 16-bit dense values, blocks of 64, nested: 0.5 codes + 1/64 absmax + 2 dense =
// 2.52 (float32: 4.52; quantizing a 16-bit weight: 2 + 0.5 + 4/64 = 2.56). At 4.3 TB/s of copy
// bandwidth 14336 x 4096 takes 34.4 us; a warp's tile of 1024 weights goes through in 138 clocks of
// an H200's SM, of whose 552 issue slots dequantizing takes 262 and quantizing, about all. Lookups
// are shuffles, with value i in lanes i and i + 16: a shuffle reads five bits of its index, so
// nibbles need no mask. Loads and stores of a warp are contiguous. Counted, not measured.
#include <type_traits>

#include "launch.cuh"
#include "nf4.cuh"
#include "peftkern/checks.h"

namespace peftkern {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;                 // chunks of a lane, whose loads are in flight together
constexpr int kTile = kThreads * kUnroll;  // chunks of a thread block

// A chunk: the weights whose dense values fill 16 bytes, and the integer that holds their codes.
template <typename T>
constexpr int kChunk = 16 / static_cast<int>(sizeof(T));
template <typename T>
using Codes = std::conditional_t<sizeof(T) == 4, uint16_t, uint32_t>;

// Bit offset of the code of weight i of a chunk: the even one is the high nibble of its byte.
__host__ __device__ constexpr int code_shift(int i) { return 8 * (i / 2) + (i % 2 ? 0 : 4); }

template <typename T>
bool is_aligned(const void* packed, const void* dense) {
  return reinterpret_cast<uintptr_t>(dense) % 16 == 0 &&
         reinterpret_cast<uintptr_t>(packed) % sizeof(Codes<T>) == 0;
}

// ---- dequantize

template <typename T, bool kAligned>
__device__ __forceinline__ void store_chunk(T* out, int chunk, const float (&x)[kChunk<T>]) {
  if constexpr (!kAligned) {
#pragma unroll
    for (int i = 0; i < kChunk<T>; ++i) out[chunk * kChunk<T> + i] = from_float<T>(x[i]);
  } else if constexpr (sizeof(T) == 4) {
    reinterpret_cast<float4*>(out)[chunk] = make_float4(x[0], x[1], x[2], x[3]);
  } else {
    reinterpret_cast<uint4*>(out)[chunk] = make_uint4(pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3]),
                                                      pack2<T>(x[4], x[5]), pack2<T>(x[6], x[7]));
  }
}

template <typename T, bool kNested, bool kAligned>
__global__ void __launch_bounds__(kThreads)
    dequantize_kernel(const __grid_constant__ NF4Argument w, T* __restrict__ out) {
  constexpr int kWeights = kChunk<T>;
  static_assert(kTile * kWeights % 4096 == 0, "a tile begins with a block");
  const float table = w.code[lane_index() & 15];
  const int64_t chunks = w.numel / kWeights;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kTile;

  // All lanes go round, for all take part in the lookups; those past the end load its last chunk.
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kTile; first < chunks; first += stride) {
    const int64_t first_block = first * kWeights >> w.blocksize_log2;
    const uint8_t* packed = w.packed + first * (kWeights / 2);
    const int last = static_cast<int>(min(chunks - first, int64_t{kTile})) - 1;
    uint32_t codes[kUnroll], raw[kUnroll];
    int64_t block[kUnroll];
    float absmax[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int chunk = min(u * kThreads + static_cast<int>(threadIdx.x), last);
      block[u] = first_block + (chunk * kWeights >> w.blocksize_log2);
      if constexpr (kAligned) {
        codes[u] = __ldcs(reinterpret_cast<const Codes<T>*>(packed) + chunk);
      } else {
        codes[u] = 0;
#pragma unroll
        for (int i = 0; i < kWeights / 2; ++i) {
          codes[u] |= static_cast<uint32_t>(packed[chunk * (kWeights / 2) + i]) << 8 * i;
        }
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) raw[u] = load_raw_absmax<kNested>(w, block[u]);
    const float offset = load_offset<kNested>(w);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      absmax[u] = absmax_value<kNested>(w, block[u], raw[u], offset);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      float x[kWeights];
#pragma unroll
      for (int i = 0; i < kWeights; ++i) {
        const int index = static_cast<int>(codes[u] >> code_shift(i));
        x[i] = __fmul_rn(__shfl_sync(kFullMask, table, index), absmax[u]);
      }
      const int chunk = u * kThreads + static_cast<int>(threadIdx.x);
      if (chunk <= last) store_chunk<T, kAligned>(out + first * kWeights, chunk, x);
    }
  }

  // Less than a chunk is left: a weight per lane of the last warp.
  if (blockIdx.x == gridDim.x - 1 && warp_index() == kThreads / 32 - 1) {
    const int64_t i = chunks * kWeights + lane_index();
    const bool live = i < w.numel;
    const int byte = live ? w.packed[i / 2] : 0;
    const float code = __shfl_sync(kFullMask, table, byte >> code_shift(static_cast<int>(i % 2)));
    if (live) {
      const int64_t block = i >> w.blocksize_log2;
      const uint32_t raw = load_raw_absmax<kNested>(w, block);
      const float offset = load_offset<kNested>(w);
      out[i] = from_float<T>(__fmul_rn(code, absmax_value<kNested>(w, block, raw, offset)));
    }
  }
}

template <typename T, bool kNested>
cudaError_t dequantize(const NF4View& w, T* out, cudaStream_t stream) {
  const auto kernel = is_aligned<T>(w.packed, out) ? dequantize_kernel<T, kNested, true>
                                                   : dequantize_kernel<T, kNested, false>;
  const unsigned blocks = grid_size(w.numel, kTile * kChunk<T>);
  return launch(kernel, blocks, kThreads, 0, stream, nf4_argument(w), out);
}

template <typename T>
cudaError_t dequantize(const NF4View& w, void* out, cudaStream_t stream) {
  T* values = static_cast<T*>(out);
  return w.nested ? dequantize<T, true>(w, values, stream)
                  : dequantize<T, false>(w, values, stream);
}

// ---- quantize

constexpr float kBinScale = 15.4f;
constexpr float kBinOffset = 8388608.0f + 16.0f;  // 2^23: the sum's last bits are an integer

// The bin of x in [-1, 1], 1 to 31, in the low five bits. Larger x never gets a smaller bin, so a
// midpoint in another bin than x needs no comparison, whatever was rounded here.
__device__ __forceinline__ int bin_bits(float x) {
  return __float_as_int(__fmaf_rn(x, kBinScale, kBinOffset));
}

struct Bins {
  float threshold[32];
  int before[32];  // midpoints in lower bins
};

constexpr Bins make_bins() {
  Bins bins = {};
  for (int bin = 0; bin < 32; ++bin) {
    int before = 0;
    // No midpoint lies near the edge of a bin (asserted below), so this cast finds its bin.
    while (before < 14 && static_cast<int>(kNF4Midpoint[before] * kBinScale + 16.5f) < bin)
      ++before;
    bins.before[bin] = before;
    bins.threshold[bin] = kNF4Midpoint[before];
  }
  return bins;
}
constexpr Bins kBins = make_bins();

constexpr bool bins_are_sound() {
  for (int i = 0; i < 15; ++i) {
    const float x = kNF4Midpoint[i] * kBinScale + 16.5f;
    const float rest = x - static_cast<float>(static_cast<int>(x));
    if (rest < 0.001f || rest > 0.999f) return false;
    if (i > 0 && static_cast<int>(x) == static_cast<int>(kNF4Midpoint[i - 1] * kBinScale + 16.5f)) {
      return false;
    }
  }
  return true;
}
static_assert(bins_are_sound(), "a bin must hold one midpoint at most, away from its edges");

struct QuantizeArgument {
  int64_t numel;
  int blocksize_log2;
  uint8_t* packed;
  float* absmax;
  Bins bins;
};

// The first `count` values of a chunk at any address, zeros after them.
template <typename T>
__device__ __forceinline__ uint4 load_values(const T* src, int count) {
  uint32_t word[4] = {};
#pragma unroll
  for (int i = 0; i < kChunk<T>; ++i) {
    if (i >= count) continue;
    if constexpr (sizeof(T) == 4) {
      word[i] = __float_as_uint(src[i]);
    } else {
      word[i / 2] |= static_cast<uint32_t>(src[i].bits) << 16 * (i % 2);
    }
  }
  return make_uint4(word[0], word[1], word[2], word[3]);
}

template <typename T, bool kAligned>
__device__ __forceinline__ uint4 load_whole(const T* src) {
  if constexpr (kAligned) return __ldg(reinterpret_cast<const uint4*>(src));
  return load_values<T>(src, kChunk<T>);
}

template <typename T>
__device__ __forceinline__ void widen_chunk(const uint4& raw, float (&x)[kChunk<T>]) {
  const uint32_t word[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      x[i] = __uint_as_float(word[i]);
    } else {
      const float2 pair = unpack2<T>(word[i]);
      x[2 * i] = pair.x;
      x[2 * i + 1] = pair.y;
    }
  }
}

// The largest |x|, two at once of a 16-bit type (both halves of the result count), NaN if one is.
template <typename T>
__device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b) {
  if constexpr (sizeof(T) == 4) {
    return __float_as_uint(max_abs(__uint_as_float(a), __uint_as_float(b)));
  } else {
    return max_abs2<T>(a, b);
  }
}
template <typename T>
__device__ __forceinline__ uint32_t chunk_top(const uint4& raw) {
  return larger<T>(larger<T>(larger<T>(larger<T>(0, raw.x), raw.y), raw.z), raw.w);
}
template <typename T>
__device__ __forceinline__ float absmax_of_top(uint32_t top) {
  float absmax = __uint_as_float(top);
  if constexpr (sizeof(T) == 2) {
    const float2 both = unpack2<T>(top);
    absmax = max_abs(both.x, both.y);
  }
  return absmax != absmax ? __uint_as_float(0x7fc00000) : absmax;
}
__device__ __forceinline__ float inverse_of(float absmax) {
  constexpr float kFloor = kAbsmaxFloor;
  return __frcp_rn(absmax < kFloor ? kFloor : absmax);
}

// All lanes of the warp call this; `threshold` and `before` are this lane's entries of Bins.
template <typename T>
__device__ __forceinline__ uint32_t chunk_codes(const uint4& raw, float absmax, float inverse,
                                                float threshold, int before) {
  float x[kChunk<T>];
  widen_chunk<T>(raw, x);
  uint32_t codes = 0;
#pragma unroll
  for (int i = 0; i < kChunk<T>; ++i) {
    const float scaled = __fmul_rn(x[i], inverse);
    const int bin = bin_bits(scaled);
    const float midpoint = __shfl_sync(kFullMask, threshold, bin);
    codes += static_cast<uint32_t>(__shfl_sync(kFullMask, before, bin)) << code_shift(i);
    if (scaled > midpoint) codes += 1u << code_shift(i);
  }
  // A NaN takes the highest code. There is none unless the block has one or an infinity.
  if (!(absmax < __uint_as_float(0x7f800000))) {
#pragma unroll
    for (int i = 0; i < kChunk<T>; ++i) {
      const float scaled = __fmul_rn(x[i], inverse);
      if (scaled != scaled) codes |= 15u << code_shift(i);
    }
  }
  return codes;
}

template <typename T, bool kAligned>
__device__ __forceinline__ void store_whole(uint8_t* packed, uint32_t codes) {
  if constexpr (kAligned) {
    *reinterpret_cast<Codes<T>*>(packed) = static_cast<Codes<T>>(codes);
  } else {
#pragma unroll
    for (int i = 0; i < kChunk<T> / 2; ++i) packed[i] = static_cast<uint8_t>(codes >> 8 * i);
  }
}

// The codes of the first `count` values; 7, which is zero, fills the byte after an odd end.
template <typename T>
__device__ __forceinline__ void store_part(uint8_t* packed, uint32_t codes, int count) {
  if (count % 2) {
    const int shift = code_shift(count);
    codes = (codes & ~(15u << shift)) | 7u << shift;
  }
#pragma unroll 1
  for (int i = 0; i < (count + 1) / 2; ++i) packed[i] = static_cast<uint8_t>(codes >> 8 * i);
}

// Blocks of at most a warp's 32 chunks: neighboring lanes share a block, one chunk each.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kThreads)
    quantize_kernel(const __grid_constant__ QuantizeArgument a, const T* __restrict__ values) {
  constexpr int kWeights = kChunk<T>;
  static_assert(kTile * kWeights % 4096 == 0, "a tile begins with a block");
  const float threshold = a.bins.threshold[lane_index()];
  const int before = a.bins.before[lane_index()];
  const int lanes = (1 << a.blocksize_log2) / kWeights;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * (kTile * kWeights);

  for (int64_t start = static_cast<int64_t>(blockIdx.x) * (kTile * kWeights); start < a.numel;
       start += stride) {
    const T* src = values + start;
    uint8_t* packed = a.packed + start / 2;
    const int left = static_cast<int>(min(a.numel - start, int64_t{kTile * kWeights}));
    const int whole = left / kWeights;
    uint4 raw[kUnroll];
    uint32_t top[kUnroll], codes[kUnroll];
    if (whole > 0) {  // lanes past the last whole chunk load it, too
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int chunk = min(u * kThreads + static_cast<int>(threadIdx.x), whole - 1);
        raw[u] = load_whole<T, kAligned>(src + chunk * kWeights);
      }
    }
    if (whole < kTile) {  // the end: a part of a chunk, and zeros
      const uint4 part = load_values<T>(src + whole * kWeights, left % kWeights);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int chunk = u * kThreads + static_cast<int>(threadIdx.x);
        if (chunk == whole) raw[u] = part;
        if (chunk > whole) raw[u] = make_uint4(0, 0, 0, 0);
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) top[u] = chunk_top<T>(raw[u]);
    for (int step = lanes / 2; step > 0; step /= 2) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        top[u] = larger<T>(top[u], __shfl_xor_sync(kFullMask, top[u], step));
      }
    }
    float* absmax = a.absmax + (start >> a.blocksize_log2);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int chunk = u * kThreads + static_cast<int>(threadIdx.x);
      const float scale = absmax_of_top<T>(top[u]);
      codes[u] = chunk_codes<T>(raw[u], scale, inverse_of(scale), threshold, before);
      if (chunk < whole) {
        store_whole<T, kAligned>(packed + chunk * (kWeights / 2), codes[u]);
      }
      if (chunk * kWeights < left && (lane_index() & (lanes - 1)) == 0) {
        absmax[chunk * kWeights >> a.blocksize_log2] = scale;
      }
    }
    if (whole < kTile) {
      uint32_t part = 0;
      bool mine = false;
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (u * kThreads + static_cast<int>(threadIdx.x) != whole) continue;
        part = codes[u];
        mine = true;
      }
      if (mine) store_part<T>(packed + whole * (kWeights / 2), part, left % kWeights);
    }
  }
}

// Larger blocks: a warp each, two chunks of a lane at a time, once for absmax and once for codes.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kThreads)
    quantize_large_kernel(const __grid_constant__ QuantizeArgument a,
                          const T* __restrict__ values) {
  constexpr int kWeights = kChunk<T>;
  const float threshold = a.bins.threshold[lane_index()];
  const int before = a.bins.before[lane_index()];
  const int64_t blocks = (a.numel + (int64_t{1} << a.blocksize_log2) - 1) >> a.blocksize_log2;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * (kThreads / 32);

  for (int64_t block = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + warp_index();
       block < blocks; block += stride) {
    const int64_t start = block << a.blocksize_log2;
    const T* src = values + start;
    uint8_t* packed = a.packed + start / 2;
    const int left = static_cast<int>(min(a.numel - start, int64_t{1} << a.blocksize_log2));
    const auto load = [&](int i) {
      if (i + kWeights <= left) return load_whole<T, kAligned>(src + i);
      return load_values<T>(src + i, left - i);
    };
    const auto store = [&](int i, uint32_t codes) {
      if (i + kWeights <= left) {
        store_whole<T, kAligned>(packed + i / 2, codes);
      } else if (i < left) {
        store_part<T>(packed + i / 2, codes, left - i);
      }
    };
    constexpr int kStep = 32 * kWeights;  // of a warp; a block is a multiple of twice that
    uint32_t top = 0;
    for (int i = lane_index() * kWeights; i < 1 << a.blocksize_log2; i += 2 * kStep) {
      const uint4 low = load(i), high = load(i + kStep);
      top = larger<T>(top, larger<T>(chunk_top<T>(low), chunk_top<T>(high)));
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      top = larger<T>(top, __shfl_xor_sync(kFullMask, top, step));
    }
    const float scale = absmax_of_top<T>(top);
    const float inverse = inverse_of(scale);
    for (int i = lane_index() * kWeights; i < 1 << a.blocksize_log2; i += 2 * kStep) {
      const uint4 low = load(i), high = load(i + kStep);
      store(i, chunk_codes<T>(low, scale, inverse, threshold, before));
      store(i + kStep, chunk_codes<T>(high, scale, inverse, threshold, before));
    }
    if (lane_index() == 0) a.absmax[block] = scale;
  }
}

template <typename T>
cudaError_t quantize(const QuantizeArgument& a, const void* src, cudaStream_t stream) {
  const bool aligned = is_aligned<T>(a.packed, src);
  const int64_t blocksize = int64_t{1} << a.blocksize_log2;
  const T* values = static_cast<const T*>(src);
  if (blocksize <= 32 * kChunk<T>) {
    const auto kernel = aligned ? quantize_kernel<T, true> : quantize_kernel<T, false>;
    return launch(kernel, grid_size(a.numel, kTile * kChunk<T>), kThreads, 0, stream, a, values);
  }
  const auto kernel = aligned ? quantize_large_kernel<T, true> : quantize_large_kernel<T, false>;
  const unsigned blocks = grid_size(a.numel, blocksize * (kThreads / 32));
  return launch(kernel, blocks, kThreads, 0, stream, a, values);
}

}  // namespace

void validate_cuda(const NF4View& w) {
  validate(w);
  const int64_t format = static_cast<int64_t>(w.format);
  require(format <= static_cast<int64_t>(Format::kFP4), "w: format", format, "0 (nf4) or 1 (fp4)");
  if (!w.nested) return;
  const int64_t group = w.nested_blocksize;
  require((group & (group - 1)) == 0, "nested_blocksize", group, "a power of two");
}

int cuda_nf4_dequantize(const NF4View& w, void* out, DType dtype, int64_t out_numel,
                        CudaStream stream) {
  validate_cuda(w);
  require(out_numel == w.numel, "out", out_numel, w.numel, "elements");
  if (w.numel == 0) return cudaSuccess;
  require(out, "out: null pointer");
  if (dtype == DType::kFloat32) return dequantize<float>(w, out, stream);
  if (dtype == DType::kBFloat16) return dequantize<BF16>(w, out, stream);
  return dequantize<FP16>(w, out, stream);
}

int cuda_nf4_quantize(const void* src, DType dtype, int64_t numel, int64_t blocksize,
                      uint8_t* packed, int64_t packed_bytes, float* absmax, int64_t absmax_len,
                      CudaStream stream) {
  NF4View w;
  w.packed = packed;
  w.packed_bytes = packed_bytes;
  w.absmax = absmax;
  w.absmax_len = absmax_len;
  w.blocksize = blocksize;
  w.numel = numel;
  validate(w);
  if (numel == 0) return cudaSuccess;
  require(src, "src: null pointer");
  const QuantizeArgument a = {numel, w.blocksize_log2(), packed, absmax, kBins};
  if (dtype == DType::kFloat32) return quantize<float>(a, src, stream);
  if (dtype == DType::kBFloat16) return quantize<BF16>(a, src, stream);
  return quantize<FP16>(a, src, stream);
}

}  // namespace peftkern
