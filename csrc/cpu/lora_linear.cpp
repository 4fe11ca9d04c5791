// The skinny LoRA product: validation, the scalar kernel, and the choice of instruction set.
#include <stdexcept>

#include "lora_shrink.h"
#include "peftkern/isa.h"

namespace peftkern {

void (*const kLoraShrinkScalar)(const LoraShrinkArgs&) = shrink;

void lora_shrink(const char* isa_name, const LoraShrinkArgs& args) {
  const Isa isa = isa_from_name(isa_name);
  checked_mul(checked_mul(args.M, args.K, "x: M x K"), 4, "x: bytes");
  checked_mul(checked_mul(args.r, args.K, "lora_A: r x K"), 4, "lora_A: bytes");
  checked_mul(checked_mul(args.M, args.r, "s: M x r"), 4, "s: bytes");
  if (args.threads < 1) throw std::invalid_argument("threads: expected at least 1");
  if (args.M == 0 || args.r == 0) return;
  if (!args.s || (args.K > 0 && (!args.x || !args.a))) {
    throw std::invalid_argument("x, lora_A, s: null pointer");
  }
#if PEFTKERN_HAVE_AVX512
  if (isa >= Isa::kAvx512) return kLoraShrinkAvx512(args);
#endif
#if PEFTKERN_HAVE_AVX2
  if (isa >= Isa::kAvx2) return kLoraShrinkAvx2(args);
#endif
  (void)isa;
  kLoraShrinkScalar(args);
}

}  // namespace peftkern
