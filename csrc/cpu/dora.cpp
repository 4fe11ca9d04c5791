// DoRA's row norms: argument checks.
#include "kernels.h"
#include "peftkern/checks.h"

namespace peftkern {

void dora_norm(Isa isa, const DoraNormArgs& args) {
  const DoraKernels& kernels = kernels_for(isa).dora;
  const int64_t numel = checked_mul(args.N, args.K, "weight: N x K");
  // With room for what every thread decodes.
  checked_mul(checked_mul(args.K, 4096, "K"), args.threads, "scratch");
  checked_mul(checked_mul(args.r, args.K, "lora_A: r x K"), 4096, "lora_A: bytes");
  checked_mul(checked_mul(args.N, args.r, "lora_B: N x r"), 4, "lora_B: bytes");
  require(args.threads >= 1, "threads: expected at least 1");
  if (!args.weight && numel > 0) {
    validate(args.w);
    validate_rows(args.w, args.K);
    require(args.w.numel == numel, "w: expected N x K elements");
  }
  require((args.N == 0 || args.norm) && (args.r * args.K == 0 || args.a) &&
              (args.N * args.r == 0 || args.b),
          "norm, a, b: null pointer");
  if (args.N == 0) return;
  if (args.K == 0) {
    for (int64_t n = 0; n < args.N; ++n) args.norm[n] = 0.0f;
    return;
  }
  kernels.norm(args);
}

}  // namespace peftkern
