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
  NF4View w;                               // [N, K]
  const float* s = nullptr;                // [M, r]: x A^T; backward: dy B
  float scaling = 1.0f;                    // of s
  const float* up = nullptr;               // forward: lora_B [N, r]; backward: lora_A [r, K]
  const float* bias = nullptr;             // [N], forward only
  const LoraShrinkArgs* shrink = nullptr;  // forward: if given, computed first, into s
  int threads = 1;
};

struct NF4LinearKernels {
  void (*forward)(const NF4LinearArgs& args);
  void (*backward)(const NF4LinearArgs& args);
};

extern const NF4LinearKernels kNF4LinearScalar;
#if PEFTKERN_HAVE_AVX2
extern const NF4LinearKernels kNF4LinearAvx2;
#endif
#if PEFTKERN_HAVE_AVX512
extern const NF4LinearKernels kNF4LinearAvx512;
#endif
#if PEFTKERN_HAVE_AVX512_BF16
extern const NF4LinearKernels kNF4LinearAvx512Bf16;  // bfloat16 only
#endif
#if PEFTKERN_HAVE_AMX
extern const NF4LinearKernels kNF4LinearAmxBf16;  // bfloat16 only
#endif

// Checked entries: throw std::invalid_argument naming what does not fit.
void nf4_lora_linear_forward(const char* isa, const NF4LinearArgs& args);
void nf4_lora_linear_backward(const char* isa, const NF4LinearArgs& args);

// 64-byte aligned scratch memory; std::bad_alloc when there is none.
void* scratch_allocate(int64_t bytes);
void scratch_free(void* p);

}  // namespace peftkern
