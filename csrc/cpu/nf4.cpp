// 4-bit weights: argument checks, and the partition of the work into tasks.
#include "peftkern/nf4.h"

#include <cstring>

#include "kernels.h"
#include "nf4_scales.h"
#include "peftkern/checks.h"

namespace peftkern {
namespace {

// 64K weights: 32 KiB packed, 128-256 KiB written; a multiple of every block size.
constexpr int64_t kChunk = 1 << 16;
// Above this size the output does not stay in cache, so write around it (no read for ownership).
// Not so where the system zeroes each page at its first touch: that has just put it into cache.
constexpr int64_t kStreamBytes = 8 << 20;

void require_threads(int threads) { require(threads >= 1, "threads: expected at least 1"); }

}  // namespace

void load_absmax(const NF4View& w, int64_t first, int64_t count, float* out) {
  if (w.float_scales()) {
    std::memcpy(out, static_cast<const float*>(w.absmax) + first, static_cast<size_t>(count) * 4);
    return;
  }
  if (!w.nested) {
    byte_scales(w, first, count, out);
    return;
  }
  const uint8_t* q = static_cast<const uint8_t*>(w.absmax) + first;
  const float offset = *w.nested_offset;
  for (int64_t i = 0; i < count;) {
    const int64_t group = (first + i) / w.nested_blocksize;
    const int64_t stop = min64(count, (group + 1) * w.nested_blocksize - first);
    const float scale = w.nested_absmax[group];
    for (; i < stop; ++i) {
      // Two roundings: the translation unit is compiled without floating-point contraction.
      const float product = w.nested_code[q[i]] * scale;
      out[i] = product + offset;
    }
  }
}

void nf4_quantize(Isa isa, int threads, const void* src, DType dtype, int64_t numel,
                  int64_t blocksize, uint8_t* packed, int64_t packed_bytes, float* absmax,
                  int64_t absmax_len) {
  const NF4Kernels& kernels = kernels_for(isa).nf4;
  require_threads(threads);
  NF4View w;
  w.packed = packed;
  w.packed_bytes = packed_bytes;
  w.absmax = absmax;
  w.absmax_len = absmax_len;
  w.blocksize = blocksize;
  w.numel = numel;
  validate(w);
  require(numel == 0 || src, "src: null pointer");
  parallel_for(threads, ceil_div(numel, kChunk), [&](int64_t task, int) {
    const int64_t begin = task * kChunk, end = min64(numel, begin + kChunk);
    kernels.quantize(src, dtype, begin, end, blocksize, packed, absmax);
  });
}

void nf4_quantize_absmax(int threads, const float* absmax, int64_t n, float offset,
                         const float* code, int64_t nested_blocksize, uint8_t* q,
                         float* nested_absmax, int64_t nested_len) {
  require_threads(threads);
  require(n >= 0, "absmax", n, "a non-negative length");
  require(nested_blocksize >= 1 && nested_blocksize <= (int64_t{1} << 30), "nested_blocksize",
          nested_blocksize, "1 to 2^30");
  const int64_t groups = ceil_div(n, nested_blocksize);
  require(nested_len >= groups, "nested_absmax", nested_len, groups, "groups");
  require(n == 0 || (absmax && code && q && nested_absmax), "absmax: null pointer");
  if (n == 0) return;
  float midpoint[255];
  for (int i = 0; i < 255; ++i) midpoint[i] = (code[i] + code[i + 1]) / 2.0f;
  parallel_for(threads, groups, [&](int64_t group, int) {
    const int64_t begin = group * nested_blocksize, end = min64(n, begin + nested_blocksize);
    float scale = 0.0f;
    for (int64_t i = begin; i < end; ++i) scale = maxabs(scale, absmax[i] - offset);
    nested_absmax[group] = scale;
    const float inverse = 1.0f / (scale < kAbsmaxFloor ? kAbsmaxFloor : scale);
    for (int64_t i = begin; i < end; ++i) {
      const float x = (absmax[i] - offset) * inverse;
      unsigned index = 0;  // midpoints below x; shifting the comparison keeps it free of branches
      for (int bit = 7; bit >= 0; --bit) {
        index += static_cast<unsigned>(!(x <= midpoint[index + (1u << bit) - 1])) << bit;
      }
      q[i] = static_cast<uint8_t>(index);
    }
  });
}

void nf4_dequantize(Isa isa, int threads, const NF4View& w, void* out, DType dtype,
                    int64_t out_numel, bool fresh) {
  const NF4Kernels& kernels = kernels_for(isa).nf4;
  require_threads(threads);
  validate(w);
  require(out_numel == w.numel, "out", out_numel, w.numel, "elements");
  require(w.numel == 0 || out, "out: null pointer");
  const int64_t bytes = w.numel * itemsize(dtype);
  const bool stream = bytes > kStreamBytes && !fresh;
  if (fresh) advise_huge_pages(out, bytes);
  const int log2 = w.blocksize_log2();
  parallel_for(threads, ceil_div(w.numel, kChunk), [&](int64_t task, int) {
    const int64_t begin = task * kChunk, end = min64(w.numel, begin + kChunk);
    const int64_t first = begin >> log2;
    float absmax[kChunk / 16];
    load_absmax(w, first, ((end - 1) >> log2) - first + 1, absmax);
    kernels.dequantize(w, absmax, begin, end, out, dtype, stream);
  });
}

}  // namespace peftkern
