// NF4 on a CUDA device: launch signatures. The format is that of nf4.h, here with device pointers.
//
// A launch neither waits nor allocates, so that a CUDA graph can record it; the device of the
// stream must be current. Bad sizes throw std::invalid_argument before anything is launched. What
// comes back is the launch's cudaError_t as an int, 0 for success: a host compiler needs no CUDA
// header.
#pragma once

#include <cstdint>

#include "peftkern/nf4.h"

struct CUstream_st;

namespace peftkern {

using CudaStream = CUstream_st*;  // cudaStream_t

// `offset` is nested_offset: one float that stays on the device, for reading it would wait. The
// base's nested_offset is not used, and any float pointer is 4-byte aligned.
struct CudaNF4View : NF4View {
  const float* offset = nullptr;
};

// validate() and, when nested, that offset is there and nested_blocksize is a power of two.
void validate_cuda(const CudaNF4View& w);

// out[i] = cast(code[i] * absmax[i / blocksize]) for i < w.numel; out_numel must be w.numel. Bit
// for bit what the CPU gives, but for the payload of a NaN. Deterministic.
int cuda_nf4_dequantize(const CudaNF4View& w, void* out, DType dtype, int64_t out_numel,
                        CudaStream stream);

// Packed codes and float32 absmax of `numel` values, bit for bit those of nf4_quantize.
int cuda_nf4_quantize(const void* src, DType dtype, int64_t numel, int64_t blocksize,
                      uint8_t* packed, int64_t packed_bytes, float* absmax, int64_t absmax_len,
                      CudaStream stream);

}  // namespace peftkern
