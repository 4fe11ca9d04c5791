// NF4 on a CUDA device: launch signatures. The format is that of nf4.h, here with device pointers.
//
// A launch neither waits nor allocates, so that a CUDA graph can record it; the device of the
// stream must be current. Bad sizes throw std::invalid_argument before anything is launched. The
// return value is the launch's cudaError_t as an int, 0 for success: a host compiler needs no CUDA
// header.
#pragma once

#include "peftkern/nf4.h"

struct CUstream_st;

namespace peftkern {

using CudaStream = CUstream_st*;  // cudaStream_t

// validate(), that the format is NF4 or FP4, which differ in their sixteen values alone, and, when
// nested, that nested_blocksize is a power of two. Pointers are the device's: nested_offset stays
// there, for reading it would wait.
void validate_cuda(const NF4View& w);

// out[i] = cast(code[i] * absmax[i / blocksize]) for i < w.numel; out_numel must be w.numel. Bit
// for bit what the CPU gives, but for the payload of a NaN. Deterministic.
int cuda_nf4_dequantize(const NF4View& w, void* out, DType dtype, int64_t out_numel,
                        CudaStream stream);

// Packed codes and float32 absmax of `numel` values, bit for bit those of nf4_quantize.
int cuda_nf4_quantize(const void* src, DType dtype, int64_t numel, int64_t blocksize,
                      uint8_t* packed, int64_t packed_bytes, float* absmax, int64_t absmax_len,
                      CudaStream stream);

}  // namespace peftkern
