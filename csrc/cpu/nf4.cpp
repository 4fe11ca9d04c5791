// NF4: the scalar kernels, and the split of the work over threads.
#include "peftkern/nf4.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <string>

#include "nf4_blocks.h"
#include "peftkern/checks.h"
#include "peftkern/isa.h"
#include "peftkern/parallel.h"

namespace peftkern {
namespace {

void require_threads(int threads) { require(threads >= 1, "threads", threads, "at least 1"); }

const NF4Kernels& kernels_for(Isa isa) {
#if PEFTKERN_HAVE_AVX512
  if (isa >= Isa::kAvx512) return kNF4Avx512;
#endif
#if PEFTKERN_HAVE_AVX2
  if (isa >= Isa::kAvx2) return kNF4Avx2;
#endif
  (void)isa;
  return kNF4Scalar;
}

// 64K weights: 32 KiB packed, 128-256 KiB written; a multiple of every block size.
constexpr int64_t kChunk = 1 << 16;
// Above this size the output does not stay in cache, so write around it (no read for ownership).
// Not so where the system zeroes each page at its first touch: that has just put it into cache.
constexpr int64_t kStreamBytes = 8 << 20;

}  // namespace

const NF4Kernels kNF4Scalar = {quantize_blocks, dequantize_blocks};

void ask_for_huge_pages(void* p, int64_t bytes) {
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

void load_absmax(const NF4View& w, int64_t first, int64_t count, float* out) {
  if (!w.nested) {
    std::memcpy(out, static_cast<const float*>(w.absmax) + first, static_cast<size_t>(count) * 4);
    return;
  }
  const uint8_t* q = static_cast<const uint8_t*>(w.absmax) + first;
  for (int64_t i = 0; i < count;) {
    const int64_t group = (first + i) / w.nested_blocksize;
    const int64_t stop = min64(count, (group + 1) * w.nested_blocksize - first);
    const float scale = w.nested_absmax[group];
    for (; i < stop; ++i) {
      // Two roundings: the translation unit is compiled without floating-point contraction.
      const float product = w.nested_code[q[i]] * scale;
      out[i] = product + w.nested_offset;
    }
  }
}

void nf4_quantize(const char* isa, int threads, const void* src, DType dtype, int64_t numel,
                  int64_t blocksize, uint8_t* packed, int64_t packed_bytes, float* absmax,
                  int64_t absmax_len) {
  require_threads(threads);
  NF4View w;
  w.packed = packed;
  w.packed_bytes = packed_bytes;
  w.absmax = absmax;
  w.absmax_len = absmax_len;
  w.blocksize = blocksize;
  w.numel = numel;
  validate(w);
  if (numel > 0 && !src) fail("src: null pointer");
  struct Context {
    const NF4Kernels& kernels;
    const void* src;
    DType dtype;
    int64_t numel, blocksize;
    uint8_t* packed;
    float* absmax;
  } context{kernels_for(isa_from_name(isa)), src, dtype, numel, blocksize, packed, absmax};
  parallel_tasks(
      threads, (numel + kChunk - 1) / kChunk,
      [](void* p, int64_t task, int) {
        const Context& c = *static_cast<Context*>(p);
        const int64_t begin = task * kChunk;
        c.kernels.quantize(c.src, c.dtype, begin, min64(c.numel, begin + kChunk), c.blocksize,
                           c.packed, c.absmax);
      },
      &context);
}

void nf4_quantize_absmax(int threads, const float* absmax, int64_t n, float offset,
                         const float* code, int64_t nested_blocksize, uint8_t* q,
                         float* nested_absmax, int64_t nested_len) {
  require_threads(threads);
  require(n >= 0, "absmax", n, "a non-negative length");
  require(nested_blocksize >= 1 && nested_blocksize <= (int64_t{1} << 30), "nested_blocksize",
          nested_blocksize, "1 to 2^30");
  const int64_t groups = (n + nested_blocksize - 1) / nested_blocksize;
  require(nested_len >= groups, "nested_absmax", nested_len, std::to_string(groups) + " groups");
  if (n > 0 && (!absmax || !code || !q || !nested_absmax)) fail("absmax: null pointer");
  struct Context {
    const float* absmax;
    int64_t n;
    float offset;
    int64_t blocksize;
    uint8_t* q;
    float* nested_absmax;
    float midpoint[255];
  } context{absmax, n, offset, nested_blocksize, q, nested_absmax, {}};
  if (n > 0) {
    for (int i = 0; i < 255; ++i) context.midpoint[i] = (code[i] + code[i + 1]) / 2.0f;
  }
  parallel_tasks(
      threads, groups,
      [](void* p, int64_t group, int) {
        const Context& c = *static_cast<Context*>(p);
        const int64_t begin = group * c.blocksize, end = min64(c.n, begin + c.blocksize);
        float scale = 0.0f;
        for (int64_t i = begin; i < end; ++i) scale = maxabs(scale, c.absmax[i] - c.offset);
        c.nested_absmax[group] = scale;
        const float inverse = 1.0f / (scale < kAbsmaxFloor ? kAbsmaxFloor : scale);
        for (int64_t i = begin; i < end; ++i) {
          const float x = (c.absmax[i] - c.offset) * inverse;
          unsigned index =
              0;  // midpoints below x; shifting the comparison keeps it free of branches
          for (int bit = 7; bit >= 0; --bit) {
            const unsigned step = 1u << bit;
            index += static_cast<unsigned>(!(x <= c.midpoint[index + step - 1])) << bit;
          }
          c.q[i] = static_cast<uint8_t>(index);
        }
      },
      &context);
}

void nf4_dequantize(const char* isa, int threads, const NF4View& w, void* out, DType dtype,
                    int64_t out_numel, bool fresh) {
  require_threads(threads);
  validate(w);
  require(out_numel == w.numel, "out", out_numel, std::to_string(w.numel) + " elements");
  if (w.numel > 0 && !out) fail("out: null pointer");
  const int64_t bytes = w.numel * itemsize(dtype);
  if (fresh) ask_for_huge_pages(out, bytes);
  struct Context {
    const NF4Kernels& kernels;
    const NF4View& w;
    void* out;
    DType dtype;
    bool stream;
  } context{kernels_for(isa_from_name(isa)), w, out, dtype, bytes > kStreamBytes && !fresh};
  parallel_tasks(
      threads, (w.numel + kChunk - 1) / kChunk,
      [](void* p, int64_t task, int) {
        const Context& c = *static_cast<Context*>(p);
        const int64_t begin = task * kChunk, end = min64(c.w.numel, begin + kChunk);
        const int64_t first = begin >> c.w.blocksize_log2();
        float absmax[kChunk / 32];
        load_absmax(c.w, first, ((end - 1) >> c.w.blocksize_log2()) - first + 1, absmax);
        c.kernels.dequantize(c.w, absmax, begin, end, c.out, c.dtype, c.stream);
      },
      &context);
}

}  // namespace peftkern
