// 4-bit weights: the bounds checks of every back end before it dereferences a pointer.
#include "peftkern/checks.h"
#include "peftkern/nf4.h"

namespace peftkern {
namespace {

// Block sizes are powers of two from the first to the last.
struct BlockSizes {
  int64_t first, last;
  const char* wanted;
};
constexpr BlockSizes kBlockSizes[kFormatCount] = {{32, 4096, "a power of two from 32 to 4096"},
                                                  {32, 4096, "a power of two from 32 to 4096"},
                                                  {32, 32, "32, the one of mxfp4"},
                                                  {16, 16, "16, the one of nvfp4"},
                                                  {32, 256, "32, 64, 128 or 256"}};

void validate_nested(const NF4View& w, int64_t blocks) {
  require(w.nested_blocksize >= 1, "nested_blocksize", w.nested_blocksize, "at least 1");
  const int64_t groups = blocks / w.nested_blocksize + (blocks % w.nested_blocksize != 0);
  require(w.nested_absmax_len >= groups, "nested_absmax", w.nested_absmax_len, groups, "groups");
  require(w.numel == 0 || (w.nested_absmax && w.nested_code && w.nested_offset),
          "nested_absmax, nested_code, nested_offset: null pointer");
}

}  // namespace

void validate(const NF4View& w) {
  const int64_t format = static_cast<int64_t>(w.format);
  require(format >= 0 && format < kFormatCount, "format", format, "0 to 4");
  require(w.numel >= 0 && w.numel < (int64_t{1} << 60), "numel", w.numel, "0 to 2^60");
  const BlockSizes& sizes = kBlockSizes[format];
  require(w.blocksize >= sizes.first && w.blocksize <= sizes.last &&
              (w.blocksize & (w.blocksize - 1)) == 0,
          "blocksize", w.blocksize, sizes.wanted);
  const int64_t bytes = (w.numel + 1) / 2, blocks = w.nblocks();
  require(w.packed_bytes >= bytes, "packed", w.packed_bytes, bytes, "bytes");
  require(w.absmax_len >= blocks, "absmax", w.absmax_len, blocks, "blocks");
  require(w.numel == 0 || (w.packed && w.absmax), "packed, absmax: null pointer");
  require(!w.low_first() || w.numel % w.blocksize == 0, "numel", w.numel, w.blocksize,
          "or a multiple of it");
  if (w.nested) {
    require(!w.low_first(), "nested: expected nf4 or fp4");
    validate_nested(w, blocks);
  }
  if (w.format == Format::kNVFP4) {
    require(w.aux_len >= 1, "tensor_scale", w.aux_len, "1 value");
    require(w.numel == 0 || w.tensor_scale, "tensor_scale: null pointer");
  }
  require(!w.zero || w.format == Format::kINT4, "zero: expected none but of int4");
  require(!w.zero || w.aux_len >= blocks, "zero", w.aux_len, blocks, "blocks");
}

void validate_rows(const NF4View& w, int64_t K) {
  require(!w.low_first() || K % w.blocksize == 0, "K", K, w.blocksize, "or a multiple of it");
}

}  // namespace peftkern
