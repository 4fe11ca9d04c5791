// As intrinsics.cuh, for the kernels of *_sm90a.cu: the tensor cores of sm_90a (wgmma). Four warps,
// the first of which has an index that 4 divides, multiply together; g = lane / 4 and t = lane % 4
// are a lane's, warp w of the four has rows 16w .. 16w+15.
//
// A product is under way until products_wait. Until then nobody reads or writes its accumulators,
// its A registers or its part of shared memory; products on the same accumulators follow each
// other. products_fence comes before the first product of a group, after all that wrote registers
// that the group uses. Shared memory that ordinary stores or copy_async16 have written: each writer
// calls fence_shared, then comes a barrier.
#pragma once

#include "intrinsics.cuh"

namespace peftkern {
namespace {

__device__ __forceinline__ void fence_shared() {
#ifdef PEFTKERN_CUDA_EMULATED
  emulation::fence_copies();
#else
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
__device__ __forceinline__ void products_fence() {
#ifdef PEFTKERN_CUDA_EMULATED
  emulation::fence_products();
#else
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void products_commit() {
#ifdef PEFTKERN_CUDA_EMULATED
  emulation::commit_products();
#else
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
// Until at most kLeft groups are under way.
template <int kLeft>
__device__ __forceinline__ void products_wait() {
#ifdef PEFTKERN_CUDA_EMULATED
  emulation::wait_products(kLeft);
#else
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
#endif
}

// Operand B of a product in shared memory: rows of 64 16-bit values (k is along the row), 128 bytes
// apart, from a multiple of 1024 bytes on, the 16-byte pieces of row i at swizzled(i, piece). Step
// j of four k16 steps is at tile + 2 j. In the 64 bits: address / 16 in bits 0-13, 1 (not used) in
// 16-29, 64 (eight rows take 1024 bytes) in 32-45, 0 (base offset) in 49-51, 1 (128-byte swizzle)
// in 62-63.
__device__ __forceinline__ int swizzled(int row, int piece) {
  return row * 128 + (piece ^ (row & 7)) * 16;
}
__device__ __forceinline__ uint64_t shared_tile(const void* first_row) {
  return (shared_address(first_row) & 0x3ffff) >> 4 | uint64_t{1} << 16 | uint64_t{64} << 32 |
         uint64_t{1} << 62;
}

#ifdef PEFTKERN_CUDA_EMULATED
template <typename T, int kColumns>
void run_product(const emulation::Product* const* shares, float* const* sums) {
  static thread_local float A[64][16], B[kColumns][16];
  const uint64_t tile = shares[0]->b;
  if (tile >> 62 != 1 || (tile >> 32 & 0x3fff) != 64) {
    emulation::fail("not a tile of 128-byte rows");
  }
  // Only from there on does the hardware's pattern agree with swizzled().
  const uint32_t first = static_cast<uint32_t>(tile & 0x3fff) << 4;
  if (first % 1024 >= 128 || first % 32) emulation::fail("no k16 step of a tile begins here");
  if (tile >> 49 & 7) emulation::fail("a tile at a multiple of 1024 bytes has no base offset");
  for (int lane = 0; lane < 128; ++lane) {
    if (shares[lane]->b != tile) emulation::fail("lanes of a warpgroup name different tiles");
    const int row = lane / 32 * 16 + lane % 32 / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const float2 pair = unpack2<T>(shares[lane]->a[i]);
      A[row + 8 * (i % 2)][2 * t + 8 * (i / 2)] = pair.x;
      A[row + 8 * (i % 2)][2 * t + 8 * (i / 2) + 1] = pair.y;
    }
  }
  // The hardware puts address bits 7-9 into bits 4-6.
  for (int row = 0; row < kColumns; ++row) {
    for (int k = 0; k < 16; ++k) {
      uint32_t at = first + static_cast<uint32_t>(row * 128 + 2 * k);
      at ^= (at >> 7 & 7) << 4;
      uint16_t bits;
      std::memcpy(&bits, emulation::shared_pointer(at), 2);
      B[row][k] = to_float(T{bits});
    }
  }
  for (int lane = 0; lane < 128; ++lane) {
    for (int i = 0; i < kColumns / 2; ++i) {
      const float* a = A[lane / 32 * 16 + lane % 32 / 4 + i / 2 % 2 * 8];
      const float* b = B[i / 4 * 8 + lane % 4 * 2 + i % 2];
      double sum = 0.0;
      for (int k = 0; k < 16; ++k) sum += double{a[k]} * double{b[k]};
      sums[lane][i] = add_truncated(sums[lane][i], sum);
    }
  }
}
template <typename T, int kColumns>
void product_m64k16(float (&d)[kColumns / 2], const uint32_t (&a)[4], uint64_t tile) {
  emulation::issue_product({run_product<T, kColumns>, d, kColumns / 2, a, tile});
}
#else
template <typename T>
constexpr bool kIsBF16 = false;
template <>
constexpr bool kIsBF16<BF16> = true;

#define PEFTKERN_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define PEFTKERN_D16(i) PEFTKERN_D4(i), PEFTKERN_D4(i + 4), PEFTKERN_D4(i + 8), PEFTKERN_D4(i + 12)
#define PEFTKERN_D32(i) PEFTKERN_D16(i), PEFTKERN_D16(i + 16)
#define PEFTKERN_NAMES_64                                                  \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define PEFTKERN_PRODUCT_64(type)                                                                 \
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {" PEFTKERN_NAMES_64 \
               "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 0;"                                        \
               : PEFTKERN_D32(0)                                                                  \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(tile))
#define PEFTKERN_NAMES_128                                                           \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define PEFTKERN_PRODUCT_128(type)                                                 \
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type        \
               " {" PEFTKERN_NAMES_128 "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 0;" \
               : PEFTKERN_D32(0), PEFTKERN_D32(32)                                 \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(tile))
#define PEFTKERN_NAMES_256                                                                       \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                       \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "             \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "             \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "             \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "             \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "             \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define PEFTKERN_PRODUCT_256(type)                                                      \
  asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type             \
               " {" PEFTKERN_NAMES_256 "}, {%128, %129, %130, %131}, %132, 1, 1, 1, 0;" \
               : PEFTKERN_D32(0), PEFTKERN_D32(32), PEFTKERN_D32(64), PEFTKERN_D32(96)  \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(tile))
// D[64, kColumns] += A[64, 16] B^T, A from registers and the rows of B, kColumns (64, 128 or 256)
// of them, from `tile`. A lane's part of A is mma_m16n8k16's, for the rows of its warp, and of D
//   d[4i], d[4i+1] D[g][8i+2t], D[g][8i+2t+1]   d[4i+2], d[4i+3] D[g+8][8i+2t], D[g+8][8i+2t+1]
template <typename T, int kColumns>
__device__ __forceinline__ void product_m64k16(float (&d)[kColumns / 2], const uint32_t (&a)[4],
                                               uint64_t tile) {
  static_assert(kColumns == 64 || kColumns == 128 || kColumns == 256, "kColumns");
  if constexpr (kIsBF16<T> && kColumns == 64) PEFTKERN_PRODUCT_64("bf16");
  if constexpr (!kIsBF16<T> && kColumns == 64) PEFTKERN_PRODUCT_64("f16");
  if constexpr (kIsBF16<T> && kColumns == 128) PEFTKERN_PRODUCT_128("bf16");
  if constexpr (!kIsBF16<T> && kColumns == 128) PEFTKERN_PRODUCT_128("f16");
  if constexpr (kIsBF16<T> && kColumns == 256) PEFTKERN_PRODUCT_256("bf16");
  if constexpr (!kIsBF16<T> && kColumns == 256) PEFTKERN_PRODUCT_256("f16");
}
#endif

}  // namespace
}  // namespace peftkern
