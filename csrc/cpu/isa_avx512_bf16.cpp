// NF4 matrix products for AVX512-BF16: pairs of bfloat16 multiplied into float32 (vdpbf16ps).
#include "grouped_bf16.h"
#include "grouped_linear_kernels.h"
#include "grouped_outer_kernels.h"
#include "kernels.h"
#include "nf4_bf16.h"
#include "nf4_lora_linear_kernels.h"

namespace peftkern {
namespace {

struct Avx512Bf16Math : BFloat16Panels {
  static constexpr int64_t kBlock = 256;
  static constexpr bool kOverlaps = false;
  struct Session {};

  template <int kB>
  static void multiply(const uint32_t* rows, const uint32_t* lanes, float* c, int64_t steps,
                       bool first, int64_t count) {
    for (int64_t row = 0; row < count; row += 8) {
      if (count - row > 4) {
        multiply_part<8, kB>(row_of(rows, row), lanes, row_of(c, row), steps, first);
      } else {
        multiply_part<4, kB>(row_of(rows, row), lanes, row_of(c, row), steps, first);
      }
    }
  }

  template <int kRows, int kB>
  static void multiply_part(const uint32_t* rows, const uint32_t* lanes, float* c, int64_t steps,
                            bool first) {
    __m512 acc[kRows][kB];
    for (int i = 0; i < kRows; ++i) {
      for (int b = 0; b < kB; ++b) {
        acc[i][b] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(c + b * kTile + i * 16);
      }
    }
    for (int64_t t = 0; t < steps; ++t, rows += kPair, lanes += kPair) {
      for (int k = 0; k < 16; ++k) {
        __m512bh x[kB];
        for (int b = 0; b < kB; ++b) {
          x[b] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(lanes + b * kTile + k * 16));
        }
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
          // _mm512_set1_epi32() would be the same instruction; clang 16 and 17 crash over it.
          const __m128i pair = _mm_cvtsi32_si128(static_cast<int>(rows[i * 16 + k]));
          const __m512bh y = reinterpret_cast<__m512bh>(_mm512_broadcastd_epi32(pair));
          for (int b = 0; b < kB; ++b) acc[i][b] = _mm512_dpbf16_ps(acc[i][b], y, x[b]);
        }
      }
    }
    for (int i = 0; i < kRows; ++i) {
      for (int b = 0; b < kB; ++b) _mm512_storeu_ps(c + b * kTile + i * 16, acc[i][b]);
    }
  }
};

}  // namespace

constexpr CpuKernels kAvx512Bf16Kernels = {
    {forward_panels<Avx512Bf16Math>, backward_panels<Avx512Bf16Math>, forward_few<BFloat16Dots>,
     backward_few<BFloat16Axpy>, kShortBlocks},
    {grouped::linear<Avx512Bf16Math, grouped::BFloat16Tiles>,
     grouped::outer<Avx512Bf16Math, grouped::BFloat16Tiles>}};

}  // namespace peftkern
