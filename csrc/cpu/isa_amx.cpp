// NF4 matrix products for AMX-BF16: 16 x 32 by 32 x 16 tile products in eight tile registers.
// Two by two tiles of sums share two rows and two lanes tiles, so that each step loads 4 KiB for
// 65,536 multiply-adds; loads are placed between products, which run in order.
#include <atomic>

#include "grouped_bf16.h"
#include "grouped_linear_kernels.h"
#include "grouped_outer_kernels.h"
#include "kernels.h"
#include "nf4_bf16.h"
#include "nf4_lora_linear_kernels.h"

namespace peftkern {
namespace {

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

struct AmxBf16Math : BFloat16Panels {
  static constexpr int64_t kBlock = 256;
  static constexpr bool kOverlaps = true;

  struct Session {
    Session() {
      const TileConfig config;
      _tile_loadconfig(&config);
    }
    ~Session() { _tile_release(); }
  };

  template <int kB>
  static void multiply(const uint32_t* rows, const uint32_t* lanes, float* c, int64_t steps,
                       bool first, int64_t count) {
    (count > kSide ? multiply_tiles<2, kB> : multiply_tiles<1, kB>)(rows, lanes, c, steps, first);
  }

  // A product of a pair of rows tiles and one of lanes tiles step by step, for other work between.
  struct Steps {
    const bool two_rows, two_lanes;
    void begin() const {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    [[gnu::always_inline]] void step(const uint32_t* rows, const uint32_t* lanes) const {
      std::atomic_signal_fence(std::memory_order_seq_cst);  // compilers see no reads in tile loads
      _tile_loadd(4, rows, 64);
      _tile_loadd(6, lanes, 64);
      _tile_dpbf16ps(0, 4, 6);
      if (two_lanes) {
        _tile_loadd(7, lanes + kTile, 64);
        _tile_dpbf16ps(1, 4, 7);
      }
      if (two_rows) {
        _tile_loadd(5, rows + kTile, 64);
        _tile_dpbf16ps(2, 5, 6);
        if (two_lanes) _tile_dpbf16ps(3, 5, 7);
      }
    }
    void end(float* c) const {
      _tile_stored(0, c, 64);
      if (two_lanes) _tile_stored(1, c + kTile, 64);
      if (two_rows) _tile_stored(2, c + 2 * kTile, 64);
      if (two_rows && two_lanes) _tile_stored(3, c + 3 * kTile, 64);
    }
  };

  // Tiles 0..3: sums; 4, 5: rows; 6, 7: lanes.
  template <int kA, int kB>
  static void multiply_tiles(const uint32_t* rows, const uint32_t* lanes, float* c, int64_t steps,
                             bool first) {
    if (first) {
      _tile_zero(0);
      if (kB == 2) _tile_zero(1);
      if (kA == 2) _tile_zero(2);
      if (kA == 2 && kB == 2) _tile_zero(3);
    } else {
      _tile_loadd(0, c, 64);
      if (kB == 2) _tile_loadd(1, c + kTile, 64);
      if (kA == 2) _tile_loadd(2, c + 2 * kTile, 64);
      if (kA == 2 && kB == 2) _tile_loadd(3, c + 3 * kTile, 64);
    }
    for (int64_t t = 0; t < steps; ++t, rows += kPair, lanes += kPair) {
      _tile_loadd(4, rows, 64);
      _tile_loadd(6, lanes, 64);
      _tile_dpbf16ps(0, 4, 6);
      if (kB == 2) {
        _tile_loadd(7, lanes + kTile, 64);
        _tile_dpbf16ps(1, 4, 7);
      }
      if (kA == 2) {
        _tile_loadd(5, rows + kTile, 64);
        _tile_dpbf16ps(2, 5, 6);
        if (kB == 2) _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, c, 64);
    if (kB == 2) _tile_stored(1, c + kTile, 64);
    if (kA == 2) _tile_stored(2, c + 2 * kTile, 64);
    if (kA == 2 && kB == 2) _tile_stored(3, c + 3 * kTile, 64);
  }
};

}  // namespace

constexpr CpuKernels kAmxBf16Kernels = {
    {forward_panels<AmxBf16Math>, backward_panels<AmxBf16Math>, nullptr, nullptr, kShortBlocks},
    {grouped::linear<AmxBf16Math, grouped::BFloat16Tiles>,
     grouped::outer<AmxBf16Math, grouped::BFloat16Tiles>}};

}  // namespace peftkern
