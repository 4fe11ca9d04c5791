// NF4 on the CPU: views, validation and launch signatures. Torch-free.
//
// Format (bitsandbytes): the weight is flattened row-major and cut into blocks of `blocksize`
// elements that ignore row ends; element 2j is the HIGH nibble of byte j; value = code * absmax in
// float32, rounded once to the wanted type. Nested: absmax[i] = code2[q[i]] * absmax2[i / 256] +
// offset, product and sum rounded one after the other (no fused multiply-add).
//
// Bytes per weight: 0.5 packed + 4/64 absmax (nested: 1/64), plus what is written.
#pragma once

#include "peftkern/base.h"
#include "peftkern/isa.h"

namespace peftkern {

// Smallest absmax that is divided by: its reciprocal is finite. The value bitsandbytes uses.
inline constexpr float kAbsmaxFloor = 1e-38f;

struct NF4View {
  const uint8_t* packed = nullptr;
  int64_t packed_bytes = 0;
  const void* absmax = nullptr;  // float32, or uint8 when nested
  int64_t absmax_len = 0;
  bool nested = false;
  const float* nested_absmax = nullptr;
  int64_t nested_absmax_len = 0;
  const float* nested_code = nullptr;  // 256 entries
  const float* nested_offset = nullptr;
  int64_t blocksize = 64;
  int64_t nested_blocksize = 256;
  int64_t numel = 0;

  int blocksize_log2() const { return __builtin_ctzll(static_cast<uint64_t>(blocksize)); }
  int64_t nblocks() const { return (numel + blocksize - 1) >> blocksize_log2(); }
};

// Throws std::invalid_argument naming the field that is missing, too short or out of range.
void validate(const NF4View& w);

// absmax of blocks [first, first + count) as float32.
void load_absmax(const NF4View& w, int64_t first, int64_t count, float* out);

void nf4_quantize(Isa isa, int threads, const void* src, DType dtype, int64_t numel,
                  int64_t blocksize, uint8_t* packed, int64_t packed_bytes, float* absmax,
                  int64_t absmax_len);

// q[i] = index of the entry of `code` (256, ascending) nearest to (absmax[i] - offset) / max|.| of
// its block; a tie takes the lower index.
void nf4_quantize_absmax(int threads, const float* absmax, int64_t n, float offset,
                         const float* code, int64_t nested_blocksize, uint8_t* q,
                         float* nested_absmax, int64_t nested_len);

// `fresh`: out has just been allocated and its pages are not there yet.
void nf4_dequantize(Isa isa, int threads, const NF4View& w, void* out, DType dtype,
                    int64_t out_numel, bool fresh);

}  // namespace peftkern
