// The gate of most mixtures' experts, with each row's routing weight. Torch-free.
//
//   a  = silu(gate) up w,  silu(g) = g / (1 + e^-g)                     forward
//   dgate = da w up silu'(gate),  dup = da w silu(gate),                 backward
//   dw = sum over the row of da silu(gate) up
//
// One pass over the memory of each: 3 I elements a row are read or written forward, 5 I backward.
// Values are float32 in between; a and du are rounded once.
#pragma once

#include "peftkern/base.h"
#include "peftkern/isa.h"

namespace peftkern {

struct SwigluArgs {
  int64_t R = 0, I = 0;
  const void* u = nullptr;  // [R, 2 I] of dtype: gate, then up
  DType dtype = DType::kFloat32;
  const float* w = nullptr;  // [R]
  void* a = nullptr;         // [R, I] of dtype
  int threads = 1;
};
void swiglu_forward(Isa isa, const SwigluArgs& args);

struct SwigluBackwardArgs {
  int64_t R = 0, I = 0;
  const void* u = nullptr;  // [R, 2 I] of dtype
  DType dtype = DType::kFloat32;
  const float* w = nullptr;  // [R]
  const void* da = nullptr;  // [R, I] of dtype
  void* du = nullptr;        // [R, 2 I] of dtype, or null
  float* dw = nullptr;       // [R], or null
  int threads = 1;
};
void swiglu_backward(Isa isa, const SwigluBackwardArgs& args);

}  // namespace peftkern
