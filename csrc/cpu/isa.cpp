#include "peftkern/isa.h"

#if PEFTKERN_X86
#include <cpuid.h>
#endif
#if PEFTKERN_X86 && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace peftkern {
namespace {

constexpr const char* kNames[kIsaCount] = {"scalar", "avx2", "avx512", "avx512_bf16", "amx_bf16"};

#if PEFTKERN_X86
enum CpuidRegister { kEax, kEbx, kEcx, kEdx };

// CPUID itself: which names __builtin_cpu_supports() knows depends on the compiler.
bool cpuid_bit(unsigned leaf, unsigned subleaf, CpuidRegister reg, int bit) {
  unsigned answer[4] = {};
  return __get_cpuid_count(leaf, subleaf, &answer[kEax], &answer[kEbx], &answer[kEcx],
                           &answer[kEdx]) &&
         (answer[reg] >> bit & 1);
}

constexpr unsigned kYmmState = 0x06, kZmmState = 0xe6;  // bits of XCR0, those of XMM included

// The operating system saves this register state when it switches between threads.
bool system_saves(unsigned state) {
  if (!cpuid_bit(1, 0, kEcx, 27)) return false;  // OSXSAVE: there is XGETBV
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & state) == state;
}

// Linux grants the 8 KiB tile state on request, to all threads of the process.
bool request_amx() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr int kArchReqXcompPerm = 0x1023;
  constexpr int kXfeatureXtileData = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureXtileData) == 0;
#else
  return false;
#endif
}

bool machine_has(Isa isa) {
  switch (isa) {
    case Isa::kScalar:
      return true;
    case Isa::kAvx2:  // AVX2, FMA, F16C
      return system_saves(kYmmState) && cpuid_bit(7, 0, kEbx, 5) && cpuid_bit(1, 0, kEcx, 12) &&
             cpuid_bit(1, 0, kEcx, 29);
    case Isa::kAvx512:  // F, DQ, BW, VL
      return machine_has(Isa::kAvx2) && system_saves(kZmmState) && cpuid_bit(7, 0, kEbx, 16) &&
             cpuid_bit(7, 0, kEbx, 17) && cpuid_bit(7, 0, kEbx, 30) && cpuid_bit(7, 0, kEbx, 31);
    case Isa::kAvx512Bf16:
      return machine_has(Isa::kAvx512) && cpuid_bit(7, 1, kEax, 5);
    case Isa::kAmxBf16:  // AMX-TILE, AMX-BF16
      return machine_has(Isa::kAvx512Bf16) && cpuid_bit(7, 0, kEdx, 24) &&
             cpuid_bit(7, 0, kEdx, 22) && request_amx();
  }
  return false;
}
#else
bool machine_has(Isa isa) { return isa == Isa::kScalar; }
#endif

bool probe(Isa isa) {
#ifdef PEFTKERN_EMULATED_AVX512
  if (isa > Isa::kAvx2) return isa_built(isa) && machine_has(Isa::kAvx2);
#endif
  return isa_built(isa) && machine_has(isa);
}

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

bool isa_available(Isa isa) {
  static const bool available[kIsaCount] = {probe(Isa::kScalar), probe(Isa::kAvx2),
                                            probe(Isa::kAvx512), probe(Isa::kAvx512Bf16),
                                            probe(Isa::kAmxBf16)};
  const int i = static_cast<int>(isa);
  return i >= 0 && i < kIsaCount && available[i];
}

bool isa_built(Isa isa) {
  constexpr bool kBuilt[kIsaCount] = {true, PEFTKERN_HAVE_AVX2 != 0, PEFTKERN_HAVE_AVX512 != 0,
                                      PEFTKERN_HAVE_AVX512_BF16 != 0, PEFTKERN_HAVE_AMX != 0};
  return kBuilt[static_cast<int>(isa)];
}

}  // namespace peftkern
