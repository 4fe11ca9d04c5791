#include "peftkern/base.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdlib>
#include <new>

#include "peftkern/checks.h"

namespace peftkern {

DType dtype_from_code(int code) {
  require(code >= 0 && code <= 2, "dtype", code, "0 (float32), 1 (bfloat16) or 2 (float16)");
  return static_cast<DType>(code);
}

int64_t itemsize(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

int64_t checked_mul(int64_t a, int64_t b, const char* what) {
  int64_t product = 0;
  if (a < 0 || b < 0 || __builtin_mul_overflow(a, b, &product)) {
    fail(std::string(what) + ": " + std::to_string(a) + " x " + std::to_string(b) +
         " is negative or overflows int64");
  }
  return product;
}

void advise_huge_pages(void* p, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kHuge = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(p) + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end =
      (reinterpret_cast<uintptr_t>(p) + static_cast<uintptr_t>(bytes)) / kHuge * kHuge;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)p;
  (void)bytes;
#endif
}

void* scratch_allocate(int64_t bytes) {
  if (bytes <= 0) return nullptr;
  void* p = std::aligned_alloc(64, static_cast<size_t>(bytes + 63) / 64 * 64);
  if (!p) throw std::bad_alloc();
  return p;
}

void scratch_free(void* p) { std::free(p); }

}  // namespace peftkern
