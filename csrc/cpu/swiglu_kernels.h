// The gate of experts and its gradients, sixteen values at a time. Compiled once per instruction
// set.
#pragma once

#include "load_store.h"
#include "peftkern/swiglu.h"

namespace peftkern {
namespace {
namespace swiglu {

inline F32x16 sigmoid(const F32x16& x) {
  const F32x16 one = f32_set1(1.0f);
  return f32_div(one, f32_add(one, f32_exp(f32_mul(x, f32_set1(-1.0f)))));
}

// Rows [begin, end).
inline void forward(const SwigluArgs& args, int64_t begin, int64_t end) {
  const int64_t I = args.I;
  for (int64_t row = begin; row < end; ++row) {
    const F32x16 w = f32_set1(args.w[row]);
    for (int64_t j = 0; j < I; j += 16) {
      const int n = static_cast<int>(min64(16, I - j));
      const F32x16 gate = load_any(args.u, args.dtype, 2 * I * row + j, n);
      const F32x16 up = load_any(args.u, args.dtype, 2 * I * row + I + j, n);
      const F32x16 product = f32_mul(f32_mul(gate, sigmoid(gate)), up);
      store_any(args.a, args.dtype, I * row + j, f32_mul(product, w), n);
    }
  }
}

inline void backward(const SwigluBackwardArgs& args, int64_t begin, int64_t end) {
  const int64_t I = args.I;
  const F32x16 one = f32_set1(1.0f), minus = f32_set1(-1.0f);
  for (int64_t row = begin; row < end; ++row) {
    const F32x16 w = f32_set1(args.w[row]);
    F32x16 sum = f32_zero();
    for (int64_t j = 0; j < I; j += 16) {
      const int n = static_cast<int>(min64(16, I - j));
      const int64_t at = 2 * I * row + j;
      const F32x16 gate = load_any(args.u, args.dtype, at, n);
      const F32x16 up = load_any(args.u, args.dtype, at + I, n);
      const F32x16 da = load_any(args.da, args.dtype, I * row + j, n);
      const F32x16 s = sigmoid(gate), silu = f32_mul(gate, s), da_w = f32_mul(da, w);
      sum = f32_fma(f32_mul(silu, up), da, sum);
      if (!args.du) continue;
      const F32x16 slope = f32_mul(s, f32_fma(gate, f32_fma(s, minus, one), one));
      store_any(args.du, args.dtype, at, f32_mul(f32_mul(da_w, up), slope), n);
      store_any(args.du, args.dtype, at + I, f32_mul(da_w, silu), n);
    }
    if (args.dw) args.dw[row] = f32_sum(sum);
  }
}

}  // namespace swiglu
}  // namespace
}  // namespace peftkern
