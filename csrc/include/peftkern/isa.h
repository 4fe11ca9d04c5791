// Instruction sets of x86-64 that have kernels, weakest first. Torch-free.
#pragma once

#ifndef PEFTKERN_HAVE_AVX2
#define PEFTKERN_HAVE_AVX2 0
#endif
#ifndef PEFTKERN_HAVE_AVX512
#define PEFTKERN_HAVE_AVX512 0
#endif
#ifndef PEFTKERN_HAVE_AVX512_BF16
#define PEFTKERN_HAVE_AVX512_BF16 0
#endif
#ifndef PEFTKERN_HAVE_AMX
#define PEFTKERN_HAVE_AMX 0
#endif

namespace peftkern {

enum class Isa : int { kScalar, kAvx2, kAvx512, kAvx512Bf16, kAmxBf16 };
inline constexpr int kIsaCount = 5;
const char* isa_name(Isa isa);

// Compiled in: the compiler knew it.
bool isa_built(Isa isa);

// Compiled in, and the processor and the operating system support it.
bool isa_available(Isa isa);

// Throws std::invalid_argument for a name that is unknown or not available here.
Isa isa_from_name(const char* name);

}  // namespace peftkern
