// The same product for more rows of x, on compute capability 9.0 alone: see
// cuda_nf4_lora_linear.h for what every call promises.
#pragma once

#include "peftkern/cuda_nf4_lora_linear.h"

namespace peftkern {

inline constexpr int64_t kCudaPrefillRows = 512;  // of x, at most
inline constexpr int64_t kCudaPrefillRank = 256;  // at most
inline constexpr int64_t kCudaPrefillUnit = 64;   // K is a multiple, blocks of w are no smaller
inline constexpr int64_t kCudaPrefillSplits = 16;

// Bytes that a launch on the current device needs for these sizes; splits = 0 chooses.
int64_t cuda_nf4_lora_linear_sm90a_workspace(int64_t M, int64_t N, int64_t K, int64_t r,
                                             int64_t splits);

// As cuda_nf4_lora_linear_forward, but for what is rounded: a weight takes the value that
// cuda_nf4_dequantize gives in the type of x, and scaling lora_B and s, of which s is written as
// float32, are each the sum of two bfloat16 in y. Blocks of w may cross rows.
int cuda_nf4_lora_linear_sm90a_forward(const CudaNF4LinearArgs& args, CudaStream stream);

}  // namespace peftkern
