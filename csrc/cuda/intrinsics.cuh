// Every instruction that CUDA C++ has no name for, as one small function with its PTX and, beside
// it, what it does on the CPU under csrc/tests/cuda_emulation.h. Kernels hold no asm of their own.
//
// 16-bit floats travel as bits: BF16 and FP16 tag them, a uint32_t holds two (element 0 in the low
// half), and float is what is computed with. Needs sm_80.
//
// There are exactly two ways to declare shared memory, for the emulation must know its exact size:
//   T* p = dynamic_shared<T>();        what launch() was given, 1024-byte aligned
//   PEFTKERN_SHARED(name, float[32]);  a static object; name has that type
#pragma once

#include <cstdint>

#ifdef PEFTKERN_CUDA_EMULATED
#define PEFTKERN_SHARED(name, ...)                                                    \
  static const char name##_key = 0;                                                   \
  auto& name = *static_cast<std::remove_reference_t<::peftkern::Same<__VA_ARGS__>>*>( \
      ::peftkern::emulation::static_shared(&name##_key, sizeof(::peftkern::Same<__VA_ARGS__>)))
#else
#define PEFTKERN_SHARED(name, ...) __shared__::peftkern::Same<__VA_ARGS__> name
#endif

namespace peftkern {

template <typename T>
struct SameType {
  using type = T;
};
template <typename T>
using Same = typename SameType<T>::type;  // lets a macro declare `float[32] name`

// The bits of a 16-bit float in memory.
struct BF16 {
  uint16_t bits;
};
struct FP16 {
  uint16_t bits;
};

namespace {

constexpr unsigned kFullMask = 0xffffffffu;
__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x & 31); }
__device__ __forceinline__ int warp_index() { return static_cast<int>(threadIdx.x >> 5); }

// ---- shared memory

template <typename T>
__device__ __forceinline__ T* dynamic_shared() {
#ifdef PEFTKERN_CUDA_EMULATED
  return static_cast<T*>(emulation::dynamic_shared());
#else
  extern __shared__ __align__(1024) unsigned char peftkern_dynamic_shared[];
  return reinterpret_cast<T*>(peftkern_dynamic_shared);
#endif
}

// The 32-bit address that PTX takes; `p` points into shared memory.
__device__ __forceinline__ uint32_t shared_address(const void* p) {
#ifdef PEFTKERN_CUDA_EMULATED
  return emulation::shared_address(p);
#else
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
#endif
}

// The word at such an address: one instruction whatever the address is computed from.
__device__ __forceinline__ uint32_t load_shared(uint32_t address) {
#ifdef PEFTKERN_CUDA_EMULATED
  if (address % 4) emulation::fail("a load from shared memory is not aligned");
  return *static_cast<const uint32_t*>(emulation::shared_pointer(address));
#else
  uint32_t value;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(address));
  return value;
#endif
}

// ---- global memory

// Reads what no thread of this launch writes. Unlike __ldg it stays in the loop it is written in: a
// load that is moved out of one is waited for before the loop's own loads are issued.
__device__ __forceinline__ float load_in_place(const float* p) {
#ifdef PEFTKERN_CUDA_EMULATED
  return *p;
#else
  float value;
  asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(value) : "l"(p));
  return value;
#endif
}

// 8 bytes, 8-byte aligned, that are read once: they take no room in L1. Not ld.global.nc, which
// would be moved down past barriers to where its result is used.
__device__ __forceinline__ uint2 load_once8(const void* p) {
#ifdef PEFTKERN_CUDA_EMULATED
  if (reinterpret_cast<uintptr_t>(p) % 8) emulation::fail("a load of 8 bytes is not aligned");
  return *static_cast<const uint2*>(p);
#else
  uint2 value;
  asm volatile("ld.global.L1::no_allocate.L2::128B.v2.u32 {%0, %1}, [%2];"
               : "=r"(value.x), "=r"(value.y)
               : "l"(p)
               : "memory");
  return value;
#endif
}

// Past L1, for what other blocks or the kernel before have written: never moved up over the barrier
// or the wait before it.
__device__ __forceinline__ float load_l2(const float* p) {
#ifdef PEFTKERN_CUDA_EMULATED
  return *p;
#else
  float value;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(value) : "l"(p) : "memory");
  return value;
#endif
}
__device__ __forceinline__ float4 load_l2(const float4* p) {
#ifdef PEFTKERN_CUDA_EMULATED
  return *p;
#else
  float4 value;
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
               : "l"(p)
               : "memory");
  return value;
#endif
}

// Asks for the line of L2 that holds `p`, which must be a valid address.
__device__ __forceinline__ void prefetch_l2(const void* p) {
#ifdef PEFTKERN_CUDA_EMULATED
  const volatile char touched = *static_cast<const char*>(p);
  (void)touched;
#else
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
#endif
}

// ---- kernels that overlap (Chain of launch.cuh)

// The next kernel may begin once every block of this one has come here or ended. The emulation lets
// it begin before this one does.
__device__ __forceinline__ void allow_following() {
#if !defined(PEFTKERN_CUDA_EMULATED) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// Until the kernel before this one has ended and what it wrote is seen. Such memory must be read
// by loads that are not moved up here: not __ldg.
__device__ __forceinline__ void wait_for_preceding() {
#ifdef PEFTKERN_CUDA_EMULATED
  emulation::wait_for_preceding();
#elif __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ---- 16-bit floats; roundings are to nearest even, a NaN becomes 0x7fff

#ifdef PEFTKERN_CUDA_EMULATED
inline uint16_t bf16_bits(float x) {
  const uint32_t u = __float_as_uint(x);
  if (x != x) return 0x7fff;
  return static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
inline uint16_t fp16_bits(float x) {
  if (x != x) return 0x7fff;
  const uint32_t u = __float_as_uint(x);
  const uint32_t sign = u >> 16 & 0x8000, size = u & 0x7fffffff;
  if (size >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // rounds past 65504
  if (size < 0x38800000) {  // subnormal: a multiple of 2^-24, and adding 0.5 rounds to one
    return static_cast<uint16_t>(sign |
                                 (__float_as_uint(__uint_as_float(size) + 0.5f) - 0x3f000000));
  }
  return static_cast<uint16_t>(sign | ((size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13));
}
inline float fp16_value(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  const uint32_t exponent = bits >> 10 & 31, mantissa = bits & 0x3ff;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000 | mantissa << 13);
  if (exponent == 0) {
    return __uint_as_float(sign | __float_as_uint(static_cast<float>(mantissa) * 0x1p-24f));
  }
  return __uint_as_float(sign | (exponent + 112) << 23 | mantissa << 13);
}
#endif

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(BF16 x) {
  return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
}
__device__ __forceinline__ float to_float(FP16 x) {
#ifdef PEFTKERN_CUDA_EMULATED
  return fp16_value(x.bits);
#else
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
#endif
}

// Two floats rounded to T, the first in the low half.
template <typename T>
__device__ __forceinline__ uint32_t pack2(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack2<BF16>(float low, float high) {
#ifdef PEFTKERN_CUDA_EMULATED
  return bf16_bits(low) | static_cast<uint32_t>(bf16_bits(high)) << 16;
#else
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
#endif
}
template <>
__device__ __forceinline__ uint32_t pack2<FP16>(float low, float high) {
#ifdef PEFTKERN_CUDA_EMULATED
  return fp16_bits(low) | static_cast<uint32_t>(fp16_bits(high)) << 16;
#else
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
#endif
}

template <typename T>
__device__ __forceinline__ float2 unpack2(uint32_t packed) {
  return make_float2(to_float(T{static_cast<uint16_t>(packed)}),
                     to_float(T{static_cast<uint16_t>(packed >> 16)}));
}

template <typename T>
__device__ __forceinline__ T from_float(float x) {
  return T{static_cast<uint16_t>(pack2<T>(x, 0.0f))};
}
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}

// Eight values of type A from 16-byte aligned memory that no thread of this launch writes.
template <typename A>
__device__ __forceinline__ void load_eight(const A* p, float (&value)[8]) {
  if constexpr (sizeof(A) == 4) {
    const float4 low = __ldg(reinterpret_cast<const float4*>(p));
    const float4 high = __ldg(reinterpret_cast<const float4*>(p) + 1);
    value[0] = low.x, value[1] = low.y, value[2] = low.z, value[3] = low.w;
    value[4] = high.x, value[5] = high.y, value[6] = high.z, value[7] = high.w;
  } else {
    const uint4 raw = __ldg(reinterpret_cast<const uint4*>(p));
    const uint32_t word[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = unpack2<A>(word[i]);
      value[2 * i] = pair.x, value[2 * i + 1] = pair.y;
    }
  }
}

// max(a, |b|), NaN if either is one (max.NaN: the sign and payload are lost).
__device__ __forceinline__ float max_abs(float a, float b) {
#ifdef PEFTKERN_CUDA_EMULATED
  if (a != a || b != b) return __uint_as_float(0x7fffffff);
  return std::fmax(a, std::fabs(b));
#else
  float result;
  asm("{.reg .f32 size; abs.f32 size, %2; max.NaN.f32 %0, %1, size;}"
      : "=f"(result)
      : "f"(a), "f"(b));
  return result;
#endif
}

#ifdef PEFTKERN_CUDA_EMULATED
template <typename T>
inline uint32_t max_abs2(uint32_t a, uint32_t b) {
  const float2 x = unpack2<T>(a), y = unpack2<T>(b);
  return pack2<T>(max_abs(x.x, y.x), max_abs(x.y, y.y));
}
#else
// The same for each of two 16-bit floats.
template <typename T>
__device__ __forceinline__ uint32_t max_abs2(uint32_t a, uint32_t b);
template <>
__device__ __forceinline__ uint32_t max_abs2<BF16>(uint32_t a, uint32_t b) {
  uint32_t result;
  asm("{.reg .b32 size; abs.bf16x2 size, %2; max.NaN.bf16x2 %0, %1, size;}"
      : "=r"(result)
      : "r"(a), "r"(b));
  return result;
}
template <>
__device__ __forceinline__ uint32_t max_abs2<FP16>(uint32_t a, uint32_t b) {
  uint32_t result;
  asm("{.reg .b32 size; abs.f16x2 size, %2; max.NaN.f16x2 %0, %1, size;}"
      : "=r"(result)
      : "r"(a), "r"(b));
  return result;
}
#endif

// ---- integers

// Bytes of {b, a} by the nibbles of `selector`; bit 3 of a nibble spreads the byte's top bit.
__device__ __forceinline__ uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
#ifdef PEFTKERN_CUDA_EMULATED
  return __byte_perm(a, b, selector);
#else
  uint32_t result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(selector));
  return result;
#endif
}

// ---- warps

// Sum over groups of kLanes neighbors, the same bits in each lane of a group.
template <int kLanes = 32>
__device__ __forceinline__ float lanes_sum(float x) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(kFullMask, x, step);
  return x;
}
template <int kLanes = 32>
__device__ __forceinline__ double lanes_sum(double x) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(kFullMask, x, step);
  return x;
}

// ---- asynchronous copies from global to shared memory

// 16 bytes, both addresses 16-byte aligned; only the first `bytes` are read, the rest becomes 0.
// Bypasses L1.
__device__ __forceinline__ void copy_async16(void* shared, const void* global, int bytes = 16) {
#ifdef PEFTKERN_CUDA_EMULATED
  emulation::defer_copy(shared, global, bytes, 16);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(__cvta_generic_to_global(global)), "r"(bytes)
               : "memory");
#endif
}
__device__ __forceinline__ void copy_async_commit() {
#ifdef PEFTKERN_CUDA_EMULATED
  emulation::commit_copies();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Until at most kLeft of this thread's groups are in flight. Others see them after a barrier.
template <int kLeft>
__device__ __forceinline__ void copy_async_wait() {
#ifdef PEFTKERN_CUDA_EMULATED
  emulation::wait_copies(kLeft);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
#endif
}

// ---- tensor cores. In what follows g = lane / 4 and t = lane % 4.

#ifdef PEFTKERN_CUDA_EMULATED
// x + y rounded toward zero: tensor cores cut off what does not fit their accumulator.
inline float add_truncated(double x, double y) {
  const double exact = x + y;
  float rounded = static_cast<float>(exact);
  if (std::isfinite(rounded) && std::fabs(double{rounded}) > std::fabs(exact)) {
    rounded = std::nextafter(rounded, 0.0f);
  }
  return rounded;
}

struct MmaFragments {
  float* d;
  const uint32_t *a, *b;
};
// One instruction of a warp: all fragments gathered into matrices, multiplied, scattered.
template <typename T>
void run_mma_m16n8k16(void* const* args, int width) {
  float A[16][16], B[16][8];
  for (int lane = 0; lane < width; ++lane) {
    const auto& f = *static_cast<const MmaFragments*>(args[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const float2 pair = unpack2<T>(f.a[i]);
      A[g + 8 * (i % 2)][2 * t + 8 * (i / 2)] = pair.x;
      A[g + 8 * (i % 2)][2 * t + 8 * (i / 2) + 1] = pair.y;
    }
    for (int i = 0; i < 2; ++i) {
      const float2 pair = unpack2<T>(f.b[i]);
      B[2 * t + 8 * i][g] = pair.x;
      B[2 * t + 8 * i + 1][g] = pair.y;
    }
  }
  for (int lane = 0; lane < width; ++lane) {
    float* d = static_cast<const MmaFragments*>(args[lane])->d;
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
      double sum = 0.0;
      for (int k = 0; k < 16; ++k) sum += double{A[row][k]} * double{B[k][column]};
      d[i] = add_truncated(d[i], sum);
    }
  }
}
#endif

// D[16, 8] += A[16, 16] B[16, 8], A and B of type T (BF16 or FP16), D float. Each register of A and
// B holds two values with neighboring k, the lower in the low half:
//   a[0] A[g][2t]   a[1] A[g+8][2t]   a[2] A[g][2t+8]   a[3] A[g+8][2t+8]
//   b[0] B[2t][g]   b[1] B[2t+8][g]
//   d[0], d[1] D[g][2t], D[g][2t+1]   d[2], d[3] D[g+8][2t], D[g+8][2t+1]
// The sixteen products are summed exactly under emulation; a device loses a few low bits.
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]);
#ifdef PEFTKERN_CUDA_EMULATED
template <typename T>
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  MmaFragments fragments{d, a, b};
  emulation::collective(32, kFullMask, run_mma_m16n8k16<T>, &fragments, "mma.m16n8k16");
}
#else
template <>
__device__ __forceinline__ void mma_m16n8k16<BF16>(float (&d)[4], const uint32_t (&a)[4],
                                                   const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void mma_m16n8k16<FP16>(float (&d)[4], const uint32_t (&a)[4],
                                                   const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

// D = A B.
template <typename T>
__device__ __forceinline__ void mma_m16n8k16_first(float (&d)[4], const uint32_t (&a)[4],
                                                   const uint32_t (&b)[2]);
#ifdef PEFTKERN_CUDA_EMULATED
template <typename T>
inline void mma_m16n8k16_first(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  for (float& value : d) value = 0.0f;
  mma_m16n8k16<T>(d, a, b);
}
#else
template <>
__device__ __forceinline__ void mma_m16n8k16_first<BF16>(float (&d)[4], const uint32_t (&a)[4],
                                                         const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, %10};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(0.0f));
}
template <>
__device__ __forceinline__ void mma_m16n8k16_first<FP16>(float (&d)[4], const uint32_t (&a)[4],
                                                         const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, %10};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(0.0f));
}
#endif

}  // namespace
}  // namespace peftkern
