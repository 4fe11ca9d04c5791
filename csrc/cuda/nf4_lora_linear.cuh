// Argument checks of both nf4_lora_linear kernels, after those of the sizes.
#pragma once

#include "peftkern/checks.h"
#include "peftkern/cuda_nf4_lora_linear.h"

namespace peftkern {
namespace {

// All but the workspace, which these decide about. No row of x: no pointer is looked at.
inline void check_linear_args(const CudaNF4LinearArgs& args, uintptr_t y_alignment) {
  validate_cuda(args.w);
  const int64_t numel = checked_mul(args.N, args.K, "w");
  require(args.w.numel == numel, "w", args.w.numel, numel, "weights");
  require(args.w.blocksize >= kCudaLinearBlock, "blocksize", args.w.blocksize, "64 or more");
  require(args.dtype != DType::kFloat32, "x dtype", static_cast<int>(args.dtype),
          "bfloat16 (1) or float16 (2)");
  if (args.M == 0) return;
  require_aligned(args.x, 16, "x");
  require_aligned(args.y, y_alignment, "y");
  require_aligned(args.w.packed, 8, "packed");
  if (args.r > 0) {
    require_aligned(args.lora_A, 16, "lora_A");
    require_aligned(args.lora_B, static_cast<uintptr_t>(itemsize(args.b_dtype)), "lora_B");
    require_aligned(args.s, 4, "s");
  }
  if (args.bias) require_aligned(args.bias, 2, "bias");
}

inline void check_workspace(const CudaNF4LinearArgs& args, int64_t bytes) {
  if (bytes > 0) require_aligned(args.workspace, 16, "workspace");
  require(args.workspace_bytes >= bytes, "workspace", args.workspace_bytes, bytes, "bytes or more");
}

}  // namespace
}  // namespace peftkern
