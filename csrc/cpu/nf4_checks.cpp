// NF4: the bounds checks of every back end before it dereferences a pointer.
#include "peftkern/checks.h"
#include "peftkern/nf4.h"

namespace peftkern {

void validate(const NF4View& w) {
  require(w.numel >= 0 && w.numel < (int64_t{1} << 60), "numel", w.numel, "0 to 2^60");
  require(w.blocksize >= 32 && w.blocksize <= 4096 && (w.blocksize & (w.blocksize - 1)) == 0,
          "blocksize", w.blocksize, "a power of two from 32 to 4096");
  const int64_t bytes = (w.numel + 1) / 2, blocks = w.nblocks();
  require(w.packed_bytes >= bytes, "packed", w.packed_bytes, bytes, "bytes");
  require(w.absmax_len >= blocks, "absmax", w.absmax_len, blocks, "blocks");
  require(w.numel == 0 || (w.packed && w.absmax), "packed, absmax: null pointer");
  if (!w.nested) return;
  require(w.nested_blocksize >= 1, "nested_blocksize", w.nested_blocksize, "at least 1");
  const int64_t groups = blocks / w.nested_blocksize + (blocks % w.nested_blocksize != 0);
  require(w.nested_absmax_len >= groups, "nested_absmax", w.nested_absmax_len, groups, "groups");
  require(w.numel == 0 || (w.nested_absmax && w.nested_code && w.nested_offset),
          "nested_absmax, nested_code, nested_offset: null pointer");
}

}  // namespace peftkern
