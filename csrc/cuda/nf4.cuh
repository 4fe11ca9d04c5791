// NF4 or FP4 inside a kernel: the weight as a kernel argument, its absmax, its sixteen values.
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
  int64_t numel;
  int blocksize_log2, nested_log2;
  float code[16];
};

inline NF4Argument nf4_argument(const NF4View& w) {
  NF4Argument a = {};
  a.packed = w.packed;
  a.absmax = w.absmax;
  a.nested_absmax = w.nested_absmax;
  a.nested_code = w.nested_code;
  a.offset = w.nested_offset;
  a.numel = w.numel;
  a.blocksize_log2 = w.blocksize_log2();
  a.nested_log2 = w.nested ? __builtin_ctzll(static_cast<uint64_t>(w.nested_blocksize)) : 0;
  const float (&code)[16] = w.format == Format::kFP4 ? kFP4Code : kNF4Code;
  for (int i = 0; i < 16; ++i) a.code[i] = code[i];
  return a;
}

// absmax in two steps, so that a kernel has the first loads of many blocks in flight before it
// waits for any: raw = the float's bits, or the 8-bit index when nested; then the value, whose
// product and sum are rounded one after the other. Index: int64_t, or uint32_t where that suffices.
template <bool kNested, typename Index>
__device__ __forceinline__ uint32_t load_raw_absmax(const NF4Argument& w, Index block) {
  if constexpr (kNested) return __ldg(static_cast<const uint8_t*>(w.absmax) + block);
  return __ldg(static_cast<const uint32_t*>(w.absmax) + block);
}
template <bool kNested, typename Index>
__device__ __forceinline__ float absmax_value(const NF4Argument& w, Index block, uint32_t raw,
                                              float offset) {
  if constexpr (!kNested) return __uint_as_float(raw);
  const float scale = __ldg(w.nested_absmax + (block >> w.nested_log2));
  return __fadd_rn(__fmul_rn(__ldg(w.nested_code + raw), scale), offset);
}
template <bool kNested>
__device__ __forceinline__ float load_offset(const NF4Argument& w) {
  return kNested ? load_in_place(w.offset) : 0.0f;
}

}  // namespace
}  // namespace peftkern
