// NF4 inside a kernel: the weight as a kernel argument, its absmax, its sixteen values.
#pragma once

#include "intrinsics.cuh"
#include "peftkern/cuda_nf4.h"
#include "peftkern/nf4_table.h"

namespace peftkern {
namespace {

// By value as a __grid_constant__ argument: no allocation, no constant memory to fill.
struct NF4Argument {
  const uint8_t* packed;
  const void* absmax;
  const float *nested_absmax, *nested_code, *offset;
  int64_t numel, nested_blocksize;
  int blocksize_log2;
  int nested_log2;  // -1: not a power of two
  float code[16];
};

inline NF4Argument nf4_argument(const CudaNF4View& w) {
  NF4Argument a = {};
  a.packed = w.packed;
  a.absmax = w.absmax;
  a.nested_absmax = w.nested_absmax;
  a.nested_code = w.nested_code;
  a.offset = w.offset;
  a.numel = w.numel;
  a.blocksize_log2 = w.blocksize_log2();
  const int64_t group = w.nested ? w.nested_blocksize : 1;
  a.nested_blocksize = group;
  a.nested_log2 = group & (group - 1) ? -1 : __builtin_ctzll(static_cast<uint64_t>(group));
  for (int i = 0; i < 16; ++i) a.code[i] = kNF4Code[i];
  return a;
}

// absmax in two steps, so that a kernel has the first loads of many blocks in flight before it
// waits for any: raw = the float's bits, or the 8-bit index when nested; then the value, whose
// product and sum are rounded one after the other.
template <bool kNested>
__device__ __forceinline__ uint32_t load_raw_absmax(const NF4Argument& w, int64_t block) {
  if constexpr (kNested) return __ldg(static_cast<const uint8_t*>(w.absmax) + block);
  return __ldg(static_cast<const uint32_t*>(w.absmax) + block);
}
template <bool kNested>
__device__ __forceinline__ float absmax_value(const NF4Argument& w, int64_t block, uint32_t raw,
                                              float offset) {
  if constexpr (!kNested) return __uint_as_float(raw);
  const int64_t group = w.nested_log2 >= 0 ? block >> w.nested_log2 : block / w.nested_blocksize;
  const float scale = __ldg(w.nested_absmax + group);
  return __fadd_rn(__fmul_rn(__ldg(w.nested_code + raw), scale), offset);
}

}  // namespace
}  // namespace peftkern
