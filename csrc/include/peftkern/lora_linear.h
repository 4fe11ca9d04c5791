// The three skinny products of a LoRA layer on the CPU. Torch-free.
//
// x and y are activations, float32 or bfloat16, widened in registers and never copied whole; the
// factors are float32, and so are all sums. `keep` is dropout's mask, a byte per element of the
// activation, or null; what it does not keep counts as zero. Each reads its activation once:
// M K itemsize bytes against 2 M K r FLOP.
#pragma once

#include "peftkern/nf4.h"

namespace peftkern {

struct LoraArgs {
  int64_t M = 0, K = 0, r = 0;
  DType dtype = DType::kFloat32;  // of the activation
  const uint8_t* keep = nullptr;  // [M, K]
  float scale = 1.0f;
  int threads = 1;
};

// s[M, r] = scale * keep(x)[M, K] a[r, K]^T
struct LoraShrinkArgs : LoraArgs {
  const void* x = nullptr;
  const float* a = nullptr;
  float* s = nullptr;
};
void lora_shrink(const char* isa, const LoraShrinkArgs& args);

// y[M, K] += scale * keep(s[M, r] a[r, K])
struct LoraExpandArgs : LoraArgs {
  const float* s = nullptr;
  const float* a = nullptr;
  void* y = nullptr;
};
void lora_expand(const char* isa, const LoraExpandArgs& args);

// g[r, K] = scale * s[M, r]^T keep(x)[M, K]
struct LoraOuterArgs : LoraArgs {
  const float* s = nullptr;
  const void* x = nullptr;
  float* g = nullptr;
};
void lora_outer(const char* isa, const LoraOuterArgs& args);

struct LoraKernels {
  void (*shrink)(const LoraShrinkArgs&);
  void (*expand)(const LoraExpandArgs&);
  void (*outer)(const LoraOuterArgs&);
};
extern const LoraKernels kLoraScalar;
#if PEFTKERN_HAVE_AVX2
extern const LoraKernels kLoraAvx2;
#endif
#if PEFTKERN_HAVE_AVX512
extern const LoraKernels kLoraAvx512;
#endif

}  // namespace peftkern
