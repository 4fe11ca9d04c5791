// 4-bit weights on the CPU, NF4 and its kin: views, validation and launch signatures. Torch-free.
//
// The weight is flattened row-major and cut into blocks of `blocksize` elements; value = (code -
// zero) * scale in float32, each rounded, then once to the wanted type. Formats differ in their
// sixteen codes, in how a block's scale is stored, and in which nibble of a byte comes first:
//
//   nf4, fp4   high nibble first; scale: absmax as float32, or nested: absmax[i] = code2[q[i]] *
//              absmax2[i / 256] + offset, product and sum rounded one after the other (no fused
//              multiply-add). Blocks ignore row ends.
//   mxfp4      low nibble first; scale: e8m0, 2^(s - 127), where 255 is NaN
//   nvfp4      low nibble first; scale: e4m3 times a tensor's float32 scale, rounded
//   int4       low nibble first; scale and zero as float32; without zeros they are 8
//
// Bytes per weight: 0.5 packed + 4/64 absmax (nested: 1/64), plus what is written.
#pragma once

#include "peftkern/base.h"
#include "peftkern/isa.h"

namespace peftkern {

// Smallest absmax that is divided by: its reciprocal is finite. The value bitsandbytes uses.
inline constexpr float kAbsmaxFloor = 1e-38f;

// The rows of FORMATS in peftkern/formats/table.py.
enum class Format : int { kNF4 = 0, kFP4, kMXFP4, kNVFP4, kINT4 };
constexpr int64_t kFormatCount = 5;

struct NF4View {
  Format format = Format::kNF4;
  const uint8_t* packed = nullptr;
  int64_t packed_bytes = 0;
  const void* absmax = nullptr;  // the scales: float32, or uint8 when nested, e8m0 or e4m3
  int64_t absmax_len = 0;
  bool nested = false;
  const float* nested_absmax = nullptr;
  int64_t nested_absmax_len = 0;
  const float* nested_code = nullptr;  // 256 entries
  const float* nested_offset = nullptr;
  const float* tensor_scale = nullptr;  // nvfp4
  const float* zero = nullptr;          // int4, one a block; null: 8
  int64_t aux_len = 0;                  // of tensor_scale or zero
  int64_t blocksize = 64;
  int64_t nested_blocksize = 256;
  int64_t numel = 0;

  int blocksize_log2() const { return __builtin_ctzll(static_cast<uint64_t>(blocksize)); }
  int64_t nblocks() const { return (numel + blocksize - 1) >> blocksize_log2(); }
  // Formats of blocks that do not cross rows, whose even elements are in the low nibbles.
  bool low_first() const { return format >= Format::kMXFP4; }
  bool byte_scales() const { return format == Format::kMXFP4 || format == Format::kNVFP4; }
  bool float_scales() const { return !nested && !byte_scales(); }
};

// Throws std::invalid_argument naming the field that is missing, too short or out of range.
void validate(const NF4View& w);

// Throws unless rows of K elements hold whole blocks where the format wants that.
void validate_rows(const NF4View& w, int64_t K);

// Scales of blocks [first, first + count) as float32.
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
