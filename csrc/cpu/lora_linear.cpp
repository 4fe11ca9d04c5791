// The skinny LoRA products: validation, the scalar kernels, and the choice of instruction set.
#include <stdexcept>

#include "lora_products.h"
#include "peftkern/isa.h"

namespace peftkern {
namespace {

const LoraKernels& kernels_for(const char* isa_name) {
  const Isa isa = isa_from_name(isa_name);
#if PEFTKERN_HAVE_AVX512
  if (isa >= Isa::kAvx512) return kLoraAvx512;
#endif
#if PEFTKERN_HAVE_AVX2
  if (isa >= Isa::kAvx2) return kLoraAvx2;
#endif
  (void)isa;
  return kLoraScalar;
}

// Throws std::invalid_argument naming what does not fit.
void validate(const LoraArgs& args, const void* activation, const float* s, const float* factor) {
  checked_mul(checked_mul(args.M, args.K, "x: M x K"), 4, "x: bytes");
  // With room for a panel of columns around every row.
  checked_mul(checked_mul(args.r, args.K, "lora_A: r x K"), 4096, "lora_A: bytes");
  checked_mul(checked_mul(args.M, args.r, "s: M x r"), 4, "s: bytes");
  checked_mul(args.r, 4096, "r");
  if (args.threads < 1) throw std::invalid_argument("threads: expected at least 1");
  const bool empty = args.M == 0 || args.K == 0;
  if ((!empty && !activation) || (args.M * args.r > 0 && !s) || (args.r * args.K > 0 && !factor)) {
    throw std::invalid_argument("activation, s, factor: null pointer");
  }
}

}  // namespace

const LoraKernels kLoraScalar = {shrink, expand, outer};

void lora_shrink(const char* isa, const LoraShrinkArgs& args) {
  validate(args, args.x, args.s, args.a);
  kernels_for(isa).shrink(args);
}

void lora_expand(const char* isa, const LoraExpandArgs& args) {
  validate(args, args.y, args.s, args.a);
  kernels_for(isa).expand(args);
}

void lora_outer(const char* isa, const LoraOuterArgs& args) {
  validate(args, args.x, args.s, args.g);
  kernels_for(isa).outer(args);
}

}  // namespace peftkern
