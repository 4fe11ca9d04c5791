// y = x W^T + scaling s lora_B^T + bias with W in NF4 and s = x lora_A^T, for few rows of x, on a
// CUDA device. As in cuda_nf4.h a launch neither waits nor allocates, and what does not fit throws
// std::invalid_argument before anything is launched.
#pragma once

#include "peftkern/cuda_nf4.h"

namespace peftkern {

inline constexpr int64_t kCudaLinearRows = 32;   // of x, at most
inline constexpr int64_t kCudaLinearRank = 64;   // at most
inline constexpr int64_t kCudaLinearBlock = 64;  // blocks of w, at least: they end where rows end
inline constexpr int64_t kCudaLinearSize = 1 << 26;  // N, K at most: 24 rows of x in 32 bits

// Contiguous tensors. x and lora_A begin at a multiple of 16 bytes, w.packed at one of 8.
struct CudaNF4LinearArgs {
  int64_t M = 0, N = 0, K = 0, r = 0;  // r = 0: no adapters
  const void* x = nullptr;             // [M, K]
  void* y = nullptr;                   // [M, N]
  DType dtype = DType::kBFloat16;      // of x, y and bias: bfloat16 or float16
  NF4View w;                           // [N, K]
  const void* lora_A = nullptr;        // [r, K]
  DType a_dtype = DType::kFloat32;
  const void* lora_B = nullptr;  // [N, r]
  DType b_dtype = DType::kFloat32;
  const void* bias = nullptr;  // [N] or none
  float scaling = 1.0f;
  float* s = nullptr;         // [M, r], written
  void* workspace = nullptr;  // any contents, 16-byte aligned
  int64_t workspace_bytes = 0;
  int64_t splits = 0;  // of K over thread blocks; 0 chooses
};

// Workspace bytes of a launch on the current device for these sizes; 0 for many.
int64_t cuda_nf4_lora_linear_workspace(int64_t M, int64_t N, int64_t K, int64_t splits);

// Sums in float32 in an order that sizes and device fix: deterministic. A weight is its code's
// value rounded to the type of x; absmax, the adapters and s are float32.
int cuda_nf4_lora_linear_forward(const CudaNF4LinearArgs& args, CudaStream stream);

}  // namespace peftkern
