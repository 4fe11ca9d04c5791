// Instruction sets of x86-64 that have kernels, weakest first. Torch-free.
#pragma once

namespace peftkern {

enum class Isa : int { kScalar, kAvx2, kAvx512, kAvx512Bf16, kAmxBf16 };
inline constexpr int kIsaCount = 5;
const char* isa_name(Isa isa);

// Compiled in: the compiler knew it.
bool isa_built(Isa isa);

// Compiled in, and the processor and the operating system support it. False for numbers that are no
// Isa, as Python may pass them.
bool isa_available(Isa isa);

}  // namespace peftkern
