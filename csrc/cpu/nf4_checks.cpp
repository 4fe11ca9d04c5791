// NF4: the checks that every back end makes before it trusts a pointer.
#include "peftkern/checks.h"
#include "peftkern/nf4.h"

namespace peftkern {
namespace {

bool is_blocksize(int64_t b) { return b >= 32 && b <= 4096 && (b & (b - 1)) == 0; }

}  // namespace

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

void validate(const NF4View& w) {
  require(w.numel >= 0 && w.numel < (int64_t{1} << 60), "numel", w.numel, "0 to 2^60");
  require(is_blocksize(w.blocksize), "blocksize", w.blocksize, "a power of two from 32 to 4096");
  const int64_t bytes = (w.numel + 1) / 2;
  require(w.packed_bytes >= bytes, "packed", w.packed_bytes, std::to_string(bytes) + " bytes");
  const int64_t blocks = w.nblocks();
  require(w.absmax_len >= blocks, "absmax", w.absmax_len, std::to_string(blocks) + " blocks");
  if (w.numel > 0 && (!w.packed || !w.absmax)) fail("packed, absmax: null pointer");
  if (!w.nested) return;
  require(w.nested_blocksize >= 1, "nested_blocksize", w.nested_blocksize, "at least 1");
  const int64_t groups = blocks / w.nested_blocksize + (blocks % w.nested_blocksize != 0);
  require(w.nested_absmax_len >= groups, "nested_absmax", w.nested_absmax_len,
          std::to_string(groups) + " groups");
  if (w.numel > 0 && (!w.nested_absmax || !w.nested_code)) {
    fail("nested_absmax, nested_code: null pointer");
  }
}

}  // namespace peftkern
