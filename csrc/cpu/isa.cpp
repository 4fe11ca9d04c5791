#include "peftkern/isa.h"

#include <cstring>
#include <stdexcept>
#include <string>

#if PEFTKERN_HAVE_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace peftkern {
namespace {

constexpr const char* kNames[kIsaCount] = {"scalar", "avx2", "avx512", "avx512_bf16", "amx_bf16"};

#if PEFTKERN_HAVE_AVX2 || PEFTKERN_HAVE_AVX512
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
#endif

#if PEFTKERN_HAVE_AVX512
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

#if PEFTKERN_HAVE_AMX
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

bool cpu_has_amx_bf16() {
  unsigned eax = 7, ebx = 0, ecx = 0, edx = 0;
  __asm__ volatile("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
  return (edx >> 22 & 1) && (edx >> 24 & 1);  // AMX-BF16, AMX-TILE
}
#endif

bool probe(Isa isa) {
  switch (isa) {
    case Isa::kScalar:
      return true;
    case Isa::kAvx2:
#if PEFTKERN_HAVE_AVX2
      return has_avx2();
#else
      return false;
#endif
    case Isa::kAvx512:
#if PEFTKERN_HAVE_AVX512
      return has_avx512();
#else
      return false;
#endif
    case Isa::kAvx512Bf16:
#if PEFTKERN_HAVE_AVX512_BF16
      return has_avx512() && __builtin_cpu_supports("avx512bf16");
#else
      return false;
#endif
    case Isa::kAmxBf16:
#if PEFTKERN_HAVE_AMX
      return has_avx512() && __builtin_cpu_supports("avx512bf16") && cpu_has_amx_bf16() &&
             request_amx();
#else
      return false;
#endif
  }
  return false;
}

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

bool isa_available(Isa isa) {
  static const bool available[kIsaCount] = {probe(Isa::kScalar), probe(Isa::kAvx2),
                                            probe(Isa::kAvx512), probe(Isa::kAvx512Bf16),
                                            probe(Isa::kAmxBf16)};
  return available[static_cast<int>(isa)];
}

bool isa_built(Isa isa) {
  constexpr bool kBuilt[kIsaCount] = {true, PEFTKERN_HAVE_AVX2 != 0, PEFTKERN_HAVE_AVX512 != 0,
                                      PEFTKERN_HAVE_AVX512_BF16 != 0, PEFTKERN_HAVE_AMX != 0};
  return kBuilt[static_cast<int>(isa)];
}

Isa isa_from_name(const char* name) {
  std::string known;
  for (int i = 0; i < kIsaCount; ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (!isa_available(isa)) continue;
    if (std::strcmp(name, kNames[i]) == 0) return isa;
    known += known.empty() ? "" : ", ";
    known += kNames[i];
  }
  throw std::invalid_argument("isa: '" + std::string(name) +
                              "' is not available here; available: " + known);
}

}  // namespace peftkern
