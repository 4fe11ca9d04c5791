// Tiles and panels of the NF4 matrix product, compiled once per instruction set.
//
// Everything is cut into tiles of 16 x 16 dwords (1 KiB, contiguous), two tiles side by side per
// step of the reduction. A dword holds one float32 or a pair of bfloat16 that are neighbors along
// the reduction, so both types share layouts, loops and epilogues:
//   "rows" operand: 16 rows of 16 dwords along the reduction   (an AMX left operand)
//   "lanes" operand: 16 dwords along the reduction x 16 columns (an AMX right operand)
// The product of a rows tile and a lanes tile is a 16 x 16 float32 tile.
#pragma once

#include "nf4_decode.h"
#include "nf4_pieces.h"
#include "nf4_scales.h"

namespace peftkern {
namespace {

constexpr int64_t kSide = 16;             // rows, or lanes, of a tile
constexpr int64_t kTile = kSide * kSide;  // dwords in a tile
constexpr int64_t kPairSide = 2 * kSide;  // rows, or lanes, of two tiles
constexpr int64_t kPair = 2 * kTile;      // dwords in two tiles

// Scales of blocks [first, first + count) as float32: load_absmax with vectors.
inline void expand_absmax(const NF4View& w, int64_t first, int64_t count, float* out) {
  if (!w.nested && !w.float_scales()) {
    byte_scales(w, first, count, out);
    return;
  }
#if defined(__AVX512F__)
  if (w.nested) {
    const uint8_t* q = static_cast<const uint8_t*>(w.absmax) + first;
    const __m512 offset = _mm512_set1_ps(*w.nested_offset);
    for (int64_t i = 0; i < count;) {
      const int64_t group = (first + i) / w.nested_blocksize;
      const int64_t stop = min64(count, (group + 1) * w.nested_blocksize - first);
      const __m512 scale = _mm512_set1_ps(w.nested_absmax[group]);
      for (; i < stop; i += 16) {
        const __mmask16 mask = mask16(static_cast<int>(min64(16, stop - i)));
        const __m512i index = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, q + i));
        const __m512 code =
            _mm512_mask_i32gather_ps(_mm512_setzero_ps(), mask, index, w.nested_code, 4);
        _mm512_mask_storeu_ps(out + i, mask, _mm512_add_ps(_mm512_mul_ps(code, scale), offset));
      }
      i = stop;
    }
    return;
  }
#endif
  load_absmax(w, first, count, out);
}

// Bytes that a stream of weights asks for in advance. Rows follow one another in memory, and the
// window of out-of-order execution holds a dozen cache lines: too few for main memory's latency.
constexpr int64_t kStreamAhead = 2048;

// Where a row begins in a pair of rows tiles, and in the two by two tiles of a product.
inline const uint32_t* row_of(const uint32_t* rows, int64_t row) {
  return rows + row / kSide * kTile + row % kSide * kSide;
}
inline float* row_of(float* c, int64_t row) {
  return c + row / kSide * 2 * kTile + row % kSide * kSide;
}

// Asks for the scales and zeros, as they are stored, of `count` weights that are needed soon. gcc
// drops calls of functions that only prefetch, as if they had no effect: they must be inlined.
[[gnu::always_inline]] inline void prefetch_scales(const NF4View& w, int64_t element,
                                                   int64_t count) {
  const int log2 = w.blocksize_log2(), size = w.float_scales() ? 4 : 1;
  const int64_t begin = element >> log2, end = min64((element + count) >> log2, w.nblocks());
  const char* scales = static_cast<const char*>(w.absmax);
  for (int64_t i = begin * size; i < end * size; i += 64) __builtin_prefetch(scales + i, 0, 2);
  for (int64_t i = begin; w.zero && i < end; i += 16) __builtin_prefetch(w.zero + i, 0, 2);
}

// Asks for the lines of p to p + bytes. Inlined for the same reason.
[[gnu::always_inline]] inline void prefetch_lines(const void* p, int64_t bytes) {
  for (int64_t i = 0; i <= bytes; i += 64) {
    __builtin_prefetch(static_cast<const char*>(p) + i, 0, 2);
  }
}

// The scales of a run of blocks, read from the weight or from an expanded copy.
struct Absmax {
  const float* values;
  int64_t first;  // block that values[0] belongs to
  int log2;       // of the block size
  // What each byte of a scale makes of codes, where a Math has tables of that: no values then.
  const uint8_t* of_bytes = nullptr;
  const float* of(int64_t element) const { return values + ((element >> log2) - first); }
  float at(int64_t element) const { return *of(element); }
};

// The absmax of `count` elements from `element` on, expanded to `values` unless the weight holds
// float32 or there are tables of its bytes.
inline Absmax expand_rows(const NF4View& w, int64_t element, int64_t count, float* values,
                          const uint8_t* of_bytes = nullptr) {
  const int log2 = w.blocksize_log2();
  if (of_bytes) return {nullptr, 0, log2, of_bytes};
  if (w.float_scales()) return {static_cast<const float*>(w.absmax), 0, log2};
  const int64_t first = element >> log2, last = (element + count - 1) >> log2;
  expand_absmax(w, first, last - first + 1, values);
  return {values, first, log2};
}

// The absmax of each piece's weight.
class WaveAbsmax {
 public:
  WaveAbsmax(const NF4PieceArgs& args, const NF4Wave& wave, const uint8_t* of_bytes = nullptr)
      : args_(args),
        wave_(wave),
        of_bytes_(of_bytes),
        blocks_(args.w.float_scales() || of_bytes ? 0 : args.N * args.K / args.w.blocksize + 2),
        expanded_(wave.count * blocks_ * 4) {
    constexpr int64_t kChunk = 1 << 14;
    const int64_t chunks = ceil_div(blocks_, kChunk);
    parallel_for(args.threads, wave.count * chunks, [&](int64_t t, int) {
      const int64_t i = t / chunks, begin = t % chunks * kChunk;
      const int64_t first = first_block(i) + begin;
      const int64_t count = min64(min64(kChunk, blocks_ - begin), args.w.nblocks() - first);
      if (count > 0) expand_absmax(args.w, first, count, expanded(i) + begin);
    });
  }
  Absmax of(int64_t i) const {
    const int log2 = args_.w.blocksize_log2();
    if (of_bytes_) return {nullptr, 0, log2, of_bytes_};
    if (args_.w.float_scales()) return {static_cast<const float*>(args_.w.absmax), 0, log2};
    return {expanded(i), first_block(i), log2};
  }

 private:
  int64_t first_block(int64_t i) const {
    return wave_.pieces[i].weight * args_.K >> args_.w.blocksize_log2();
  }
  float* expanded(int64_t i) const { return expanded_.floats() + i * blocks_; }

  const NF4PieceArgs& args_;
  const NF4Wave& wave_;
  const uint8_t* of_bytes_;
  int64_t blocks_;
  Scratch expanded_;
};

// The piece that a row of the wave's packed rows belongs to; where it pads, the one before.
inline const NF4Piece& piece_of(const NF4Wave& wave, int64_t row) {
  int64_t low = 0, high = wave.count;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (wave.pieces[middle].start <= row ? low : high) = middle;
  }
  return wave.pieces[low];
}

inline int64_t source_row(const NF4PieceArgs& args, int64_t row) {
  return args.rows ? args.rows[row] : row;
}

inline float weight_at(const NF4View& w, const Absmax& absmax, int64_t element, DType dtype) {
  const int shift = (element & 1) == (w.low_first() ? 1 : 0) ? 4 : 0;
  const float code = codes_of(w)[w.packed[element >> 1] >> shift & 15];
  const float zero = w.zero ? w.zero[element >> absmax.log2] : 0.0f;
  float scale;
  if (absmax.of_bytes) {
    load_absmax(w, element >> absmax.log2, 1, &scale);
  } else {
    scale = absmax.at(element);
  }
  const float value = (code - zero) * scale;
  return dtype == DType::kBFloat16 ? float_from_bf16(bf16_from_float(value)) : value;
}

// Asks for the rows of a strip in the order of memory, a line of 128 weights at a time, while
// others are decoded in the order of tiles: memory is fast where it is read in order.
class RowsAhead {
 public:
  RowsAhead(const NF4View& w, const Absmax& absmax, int64_t element, int64_t columns, int64_t K)
      : w_(w), absmax_(absmax), element_(element), columns_(columns), K_(K) {}
  void next() {
    __builtin_prefetch(w_.packed + (element_ + at_) / 2, 0, 2);
    if (at_ == 0) {
      const int64_t block = element_ >> absmax_.log2, blocks = (columns_ - 1) >> absmax_.log2;
      if (absmax_.of_bytes) {
        prefetch_lines(static_cast<const uint8_t*>(w_.absmax) + block, blocks);
      } else {
        prefetch_lines(absmax_.of(element_), blocks * 4);
      }
      if (w_.zero) prefetch_lines(w_.zero + block, blocks * 4);
    }
    at_ += 128;
    if (at_ >= columns_) at_ = 0, element_ += K_;
  }

 private:
  const NF4View& w_;
  const Absmax absmax_;
  int64_t element_, columns_, K_, at_ = 0;
};

// float32 arithmetic: scalar, AVX2 and AVX-512. bfloat16 input is widened; the weights take the
// values they have in the input's type.
struct Float32Math {
  static constexpr int64_t kStep = 16;     // elements of the reduction in a tile
  static constexpr int64_t kOrder = 16;    // elements that may come in an order of their own
  static constexpr int64_t kBlock = 128;   // elements of the reduction decoded at a time
  static constexpr int64_t kColumns = 16;  // lanes that come in an order of their own

  static constexpr bool kOverlaps = false;  // whether products leave room for decoding
  struct Session {};                        // nothing to set up per thread
  struct ByteTables {                       // none
    explicit ByteTables(const NF4View&) {}
    const uint8_t* get() const { return nullptr; }
  };

  static void load_dwords(const void* in, DType dtype, int64_t i, int64_t n, uint32_t* out) {
    if (n <= 0) {
      std::memset(out, 0, 64);
      return;
    }
    const F32x16 x = load_any(in, dtype, i, static_cast<int>(min64(n, 16)));
    f32_store(reinterpret_cast<float*>(out), x);
  }

  static void load_ordered(const void* in, DType dtype, int64_t i, int64_t n, bool, uint32_t* out) {
    load_dwords(in, dtype, i, n, out);
  }

  // n weights from `element` on, sixteen at a time to target(0), target(1), ...; the last group is
  // zero-padded.
  template <class Target>
  static void decode(const NF4View& w, const Absmax& absmax, int64_t element, int64_t n,
                     DType dtype, const Target& target) {
    const BlockTables tables(w, dtype);
    const NibbleOrder order = nibble_order(w.low_first());
    for (int64_t i = 0; i < n;) {
      if (element % 16 == 0 && n - i >= 16) {
        const int64_t stop = min64(n - 15, i + w.blocksize - ((element + i) & (w.blocksize - 1)));
        const int64_t block = (element + i) >> absmax.log2;
        const F32x16 table = tables.of(block, absmax.at(element + i));
        for (; i < stop; i += 16) {
          f32_store(reinterpret_cast<float*>(target(i / 16)),
                    f32_lookup(w.packed + (element + i) / 2, table, order));
        }
        continue;
      }
      float values[16] = {};
      for (int64_t j = 0; j < min64(16, n - i); ++j) {
        values[j] = weight_at(w, absmax, element + i + j, dtype);
      }
      std::memcpy(target(i / 16), values, 64);
      i += 16;
    }
  }

  // At most a pair of rows tiles: n columns of rows that are K apart, as pairs `stride` dwords
  // apart; before(row) comes first.
  template <class Before>
  static void decode_rows(const NF4View& w, const Absmax& absmax, int64_t element, int64_t K,
                          int64_t rows, int64_t n, DType dtype, uint32_t* out, int64_t stride,
                          const Before& before) {
    for (int64_t i = 0; i < rows; ++i) {
      before(i);
      uint32_t* line = out + i * kSide;
      decode(w, absmax, element + i * K, n, dtype, [=](int64_t j) { return line + j * stride; });
    }
  }

  // Rows [n0, n0 + rows) x columns [k0, k0 + 128) as lanes tiles, pairs `stride` dwords apart.
  static void decode_lanes(const NF4View& w, const Absmax& absmax, RowsAhead& ahead, int64_t K,
                           int64_t n0, int64_t rows, int64_t k0, DType dtype, uint32_t* out,
                           int64_t stride) {
    const int64_t columns = min64(128, K - k0);
    for (int64_t i = 0; i < round_up(rows, 16); ++i) {
      uint32_t* line = out + i / 16 * kPair + i % 16 * 16;
      const auto target = [=](int64_t j) { return line + j / 2 * stride + j % 2 * kTile; };
      const int64_t valid = i < rows ? columns : 0;
      if (valid > 0) {
        ahead.next();
        decode(w, absmax, (n0 + i) * K + k0, valid, dtype, target);
      }
      for (int64_t j = ceil_div(valid, 16); j < 8; ++j) std::memset(target(j), 0, 64);
    }
  }

  static void arrange(float* const[4], bool) {}  // lanes are in order

  // C[a][b] (+)= rows tile a x lanes tile b for the first `count` rows, summed over `steps` pairs
  // of tiles; each block's sum starts at zero, which keeps the rounding error of long reductions
  // down.
  template <int kB>
  static void multiply(const uint32_t* rows, const uint32_t* lanes, float* c, int64_t steps,
                       bool first, int64_t count) {
#if defined(__AVX512F__)
    constexpr int kRows = 8, kLanes = kB;
#else
    constexpr int kRows = 4, kLanes = 1;
#endif
    for (int64_t row = 0; row < count; row += kRows) {
      for (int b = 0; b < kB; b += kLanes) {
        const uint32_t* right = lanes + b * kTile;
        if (count - row > kRows / 2) {
          multiply_part<kRows, kLanes>(row_of(rows, row), right, row_of(c, row) + b * kTile, steps,
                                       first);
        } else {
          multiply_part<kRows / 2, kLanes>(row_of(rows, row), right, row_of(c, row) + b * kTile,
                                           steps, first);
        }
      }
    }
  }

  template <int kRows, int kLanes>
  static void multiply_part(const uint32_t* rows, const uint32_t* lanes, float* c, int64_t steps,
                            bool first) {
    F32x16 acc[kRows][kLanes];
    for (auto& row : acc) {
      for (F32x16& sum : row) sum = f32_zero();
    }
    for (int64_t t = 0; t < steps; ++t, rows += kPair, lanes += kPair) {
      for (int k = 0; k < 16; ++k) {
        F32x16 x[kLanes];
        for (int b = 0; b < kLanes; ++b) {
          x[b] = f32_load(reinterpret_cast<const float*>(lanes + b * kTile + k * 16));
        }
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
          const F32x16 y = f32_set1(bits_float(rows[i * 16 + k]));
          for (int b = 0; b < kLanes; ++b) acc[i][b] = f32_fma(y, x[b], acc[i][b]);
        }
      }
    }
    for (int i = 0; i < kRows; ++i) {
      for (int b = 0; b < kLanes; ++b) {
        float* sum = c + b * kTile + i * 16;
        f32_store(sum, first ? acc[i][b] : f32_add(f32_load(sum), acc[i][b]));
      }
    }
  }
};

}  // namespace
}  // namespace peftkern
