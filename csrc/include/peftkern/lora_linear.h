// The three skinny products of a LoRA layer on the CPU. Torch-free.
//
// x and y are activations, float32 or bfloat16, widened in registers and never copied whole; the
// factors are float32, and so are all sums. `keep` is dropout's mask, a byte per element of the
// activation, or null; what it does not keep counts as zero. Each reads its activation once:
// M K itemsize bytes against 2 M K r FLOP.
#pragma once

#include "peftkern/base.h"
#include "peftkern/isa.h"

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
void lora_shrink(Isa isa, const LoraShrinkArgs& args);

// y[M, K] += scale * keep(s[M, r] a[r, K])
struct LoraExpandArgs : LoraArgs {
  const float* s = nullptr;
  const float* a = nullptr;
  void* y = nullptr;
};
void lora_expand(Isa isa, const LoraExpandArgs& args);

// g[r, K] = scale * s[M, r]^T keep(x)[M, K], or its transpose g[K, r]
struct LoraOuterArgs : LoraArgs {
  const float* s = nullptr;
  const void* x = nullptr;
  float* g = nullptr;
  bool transposed = false;
};
void lora_outer(Isa isa, const LoraOuterArgs& args);

// The adapter's part of backward: ds[M, r] = scaling dy[M, N] b[r, N]^T, of which dx takes
// keep_scale keep(ds lora_A); da[r, K] = keep_scale ds^T keep(x); db[N, r] = scaling dy^T s[M, r].
struct LoraBackwardArgs {
  int64_t M = 0, N = 0, K = 0, r = 0;
  const void* dy = nullptr;
  DType dy_dtype = DType::kFloat32;
  const float* b = nullptr;  // lora_B transposed
  float scaling = 1.0f;
  float* ds = nullptr;  // null: without ds and da
  const void* x = nullptr;
  DType x_dtype = DType::kFloat32;
  const uint8_t* keep = nullptr;  // [M, K]
  float keep_scale = 1.0f;
  float* da = nullptr;  // null: without
  const float* s = nullptr;
  float* db = nullptr;  // null: without
  int threads = 1;
};
void lora_backward(Isa isa, const LoraBackwardArgs& args);

}  // namespace peftkern
