// A step of block Lanczos: argument checks.
#include "peftkern/gram_product.h"

#include "kernels.h"
#include "peftkern/checks.h"

namespace peftkern {

void gram_product(Isa isa, const GramProductArgs& args) {
  const GramProductKernels& kernels = kernels_for(isa).gram_product;
  const int64_t numel = checked_mul(args.m, args.n, "weight: m x n");
  checked_mul(numel, 4, "weight: bytes");
  // With room for panels and padding.
  checked_mul(checked_mul(args.n, 1024, "n"), 4, "n");
  checked_mul(checked_mul(args.n, args.width, "x: width x n"), 256, "x: bytes");
  checked_mul(checked_mul(args.m, args.width, "y: width x m"), 256, "y: bytes");
  if (!args.weight && numel > 0) {
    validate(args.w);
    validate_rows(args.w, args.n);
    require(args.w.numel == numel, "w: expected m x n elements");
  }
  require((args.n * args.width == 0 || args.x) && (args.m * args.width == 0 || args.y),
          "x, y: null pointer");
  kernels.run(args);
}

}  // namespace peftkern
