// CUDA on a CPU, for tests: what csrc/cuda/*.cu uses of the language and the runtime, so that a C++
// compiler builds the real kernels and sanitizers watch them. Force-included (-include) with
// PEFTKERN_CUDA_EMULATED defined; nothing that ships includes it.
//
// Blocks run one after the other; the threads of a block are fibers of the calling OS thread that
// change over at barriers, warp collectives and waits only. What that finds:
//   - a barrier or collective that not all threads reach: no fiber can go on, abort with a list;
//   - __syncthreads reached at different lines: abort;
//   - reads of shared memory that nobody wrote: it is 0xff (NaN) when a block starts;
//   - accesses outside shared memory: exactly sized heap memory, for AddressSanitizer;
//   - missing waits: an asynchronous copy fills its destination with 0xff and happens at the wait;
//   - missing barriers: under another schedule (set_schedule) results change. Run a kernel under
//     kSchedules schedules and compare bit for bit;
//   - chains (launch.cuh): a kernel begins before the one ahead of it, which runs to its end when a
//     first thread of the later one waits for it: what is read before then is not written yet. A
//     kernel that ends without such a wait: abort;
//   - wgmma: a product is computed when its warpgroup waits for it, from what registers and shared
//     memory hold then, and its accumulators are 0xff until then: early reads, early overwrites and
//     missing waits change results. A product without a fence since the last group, and one after a
//     barrier that copies passed without fence.proxy.async: abort.
// It cannot find anything about speed, bank conflicts, registers, memory ordering between
// blocks that run at once.
//
// To add an instruction: put a wrapper into csrc/cuda/intrinsics.cuh with its PTX and, beside it,
// an emulated form built from these: collective() for what a warp (width 32) or a warpgroup (128)
// does together, wait() for anything that polls, shared_address()/shared_pointer() for 32-bit
// addresses of shared memory, defer_copy() for asynchronous copies.
#pragma once

#ifndef PEFTKERN_CUDA_EMULATED
#error "cuda_emulation.h needs PEFTKERN_CUDA_EMULATED"
#endif

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
// __shared__ is left out on purpose: see PEFTKERN_SHARED and dynamic_shared in intrinsics.cuh.

// ---- types and variables of the language

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct uint3 {
  unsigned x, y, z;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

extern __thread uint3 threadIdx, blockIdx, blockDim, gridDim;

// ---- the runtime: every call is finished when it returns

struct CUstream_st;
using cudaStream_t = CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    default:
      return "invalid argument";
  }
}

namespace peftkern {
namespace emulation {

// ---- for tests

// The order in which the threads of a block, and the blocks of a grid, take their turns: 0 is
// ascending, 1 descending, anything else shuffles anew at each turn with that seed. Per OS thread.
void set_schedule(uint32_t seed);
constexpr uint32_t kSchedules = 4;

// Limits of a device that has as much shared memory as sm_90.
constexpr size_t kMaxSharedBytes = 227 * 1024;

// Runs `body` for every thread of the grid; `body` calls the kernel.
cudaError_t run(dim3 grid, dim3 block, size_t dynamic_shared_bytes,
                const std::function<void()>& body);

// ---- for launch.cuh: kernels of a chain run as late as they may

// As run, but the kernel runs when the next one of its chain waits for it, or at run_deferred().
// A kernel that is not `dependent` begins a chain; that and run() end the one before.
cudaError_t run_later(dim3 grid, dim3 block, size_t dynamic_shared_bytes,
                      const std::function<void()>& body, bool dependent);
void run_deferred();

// ---- for the emulated forms of instructions

[[noreturn]] void fail(const char* message);  // names the thread and block, then aborts

// Another thread of the block goes on; this one does once ready(state) is true. `what` is for the
// report of a deadlock.
void wait(bool (*ready)(const void*), const void* state, const char* what);

void wait_for_preceding();

// The barrier of all threads of the block; all must come from the same line.
void barrier(int line);

// A step that `width` (32 or 128) consecutive threads take together. `args` is this thread's own
// struct of inputs and outputs, on its stack. When all lanes in `mask` (of a warp; all of a
// warpgroup) have arrived, run(args of all lanes, width) is called once; then all go on. Absent
// lanes are null.
using Run = void (*)(void* const* args, int width);
void collective(int width, uint32_t mask, Run run, void* args, const char* what);

// Shared memory has addresses of its own: the dynamic part begins at kSharedBase.
constexpr uint32_t kSharedBase = 1024;
void* dynamic_shared();
void* static_shared(const void* key, size_t bytes);  // one object per key and block
uint32_t shared_address(const void* pointer);        // fails for a pointer to anything else
void* shared_pointer(uint32_t address);

// Copies `bytes` and zeroes the rest of `total` when this thread waits for the copy's group.
void defer_copy(void* destination, const void* source, int bytes, int total);
void commit_copies();
void wait_copies(int groups_left);

// This thread's share of a warpgroup's product. `d`, `count` floats, is filled with 0xff at once;
// when the warpgroup waits for the group, run(shares of the 128 lanes, their sums) adds to what `d`
// held, and it gets the sum back when no product in flight has it.
struct Product {
  void (*run)(const Product* const* shares, float* const* sums);
  float* d;
  int count;
  const uint32_t* a;
  uint64_t b;
};
void fence_products();
void issue_product(const Product& share);
void commit_products();
void wait_products(int groups_left);  // a collective of the warpgroup
void fence_copies();                  // fence.proxy.async

inline int lane() { return static_cast<int>(threadIdx.x % 32); }

template <typename T>
struct Exchange {
  T value, result;
  int source;
};

template <typename T>
T exchange(uint32_t mask, T value, int source, const char* what) {
  Exchange<T> mine{value, value, source};
  collective(
      32, mask,
      [](void* const* args, int width) {
        for (int i = 0; i < width; ++i) {
          auto* to = static_cast<Exchange<T>*>(args[i]);
          if (!to) continue;
          const auto* from = static_cast<const Exchange<T>*>(args[to->source]);
          if (from) {
            to->result = from->value;
          } else {  // undefined on a device
            std::memset(static_cast<void*>(&to->result), 0xff, sizeof(T));
          }
        }
      },
      &mine, what);
  return mine.result;
}

// result = combine of the values of all lanes in ascending order, the same for each.
template <typename T, T (*kCombine)(T, T)>
T reduce(uint32_t mask, T value, const char* what) {
  Exchange<T> mine{value, value, 0};
  collective(
      32, mask,
      [](void* const* args, int width) {
        T total{};
        bool first = true;
        for (int i = 0; i < width; ++i) {
          if (!args[i]) continue;
          const T next = static_cast<const Exchange<T>*>(args[i])->value;
          total = first ? next : kCombine(total, next);
          first = false;
        }
        for (int i = 0; i < width; ++i) {
          if (args[i]) static_cast<Exchange<T>*>(args[i])->result = total;
        }
      },
      &mine, what);
  return mine.result;
}

inline uint32_t add(uint32_t a, uint32_t b) { return a + b; }
inline uint32_t either(uint32_t a, uint32_t b) { return a | b; }

}  // namespace emulation
}  // namespace peftkern

// ---- barriers and warp collectives

inline void __syncthreads(int line = __builtin_LINE()) { peftkern::emulation::barrier(line); }
inline void __syncwarp(uint32_t mask = 0xffffffff) {
  char nothing;
  peftkern::emulation::collective(32, mask, [](void* const*, int) {}, &nothing, "__syncwarp");
}
// As the hardware: out of a segment of `segment` lanes, `source` counts modulo its size.
template <typename T>
T __shfl_sync(uint32_t mask, T value, int source, int segment = 32) {
  const int lane = peftkern::emulation::lane();
  const int from = (lane & ~(segment - 1)) | (source & (segment - 1));
  return peftkern::emulation::exchange(mask, value, from, "__shfl_sync");
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, int segment = 32) {
  const int lane = peftkern::emulation::lane(), from = lane ^ bits;
  const int source = from >= (lane & ~(segment - 1)) + segment ? lane : from & 31;
  return peftkern::emulation::exchange(mask, value, source, "__shfl_xor_sync");
}
inline uint32_t __ballot_sync(uint32_t mask, int predicate) {
  const uint32_t bit = predicate ? 1u << peftkern::emulation::lane() : 0;
  return peftkern::emulation::reduce<uint32_t, peftkern::emulation::either>(mask, bit,
                                                                            "__ballot_sync");
}
inline int __any_sync(uint32_t mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline uint32_t __reduce_add_sync(uint32_t mask, uint32_t value) {
  return peftkern::emulation::reduce<uint32_t, peftkern::emulation::add>(mask, value,
                                                                         "__reduce_add_sync");
}

// ---- memory: cache hints mean nothing here

template <typename T>
T __ldg(const T* p) {
  return *p;
}
template <typename T>
T __ldcs(const T* p) {
  return *p;
}
template <typename T>
void __stcg(T* p, T value) {
  *p = value;
}
// Blocks run one after the other, and a fiber gives way at barriers and collectives only.
template <typename T>
T atomicAdd(T* p, T value) {
  const T before = *p;
  *p = before + value;
  return before;
}
inline void __threadfence() {}

// ---- arithmetic. The files are compiled with -ffp-contract=off: a * b + c rounds twice.

using std::max;
using std::min;

inline double __longlong_as_double(long long bits) {
  double x;
  std::memcpy(&x, &bits, 8);
  return x;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline int __float_as_int(float x) { return static_cast<int>(__float_as_uint(x)); }
inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __frcp_rn(float a) { return 1.0f / a; }
// Byte i of the result is the byte of {b, a} that bits 0-2 of nibble i of `selector` name, or, with
// bit 3, eight copies of that byte's top bit.
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t pick = selector >> 4 * i & 15;
    uint32_t byte = bytes >> 8 * (pick & 7) & 255;
    if (pick & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << 8 * i;
  }
  return result;
}
