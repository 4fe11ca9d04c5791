// y = x W^T + scaling s b^T + bias and dx = dy W + scaling s a with W in NF4, on the CPU.
// Torch-free.
#pragma once

#include "peftkern/lora_linear.h"
#include "peftkern/nf4.h"

namespace peftkern {

struct NF4LinearArgs {
  int64_t M = 0, N = 0, K = 0, r = 0;
  const void* in = nullptr;  // forward: x [M, K]; backward: dy [M, N]; float32 or bfloat16
  void* out = nullptr;       // forward: y [M, N]; backward: dx [M, K]; the type of `in`
  DType dtype = DType::kFloat32;
  NF4View w;                      // [N, K]
  const float* s = nullptr;       // [M, r]: x A^T; backward: dy B
  float scaling = 1.0f;           // of s
  const float* factor = nullptr;  // forward: lora_B [N, r]; backward: lora_A [r, K]
  const float* bias = nullptr;    // [N], forward only
  int64_t few_rows = 0;           // up to so many rows as dot products or sums, not by panels
  // Computed first if given: forward's s, or backward's adapter, whose ds is s. Under dropout dx
  // then gets its low-rank part after it is rounded.
  const LoraShrinkArgs* shrink = nullptr;
  const LoraBackwardArgs* gradients = nullptr;
  int threads = 1;
};

// Checked entries: throw std::invalid_argument naming what does not fit.
void nf4_lora_linear_forward(Isa isa, const NF4LinearArgs& args);
void nf4_lora_linear_backward(Isa isa, const NF4LinearArgs& args);

}  // namespace peftkern
