// The choice of instruction set.
#include "kernels.h"

#include <array>
#include <string>

#include "peftkern/checks.h"

namespace peftkern {
namespace {

using Tables = std::array<CpuKernels, kIsaCount>;

// Those of instruction sets that were not compiled in stay empty.
Tables make_tables() {
  Tables tables;
  const auto set = [&](Isa isa, const CpuKernels& own) {
    CpuKernels& table = tables[static_cast<size_t>(isa)];
    table = own.nf4.quantize ? own : tables[static_cast<size_t>(Isa::kAvx512)];
    table.nf4_linear_bf16 = own.nf4_linear_bf16;
    NF4LinearKernels& products = table.nf4_linear_bf16;
    if (!products.forward_few) {
      products.forward_few = table.nf4_linear.forward_few;
      products.backward_few = table.nf4_linear.backward_few;
    }
    table.grouped_bf16 = own.grouped_bf16;
  };
  set(Isa::kScalar, kScalarKernels);
#if PEFTKERN_HAVE_AVX2
  set(Isa::kAvx2, kAvx2Kernels);
#endif
#if PEFTKERN_HAVE_AVX512
  set(Isa::kAvx512, kAvx512Kernels);
#endif
#if PEFTKERN_HAVE_AVX512_BF16
  set(Isa::kAvx512Bf16, kAvx512Bf16Kernels);
#endif
#if PEFTKERN_HAVE_AMX
  set(Isa::kAmxBf16, kAmxBf16Kernels);
#endif
  return tables;
}

[[noreturn]] void refuse(Isa isa) {
  std::string known;
  for (int i = 0; i < kIsaCount; ++i) {
    if (!isa_available(static_cast<Isa>(i))) continue;
    known += (known.empty() ? "" : ", ") + std::to_string(i) + " (" +
             isa_name(static_cast<Isa>(i)) + ")";
  }
  fail("isa: got " + std::to_string(static_cast<int>(isa)) + ", expected one of " + known);
}

}  // namespace

const CpuKernels& kernels_for(Isa isa) {
  static const Tables tables = make_tables();
  if (!isa_available(isa)) refuse(isa);
  return tables[static_cast<size_t>(isa)];
}

}  // namespace peftkern
