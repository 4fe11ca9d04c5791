// NF4 matrix products: argument checks.
#include "peftkern/nf4_lora_linear.h"

#include "kernels.h"
#include "peftkern/checks.h"

namespace peftkern {
namespace {

void validate(const NF4LinearArgs& args) {
  require(args.dtype != DType::kFloat16, "dtype: expected float32 or bfloat16");
  require(args.threads >= 1, "threads: expected at least 1");
  require(args.N >= 1 && args.K >= 1, "weight: expected at least one row and one column");
  const int64_t numel = checked_mul(args.N, args.K, "weight: N x K");
  require(args.w.numel == numel, "weight: numel", args.w.numel, numel, "values of N x K");
  // Twice what any address or padded copy needs, so that no later size can overflow.
  checked_mul(checked_mul(args.M, args.K, "x: M x K"), 64, "x: bytes");
  checked_mul(checked_mul(args.M, args.N, "y: M x N"), 64, "y: bytes");
  checked_mul(checked_mul(args.r, args.N, "lora_B: N x r"), 64, "lora_B: bytes");
  checked_mul(checked_mul(args.r, args.K, "lora_A: r x K"), 64, "lora_A: bytes");
  checked_mul(checked_mul(args.r, args.M, "s: M x r"), 64, "s: bytes");
  validate(args.w);
  require(args.M == 0 || (args.in && args.out), "in, out: null pointer");
  require(args.M * args.r == 0 || (args.s && args.factor), "s, lora: null pointer");
  const auto agrees = [&](const auto* adapter, const float* s) {
    return !adapter ||
           (adapter->M == args.M && adapter->K == args.K && adapter->r == args.r && s == args.s);
  };
  require(agrees(args.shrink, args.shrink ? args.shrink->s : nullptr) &&
              agrees(args.gradients, args.gradients ? args.gradients->ds : nullptr),
          "shrink, gradients: expected the M, K, r and s of the product");
}

const NF4LinearKernels& products(Isa isa, DType dtype) {
  const CpuKernels& kernels = kernels_for(isa);
  return dtype == DType::kBFloat16 ? kernels.nf4_linear_bf16 : kernels.nf4_linear;
}

}  // namespace

void nf4_lora_linear_forward(Isa isa, const NF4LinearArgs& args) {
  const NF4LinearKernels& kernels = products(isa, args.dtype);
  validate(args);
  if (args.shrink && args.r > 0) lora_shrink(isa, *args.shrink);
  if (args.M > 0) kernels.forward(args);
}

void nf4_lora_linear_backward(Isa isa, const NF4LinearArgs& args) {
  const NF4LinearKernels& kernels = products(isa, args.dtype);
  validate(args);
  if (args.gradients) lora_backward(isa, *args.gradients);
  if (args.M == 0) return;
  if (!args.gradients || !args.gradients->keep) {
    kernels.backward(args);
    return;
  }
  NF4LinearArgs frozen = args;
  frozen.r = 0;
  kernels.backward(frozen);
  LoraExpandArgs expand;
  expand.M = args.M, expand.K = args.K, expand.r = args.r;
  expand.dtype = args.dtype, expand.threads = args.threads;
  expand.keep = args.gradients->keep, expand.scale = args.gradients->keep_scale;
  expand.s = args.s, expand.a = args.factor, expand.y = args.out;
  lora_expand(isa, expand);
}

}  // namespace peftkern
