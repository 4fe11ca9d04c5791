// The skinny LoRA products: argument checks.
#include "kernels.h"
#include "peftkern/checks.h"

namespace peftkern {
namespace {

void validate(const LoraArgs& args, const void* activation, const float* s, const float* factor) {
  checked_mul(checked_mul(args.M, args.K, "x: M x K"), 4, "x: bytes");
  // With room for a panel of columns around every row.
  checked_mul(checked_mul(args.r, args.K, "lora_A: r x K"), 4096, "lora_A: bytes");
  checked_mul(checked_mul(args.M, args.r, "s: M x r"), 4, "s: bytes");
  checked_mul(args.r, 4096, "r");
  require(args.threads >= 1, "threads: expected at least 1");
  const bool empty = args.M == 0 || args.K == 0;
  require((empty || activation) && (args.M * args.r == 0 || s) && (args.r * args.K == 0 || factor),
          "activation, s, factor: null pointer");
}

}  // namespace

void lora_shrink(Isa isa, const LoraShrinkArgs& args) {
  validate(args, args.x, args.s, args.a);
  kernels_for(isa).lora.shrink(args);
}

void lora_expand(Isa isa, const LoraExpandArgs& args) {
  validate(args, args.y, args.s, args.a);
  kernels_for(isa).lora.expand(args);
}

void lora_outer(Isa isa, const LoraOuterArgs& args) {
  validate(args, args.x, args.s, args.g);
  kernels_for(isa).lora.outer(args);
}

void lora_backward(Isa isa, const LoraBackwardArgs& args) {
  const auto fill = [&](LoraArgs& product, int64_t columns, DType dtype, float scale) {
    product.M = args.M, product.K = columns, product.r = args.r;
    product.dtype = dtype, product.scale = scale, product.threads = args.threads;
  };
  if (args.ds) {
    LoraShrinkArgs shrink;
    fill(shrink, args.N, args.dy_dtype, args.scaling);
    shrink.x = args.dy, shrink.a = args.b, shrink.s = args.ds;
    lora_shrink(isa, shrink);
  }
  if (args.da) {
    LoraOuterArgs outer;
    fill(outer, args.K, args.x_dtype, args.keep_scale);
    outer.s = args.ds, outer.x = args.x, outer.keep = args.keep, outer.g = args.da;
    lora_outer(isa, outer);
  }
  if (args.db) {
    LoraOuterArgs outer;
    fill(outer, args.N, args.dy_dtype, args.scaling);
    outer.s = args.s, outer.x = args.dy, outer.g = args.db, outer.transposed = true;
    lora_outer(isa, outer);
  }
}

}  // namespace peftkern
