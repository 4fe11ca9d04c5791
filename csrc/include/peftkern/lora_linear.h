// The skinny product of a LoRA layer on the CPU. Torch-free.
#pragma once

#include "peftkern/nf4.h"

namespace peftkern {

struct LoraShrinkArgs {
  int64_t M = 0, K = 0, r = 0;
  const void* x = nullptr;  // [M, K], `dtype`
  DType dtype = DType::kFloat32;
  const float* a = nullptr;  // [r, K]
  float* s = nullptr;        // [M, r]
  int threads = 1;
};

// s = x a^T, accumulated in float32; x is widened in registers, never copied.
// Reads M K itemsize + 4 r K bytes, 2 M K r FLOP.
void lora_shrink(const char* isa, const LoraShrinkArgs& args);

extern void (*const kLoraShrinkScalar)(const LoraShrinkArgs&);
#if PEFTKERN_HAVE_AVX2
extern void (*const kLoraShrinkAvx2)(const LoraShrinkArgs&);
#endif
#if PEFTKERN_HAVE_AVX512
extern void (*const kLoraShrinkAvx512)(const LoraShrinkArgs&);
#endif

}  // namespace peftkern
