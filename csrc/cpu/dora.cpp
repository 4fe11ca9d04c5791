// DoRA's row norms: validation, the scalar kernel, and the choice of instruction set.
#include <stdexcept>

#include "dora_kernels.h"
#include "peftkern/isa.h"

namespace peftkern {
namespace {

const DoraKernels& kernels_for(const char* isa_name) {
  const Isa isa = isa_from_name(isa_name);
#if PEFTKERN_HAVE_AVX512
  if (isa >= Isa::kAvx512) return kDoraAvx512;
#endif
#if PEFTKERN_HAVE_AVX2
  if (isa >= Isa::kAvx2) return kDoraAvx2;
#endif
  (void)isa;
  return kDoraScalar;
}

}  // namespace

const DoraKernels kDoraScalar = {norm};

void dora_norm(const char* isa, const DoraNormArgs& args) {
  const DoraKernels& kernels = kernels_for(isa);
  const int64_t numel = checked_mul(args.N, args.K, "weight: N x K");
  // With room for what every thread decodes.
  checked_mul(checked_mul(args.K, 4096, "K"), args.threads, "scratch");
  checked_mul(checked_mul(args.r, args.K, "lora_A: r x K"), 4096, "lora_A: bytes");
  checked_mul(checked_mul(args.N, args.r, "lora_B: N x r"), 4, "lora_B: bytes");
  if (args.threads < 1) throw std::invalid_argument("threads: expected at least 1");
  if (!args.weight && numel > 0) {
    validate(args.w);
    if (args.w.numel != numel) throw std::invalid_argument("w: expected N x K elements");
  }
  if ((args.N > 0 && !args.norm) || (args.r * args.K > 0 && !args.a) ||
      (args.N * args.r > 0 && !args.b)) {
    throw std::invalid_argument("norm, a, b: null pointer");
  }
  if (args.N == 0) return;
  if (args.K == 0) {
    for (int64_t n = 0; n < args.N; ++n) args.norm[n] = 0.0f;
    return;
  }
  kernels.norm(args);
}

}  // namespace peftkern
