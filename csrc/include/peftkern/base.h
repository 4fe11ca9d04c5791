// Element types, checked sizes and memory: what every family of kernels uses. Torch-free.
#pragma once

#include <cstdint>

namespace peftkern {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Throws std::invalid_argument for any other code.
DType dtype_from_code(int code);
int64_t itemsize(DType dtype);

// a * b for sizes; throws std::invalid_argument naming `what` on a negative factor or on overflow.
int64_t checked_mul(int64_t a, int64_t b, const char* what);

// First touches of a new large buffer cost more than decoding into it: 4 KiB at a time is 8,192
// page faults for a 4096 x 4096 bfloat16 weight, 2 MiB at a time 16. A hint; refusal is fine.
void advise_huge_pages(void* p, int64_t bytes);

// 64-byte aligned scratch memory; std::bad_alloc when there is none.
void* scratch_allocate(int64_t bytes);
void scratch_free(void* p);

}  // namespace peftkern
