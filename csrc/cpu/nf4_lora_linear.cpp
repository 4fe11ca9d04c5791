// NF4 matrix products: validation, the scalar kernels, and the choice of instruction set.
#include "peftkern/nf4_lora_linear.h"

#include <cstdlib>
#include <new>
#include <stdexcept>
#include <string>

#include "nf4_gemm.h"
#include "peftkern/isa.h"

namespace peftkern {
namespace {

const NF4LinearKernels& kernels_for(Isa isa, DType dtype) {
  const bool bf16 = dtype == DType::kBFloat16;
  (void)bf16;
#if PEFTKERN_HAVE_AMX
  if (isa >= Isa::kAmxBf16 && bf16) return kNF4LinearAmxBf16;
#endif
#if PEFTKERN_HAVE_AVX512_BF16
  if (isa >= Isa::kAvx512Bf16 && bf16) return kNF4LinearAvx512Bf16;
#endif
#if PEFTKERN_HAVE_AVX512
  if (isa >= Isa::kAvx512) return kNF4LinearAvx512;
#endif
#if PEFTKERN_HAVE_AVX2
  if (isa >= Isa::kAvx2) return kNF4LinearAvx2;
#endif
  (void)isa;
  return kNF4LinearScalar;
}

void validate(const NF4LinearArgs& args) {
  const auto fail = [](const char* message) { throw std::invalid_argument(message); };
  if (args.dtype == DType::kFloat16) fail("dtype: expected float32 or bfloat16");
  if (args.threads < 1) fail("threads: expected at least 1");
  if (args.N < 1 || args.K < 1) fail("weight: expected at least one row and one column");
  if (checked_mul(args.N, args.K, "weight: N x K") != args.w.numel) {
    throw std::invalid_argument("weight: numel " + std::to_string(args.w.numel) + " is not " +
                                std::to_string(args.N) + " x " + std::to_string(args.K));
  }
  // Twice what any address or padded copy needs, so that no later size can overflow.
  checked_mul(checked_mul(args.M, args.K, "x: M x K"), 64, "x: bytes");
  checked_mul(checked_mul(args.M, args.N, "y: M x N"), 64, "y: bytes");
  checked_mul(checked_mul(args.r, args.N, "lora_B: N x r"), 64, "lora_B: bytes");
  checked_mul(checked_mul(args.r, args.K, "lora_A: r x K"), 64, "lora_A: bytes");
  checked_mul(checked_mul(args.r, args.M, "s: M x r"), 64, "s: bytes");
  validate(args.w);
  if (args.M > 0 && (!args.in || !args.out)) fail("in, out: null pointer");
  if (args.M > 0 && args.r > 0 && (!args.s || !args.up)) fail("s, lora: null pointer");
  const LoraShrinkArgs* shrink = args.shrink;
  if (shrink &&
      (shrink->M != args.M || shrink->K != args.K || shrink->r != args.r || shrink->s != args.s)) {
    fail("shrink: expected the M, K, r and s of the product");
  }
}

}  // namespace

const NF4LinearKernels kNF4LinearScalar = {forward_with<Float32Math>, backward_with<Float32Math>};

void nf4_lora_linear_forward(const char* isa, const NF4LinearArgs& args) {
  validate(args);
  if (args.shrink && args.r > 0) lora_shrink(isa, *args.shrink);
  if (args.M > 0) kernels_for(isa_from_name(isa), args.dtype).forward(args);
}

void nf4_lora_linear_backward(const char* isa, const NF4LinearArgs& args) {
  validate(args);
  if (args.M > 0) kernels_for(isa_from_name(isa), args.dtype).backward(args);
}

void* scratch_allocate(int64_t bytes) {
  if (bytes <= 0) return nullptr;
  void* p = std::aligned_alloc(64, static_cast<size_t>(bytes + 63) / 64 * 64);
  if (!p) throw std::bad_alloc();
  return p;
}

void scratch_free(void* p) { std::free(p); }

}  // namespace peftkern
