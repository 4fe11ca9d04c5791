// NF4 on a GPU: dequantise, nested or plain, and quantise, one launch each.
//
// Bytes per weight, 16-bit dense values, blocks of 64, nested: 0.5 codes + 1/64 absmax + 2 dense =
// 2.52 (float32: 4.52; quantising a 16-bit weight: 2 + 0.5 + 4/64 = 2.56). At 4.3 TB/s of copy
// bandwidth an H200 (132 SMs at 1.76 GHz) moves 18.5 B per SM and clock, 7.4 weights dequantised:
// 14336 x 4096 takes 34.4 us, and there are 552 issue slots for the 1024 weights that 32 lanes of
// 32 weights handle in 138 clocks, 17 for each weight of a lane.
//
// Dequantise, for a lane's chunk of 8 weights (16 B of bfloat16): 1 load of 4 B, 2-4 for absmax; 8
// x (shift, shuffle, multiply); 4 conversions; 1 store of 16 B: about 5 instructions a weight.
// Lookups go through shuffles, with value i in lanes i and i + 16: a shuffle takes 5 bits of its
// index, of which the top one then does not matter, so nibbles need no mask. That is 8 + 4 + 4 of
// the 34 clocks which the shared-memory pipe has for 256 weights. Loads and stores of a warp are
// contiguous: a lane that loaded 16 B of codes would have to store 64 B on its own, in half-filled
// sectors. Narrow loads cost nothing here: 4 x 128 B and 1 x 512 B are the same four wavefronts.
//
// Quantise: 16 B loads; about 12 instructions and 2 shuffles a weight, 21 of 35 clocks of that
// pipe. The code of x is the number of midpoints below it: x falls into one of 31 bins, which hold
// one midpoint at most, so a lookup gives the midpoint to compare with and the number of those
// before. Blocks beyond a warp's 32 chunks are read twice, from a cache the second time.
#include "launch.cuh"
#include "nf4.cuh"
#include "peftkern/checks.h"

namespace peftkern {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;  // chunks of a lane, whose loads are in flight together

// A chunk is what fits 16 bytes of dense values.
template <typename T>
constexpr int kChunk = 16 / static_cast<int>(sizeof(T));

template <typename T>
struct Chunk {
  T value[kChunk<T>];
};
template <typename T>
struct Packed;  // the unsigned integer that holds a chunk's codes
template <>
struct Packed<float> {
  using type = uint16_t;
};
template <>
struct Packed<BF16> {
  using type = uint32_t;
};
template <>
struct Packed<FP16> {
  using type = uint32_t;
};

// ---- dequantise

template <typename T>
__device__ __forceinline__ uint4 round_chunk(const float (&x)[kChunk<T>]) {
  if constexpr (sizeof(T) == 4) {
    return make_uint4(__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]),
                      __float_as_uint(x[3]));
  } else {
    return make_uint4(pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3]), pack2<T>(x[4], x[5]),
                      pack2<T>(x[6], x[7]));
  }
}

// kAligned: codes to the size of Packed, out to 16 bytes.
template <typename T, bool kNested, bool kAligned>
__global__ void __launch_bounds__(kThreads)
    dequantize_kernel(const __grid_constant__ NF4Argument w, T* __restrict__ out) {
  constexpr int kWeights = kChunk<T>;
  using Codes = typename Packed<T>::type;
  const float table = w.code[lane_index() & 15];
  const float offset = kNested ? __ldg(w.offset) : 0.0f;
  const int64_t chunks = w.numel / kWeights;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * (kThreads * kUnroll);

  // Whole warps go round together, for all lanes take part in the lookups.
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * (kThreads * kUnroll); first < chunks;
       first += stride) {
    uint32_t codes[kUnroll], raw[kUnroll];
    float absmax[kUnroll];
    int64_t block[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      // Lanes past the end load the last chunk again and store nothing.
      const int64_t wanted = first + u * kThreads + threadIdx.x;
      const int64_t chunk = wanted < chunks ? wanted : chunks - 1;
      block[u] = chunk * kWeights >> w.blocksize_log2;
      raw[u] = load_raw_absmax<kNested>(w, block[u]);
      if constexpr (kAligned) {
        codes[u] = __ldcs(reinterpret_cast<const Codes*>(w.packed) + chunk);
      } else {
        codes[u] = 0;
#pragma unroll
        for (int i = 0; i < kWeights / 2; ++i) {
          codes[u] |= static_cast<uint32_t>(w.packed[chunk * (kWeights / 2) + i]) << 8 * i;
        }
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      absmax[u] = absmax_value<kNested>(w, block[u], raw[u], offset);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      float x[kWeights];
#pragma unroll
      for (int i = 0; i < kWeights; ++i) {
        const int shift = 8 * (i / 2) + (i % 2 ? 0 : 4);  // the even weight is the high nibble
        const float code = __shfl_sync(kFullMask, table, static_cast<int>(codes[u] >> shift));
        x[i] = __fmul_rn(code, absmax[u]);
      }
      const int64_t chunk = first + u * kThreads + threadIdx.x;
      if (chunk >= chunks) continue;
      if constexpr (kAligned) {
        reinterpret_cast<uint4*>(out)[chunk] = round_chunk<T>(x);
      } else {
#pragma unroll
        for (int i = 0; i < kWeights; ++i) out[chunk * kWeights + i] = from_float<T>(x[i]);
      }
    }
  }

  // Less than a chunk is left: a weight per lane of the last warp.
  const int64_t i = chunks * kWeights + lane_index();
  if (blockIdx.x == gridDim.x - 1 && warp_index() == kThreads / 32 - 1) {
    const bool live = i < w.numel;
    const uint32_t byte = live ? w.packed[i / 2] : 0;
    const float code = __shfl_sync(kFullMask, table, static_cast<int>(i % 2 ? byte : byte >> 4));
    if (live) {
      const int64_t block = i >> w.blocksize_log2;
      const uint32_t raw = load_raw_absmax<kNested>(w, block);
      out[i] = from_float<T>(__fmul_rn(code, absmax_value<kNested>(w, block, raw, offset)));
    }
  }
}

template <typename T>
cudaError_t dequantize(const CudaNF4View& w, void* out, cudaStream_t stream) {
  const bool aligned =
      reinterpret_cast<uintptr_t>(out) % 16 == 0 &&
      reinterpret_cast<uintptr_t>(w.packed) % sizeof(typename Packed<T>::type) == 0;
  const auto kernel =
      w.nested ? (aligned ? dequantize_kernel<T, true, true> : dequantize_kernel<T, true, false>)
               : (aligned ? dequantize_kernel<T, false, true> : dequantize_kernel<T, false, false>);
  const unsigned blocks = grid_size(w.numel, int64_t{kChunk<T>} * kThreads * kUnroll);
  return launch(kernel, blocks, kThreads, 0, stream, nf4_argument(w), static_cast<T*>(out));
}

// ---- quantise

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

// `count` values of a chunk, zeros after them.
template <typename T, bool kAligned>
__device__ __forceinline__ uint4 load_chunk(const T* src, int64_t chunk, int64_t numel) {
  constexpr int kWeights = kChunk<T>;
  const int64_t start = chunk * kWeights;
  if (kAligned && start + kWeights <= numel)
    return __ldg(reinterpret_cast<const uint4*>(src) + chunk);
  uint32_t word[4] = {};
#pragma unroll
  for (int i = 0; i < kWeights; ++i) {
    uint32_t bits = 0;
    if (start + i < numel) {
      if constexpr (sizeof(T) == 4) {
        bits = __float_as_uint(src[start + i]);
      } else {
        bits = static_cast<uint32_t>(src[start + i].bits) << (i % 2 ? 16 : 0);
      }
    }
    word[sizeof(T) == 4 ? i : i / 2] |= bits;
  }
  return make_uint4(word[0], word[1], word[2], word[3]);
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

// The largest |x| as bits, which order as the values do; a NaN is larger than all.
template <typename T>
__device__ __forceinline__ uint32_t chunk_top(const uint4& raw) {
  float x[kChunk<T>];
  widen_chunk<T>(raw, x);
  uint32_t top = 0;
#pragma unroll
  for (int i = 0; i < kChunk<T>; ++i) top = max(top, __float_as_uint(x[i]) & 0x7fffffffu);
  return top;
}

__device__ __forceinline__ float absmax_of_top(uint32_t top) {
  return __uint_as_float(top > 0x7f800000u ? 0x7fc00000u : top);
}
__device__ __forceinline__ float inverse_of(float absmax) {
  constexpr float kFloor = kAbsmaxFloor;
  return __frcp_rn(absmax < kFloor ? kFloor : absmax);
}

// All lanes of the warp call this; `threshold` and `before` are this lane's entries of Bins.
template <typename T>
__device__ __forceinline__ uint32_t chunk_codes(const uint4& raw, float inverse, float threshold,
                                                int before) {
  float x[kChunk<T>];
  widen_chunk<T>(raw, x);
  uint32_t codes = 0;
#pragma unroll
  for (int i = 0; i < kChunk<T>; ++i) {
    // fminf turns a NaN into 1, and so into the highest code.
    const float scaled = fminf(__fmul_rn(x[i], inverse), 1.0f);
    const int bin = bin_bits(scaled);
    const float midpoint = __shfl_sync(kFullMask, threshold, bin);
    const int lower = __shfl_sync(kFullMask, before, bin);
    const uint32_t code = static_cast<uint32_t>(lower + (scaled > midpoint));
    codes |= code << (8 * (i / 2) + (i % 2 ? 0 : 4));
  }
  return codes;
}

template <typename T, bool kAligned>
__device__ __forceinline__ void store_codes(const QuantizeArgument& a, int64_t chunk,
                                            uint32_t codes) {
  constexpr int kWeights = kChunk<T>;
  using Codes = typename Packed<T>::type;
  const int64_t left = a.numel - chunk * kWeights;
  if (left <= 0) return;
  if (kAligned && left >= kWeights) {
    reinterpret_cast<Codes*>(a.packed)[chunk] = static_cast<Codes>(codes);
    return;
  }
#pragma unroll
  for (int i = 0; i < kWeights / 2; ++i) {
    const uint32_t byte = codes >> 8 * i & 255;
    if (2 * i + 1 < left) a.packed[chunk * (kWeights / 2) + i] = static_cast<uint8_t>(byte);
    // 7 is zero: the format's filler after an odd end.
    if (2 * i + 1 == left) {
      a.packed[chunk * (kWeights / 2) + i] = static_cast<uint8_t>((byte & 0xf0) | 7);
    }
  }
}

// Blocks of at most a warp's 32 chunks: neighbouring lanes share a block, one chunk each.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kThreads)
    quantize_kernel(const __grid_constant__ QuantizeArgument a, const T* __restrict__ src) {
  constexpr int kWeights = kChunk<T>;
  const float threshold = a.bins.threshold[lane_index()];
  const int before = a.bins.before[lane_index()];
  const int lanes = (1 << a.blocksize_log2) / kWeights;
  const int64_t chunks = a.numel / kWeights + (a.numel % kWeights != 0);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * (kThreads * kUnroll);

  for (int64_t first = static_cast<int64_t>(blockIdx.x) * (kThreads * kUnroll); first < chunks;
       first += stride) {
    uint4 raw[kUnroll];
    uint32_t top[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      raw[u] = load_chunk<T, kAligned>(src, first + u * kThreads + threadIdx.x, a.numel);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) top[u] = chunk_top<T>(raw[u]);
    for (int step = lanes / 2; step > 0; step /= 2) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        top[u] = max(top[u], __shfl_xor_sync(kFullMask, top[u], step));
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t chunk = first + u * kThreads + threadIdx.x;
      const float absmax = absmax_of_top(top[u]);
      const uint32_t codes = chunk_codes<T>(raw[u], inverse_of(absmax), threshold, before);
      store_codes<T, kAligned>(a, chunk, codes);
      if (chunk < chunks && lane_index() % lanes == 0) {
        a.absmax[chunk * kWeights >> a.blocksize_log2] = absmax;
      }
    }
  }
}

// Larger blocks: a warp each, two chunks of a lane at a time, once for absmax and once for codes.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kThreads)
    quantize_large_kernel(const __grid_constant__ QuantizeArgument a, const T* __restrict__ src) {
  constexpr int kWeights = kChunk<T>;
  const float threshold = a.bins.threshold[lane_index()];
  const int before = a.bins.before[lane_index()];
  const int64_t blocks = (a.numel + (int64_t{1} << a.blocksize_log2) - 1) >> a.blocksize_log2;
  const int chunks = (1 << a.blocksize_log2) / kWeights;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * (kThreads / 32);

  for (int64_t block = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + warp_index();
       block < blocks; block += stride) {
    const int64_t first = block * chunks + lane_index();
    uint32_t top = 0;
    for (int i = 0; i < chunks; i += 64) {
      const uint4 low = load_chunk<T, kAligned>(src, first + i, a.numel);
      const uint4 high = load_chunk<T, kAligned>(src, first + i + 32, a.numel);
      top = max(top, max(chunk_top<T>(low), chunk_top<T>(high)));
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      top = max(top, __shfl_xor_sync(kFullMask, top, step));
    }
    const float absmax = absmax_of_top(top);
    const float inverse = inverse_of(absmax);
    for (int i = 0; i < chunks; i += 64) {
      const uint4 low = load_chunk<T, kAligned>(src, first + i, a.numel);
      const uint4 high = load_chunk<T, kAligned>(src, first + i + 32, a.numel);
      store_codes<T, kAligned>(a, first + i, chunk_codes<T>(low, inverse, threshold, before));
      store_codes<T, kAligned>(a, first + i + 32, chunk_codes<T>(high, inverse, threshold, before));
    }
    if (lane_index() == 0) a.absmax[block] = absmax;
  }
}

template <typename T>
cudaError_t quantize(const QuantizeArgument& a, const void* src, cudaStream_t stream) {
  const bool aligned =
      reinterpret_cast<uintptr_t>(src) % 16 == 0 &&
      reinterpret_cast<uintptr_t>(a.packed) % sizeof(typename Packed<T>::type) == 0;
  const int64_t blocksize = int64_t{1} << a.blocksize_log2;
  const T* values = static_cast<const T*>(src);
  if (blocksize <= 32 * kChunk<T>) {
    const auto kernel = aligned ? quantize_kernel<T, true> : quantize_kernel<T, false>;
    const unsigned blocks = grid_size(a.numel, int64_t{kChunk<T>} * kThreads * kUnroll);
    return launch(kernel, blocks, kThreads, 0, stream, a, values);
  }
  const auto kernel = aligned ? quantize_large_kernel<T, true> : quantize_large_kernel<T, false>;
  const unsigned blocks = grid_size(a.numel, blocksize * (kThreads / 32));
  return launch(kernel, blocks, kThreads, 0, stream, a, values);
}

}  // namespace

void validate_cuda(const CudaNF4View& w) {
  validate(w);
  if (w.nested && w.numel > 0 && !w.offset) fail("nested_offset: null pointer");
}

int cuda_nf4_dequantize(const CudaNF4View& w, void* out, DType dtype, int64_t out_numel,
                        CudaStream stream) {
  validate_cuda(w);
  require(out_numel == w.numel, "out", out_numel, std::to_string(w.numel) + " elements");
  if (w.numel == 0) return cudaSuccess;
  if (!out) fail("out: null pointer");
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
  if (!src) fail("src: null pointer");
  const QuantizeArgument a = {numel, w.blocksize_log2(), packed, absmax, kBins};
  if (dtype == DType::kFloat32) return quantize<float>(a, src, stream);
  if (dtype == DType::kBFloat16) return quantize<BF16>(a, src, stream);
  return quantize<FP16>(a, src, stream);
}

}  // namespace peftkern
