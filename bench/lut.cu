// How many NF4 weights can a multiprocessor look up in a clock, by which table? An experiment that
// bench/lut.py compiles, checks and runs; nothing that ships includes it.
//
//   nvcc -std=c++17 -O3 -arch=sm_90a -shared -Xcompiler -fPIC -I csrc/cuda bench/lut.cu -o lut.so
//
// A word of eight codes becomes four registers of two bfloat16 each, in the order of the weights
// and without absmax. Words are counted up in registers and results go into an exclusive or, three
// instructions for eight weights, so that neither memory nor a product bounds what is seen.
//
// For eight weights, with what sm_90a code issues, loop and exclusive or included; an SM issues 128
// lanes in a clock, of them 32 of shuffles or of shared memory:
//   permute  24.4: byte planes in registers, 8 entries to a prmt, 21 operations
//   shuffle  22.5: 8 shuffles, 7 shifts, 4 to pack; value i is in lanes i and i + 16
//   shared   31.5: 8 loads from 16 entries in 16 banks, 8 x (shift, mask), 4 to pack
//   pairs    15.6: 4 loads from 256 pairs, each 32 times so that a lane has its bank
//   selects 105.1: a tree of 15 for each weight
#include "intrinsics.cuh"
#include "launch.cuh"

namespace peftkern {
namespace {

constexpr int kThreads = 1024;  // the only block of its multiprocessor
constexpr uint32_t kFirst = 2654435761u, kStep = 0x9e3779b9u;
constexpr int kUnroll = 4;

struct Values {
  uint32_t bits[16];  // bfloat16, in the low half
};

__device__ __forceinline__ int64_t clocks() {
#ifdef PEFTKERN_CUDA_EMULATED
  return 0;
#else
  return clock64();
#endif
}

// The shift that brings the code of weight i of a word to the low bits: the even weight of a byte
// is its high nibble.
__host__ __device__ constexpr int code_shift(int i) { return 8 * (i / 2) + (i % 2 ? 0 : 4); }

// Bit i of the result is bit (a_i << 2 | b_i << 1 | c_i) of kTable: (a & b) | c is 0xea.
template <int kTable>
__device__ __forceinline__ uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
#ifdef PEFTKERN_CUDA_EMULATED
  uint32_t result = 0;
  for (int i = 0; i < 8; ++i) {
    if (kTable >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  }
  return result;
#else
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(result) : "r"(a), "r"(b), "r"(c), "n"(kTable));
  return result;
#endif
}

// Two 16-bit values as one register.
__device__ __forceinline__ uint32_t pair(uint32_t even, uint32_t odd) {
  return permute_bytes(even, odd, 0x5410);
}

class Permute {
 public:
  __device__ __forceinline__ explicit Permute(const Values& values) {
#pragma unroll
    for (int i = 0; i < 16; i += 4) {
      low_[i / 4] = high_[i / 4] = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        low_[i / 4] |= (values.bits[i + j] & 255) << 8 * j;
        high_[i / 4] |= (values.bits[i + j] >> 8) << 8 * j;
      }
      // Through a shuffle, or half of the planes stay in uniform registers, which prmt cannot read
      // beside others: a copy each time.
      low_[i / 4] = __shfl_sync(kFullMask, low_[i / 4], 0);
      high_[i / 4] = __shfl_sync(kFullMask, high_[i / 4], 0);
    }
  }
  __device__ __forceinline__ void operator()(uint32_t word, uint32_t (&out)[4]) const {
    const uint32_t index = word & 0x77777777, moved = word << 4;
    // Byte by byte 0xff where the code is 8 or more: prmt's sign mode.
    const uint32_t upper[2] = {permute_bytes(word, moved, 0x9d8c),
                               permute_bytes(word, moved, 0xbfae)};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t l = look_up(low_, half ? index >> 16 : index, upper[half]);
      const uint32_t h = look_up(high_, half ? index >> 16 : index, upper[half]);
      out[2 * half] = permute_bytes(l, h, 0x4051);
      out[2 * half + 1] = permute_bytes(l, h, 0x6273);
    }
  }

 private:
  __device__ __forceinline__ static uint32_t look_up(const uint32_t (&plane)[4], uint32_t index,
                                                     uint32_t upper) {
    return lop3<0xd8>(permute_bytes(plane[0], plane[1], index),
                      permute_bytes(plane[2], plane[3], index), upper);
  }
  uint32_t low_[4], high_[4];
};

class Shuffle {
 public:
  __device__ __forceinline__ explicit Shuffle(const Values& values) {
    value_ = values.bits[0];
#pragma unroll
    for (int i = 1; i < 16; ++i) value_ = (lane_index() & 15) == i ? values.bits[i] : value_;
  }
  __device__ __forceinline__ void operator()(uint32_t word, uint32_t (&out)[4]) const {
    uint32_t v[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      v[i] = __shfl_sync(kFullMask, value_, static_cast<int>(word >> code_shift(i)), 16);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = pair(v[2 * i], v[2 * i + 1]);
  }

 private:
  uint32_t value_;
};

class Shared {
 public:
  __device__ __forceinline__ explicit Shared(const Values& values) {
    PEFTKERN_SHARED(table, uint32_t[16]);
    if (threadIdx.x == 0) {
#pragma unroll
      for (int i = 0; i < 16; ++i) table[i] = values.bits[i];
    }
    table_ = table;
  }
  __device__ __forceinline__ void operator()(uint32_t word, uint32_t (&out)[4]) const {
    uint32_t v[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = table_[word >> code_shift(i) & 15];
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = pair(v[2 * i], v[2 * i + 1]);
  }

 private:
  const uint32_t* table_;
};

class Pairs {
 public:
  __device__ __forceinline__ explicit Pairs(const Values& values) {
    PEFTKERN_SHARED(table, uint32_t[256 * 32]);
    PEFTKERN_SHARED(single, uint32_t[16]);
    if (threadIdx.x == 0) {
#pragma unroll
      for (int i = 0; i < 16; ++i) single[i] = values.bits[i];
    }
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < 256 * 32; i += kThreads) {
      table[i] = single[i / 32 >> 4] | single[i / 32 & 15] << 16;
    }
    table_ = reinterpret_cast<const char*>(table);
    lane_ = static_cast<uint32_t>(4 * lane_index());
  }
  __device__ __forceinline__ void operator()(uint32_t word, uint32_t (&out)[4]) const {
    // 128 * byte + 4 * lane
    out[0] = at(word << 7);
    out[1] = at(word >> 1);
    out[2] = at(word >> 9);
    out[3] = at(word >> 17);
  }

 private:
  __device__ __forceinline__ uint32_t at(uint32_t shifted) const {
    return *reinterpret_cast<const uint32_t*>(table_ + lop3<0xea>(shifted, 0x7f80, lane_));
  }
  const char* table_;
  uint32_t lane_;
};

class Selects {
 public:
  __device__ __forceinline__ explicit Selects(const Values& values) : values_(values) {}
  __device__ __forceinline__ void operator()(uint32_t word, uint32_t (&out)[4]) const {
    uint32_t v[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = select<3>(word >> code_shift(i), 0);
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = pair(v[2 * i], v[2 * i + 1]);
  }

 private:
  // Among 2 << kBit values from the first one on.
  template <int kBit>
  __device__ __forceinline__ uint32_t select(uint32_t code, int first) const {
    if constexpr (kBit < 0) {
      return values_.bits[first];
    } else {
      const uint32_t lower = select<kBit - 1>(code, first);
      const uint32_t upper = select<kBit - 1>(code, first + (1 << kBit));
      return code >> kBit & 1 ? upper : lower;
    }
  }
  Values values_;
};

// sums [threads of the grid, 4]; spent [blocks]: clocks of each block's loop.
template <typename Decoder>
__global__ void __launch_bounds__(kThreads, 1)
    decode_kernel(const __grid_constant__ Values values, int iterations, uint32_t* sums,
                  int64_t* spent) {
  const Decoder decode(values);
  const uint32_t thread = blockIdx.x * kThreads + threadIdx.x;
  uint32_t word = (thread + 1) * kFirst, sum[4] = {0, 0, 0, 0};
  __syncthreads();
  const int64_t start = clocks();
#pragma unroll kUnroll
  for (int i = 0; i < iterations; ++i, word += 2 * kStep) {
    uint32_t a[4], b[4];
    decode(word, a);
    decode(word + kStep, b);
#pragma unroll
    for (int j = 0; j < 4; ++j) sum[j] = lop3<0x96>(sum[j], a[j], b[j]);
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) sums[4 * thread + j] = sum[j];
  __syncthreads();
  if (threadIdx.x == 0) spent[blockIdx.x] = clocks() - start;
}

template <typename Decoder>
cudaError_t decode(int blocks, const Values& values, int iterations, uint32_t* sums, int64_t* spent,
                   cudaStream_t stream) {
  // So much shared memory that a second block finds no room beside the first.
  const auto dynamic = static_cast<size_t>(most_shared_bytes() - 34 * 1024);
  return launch(decode_kernel<Decoder>, static_cast<unsigned>(blocks), kThreads, dynamic, stream,
                values, iterations, sums, spent);
}

}  // namespace
}  // namespace peftkern

extern "C" {

int lut_threads() { return peftkern::kThreads; }
int lut_multiprocessors() { return peftkern::multiprocessors(); }

// decoder: permute, shuffle, shared, pairs, selects. values: 16 bfloat16 on the host. Each thread
// decodes 2 * iterations words. Returns a cudaError_t, -1 for a decoder that there is not.
int lut_decode(int decoder, int blocks, const uint16_t* values, int iterations, uint32_t* sums,
               int64_t* spent, void* stream) {
  using namespace peftkern;
  Values table;
  for (int i = 0; i < 16; ++i) table.bits[i] = values[i];
  const auto s = static_cast<cudaStream_t>(stream);
  switch (decoder) {
    case 0:
      return decode<Permute>(blocks, table, iterations, sums, spent, s);
    case 1:
      return decode<Shuffle>(blocks, table, iterations, sums, spent, s);
    case 2:
      return decode<Shared>(blocks, table, iterations, sums, spent, s);
    case 3:
      return decode<Pairs>(blocks, table, iterations, sums, spent, s);
    case 4:
      return decode<Selects>(blocks, table, iterations, sums, spent, s);
    default:
      return -1;
  }
}
}
