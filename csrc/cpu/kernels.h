// The kernels of one instruction set. Each isa_*.cpp exports one table of them, and is the only
// file that is compiled for its instruction set; the rest is chosen and called through here.
#pragma once

#include "nf4_pieces.h"
#include "peftkern/adalora.h"
#include "peftkern/dora.h"
#include "peftkern/gram_product.h"
#include "peftkern/grouped_linear.h"
#include "peftkern/isa.h"
#include "peftkern/lora_linear.h"
#include "peftkern/low_rank_svd.h"
#include "peftkern/rosa.h"
#include "peftkern/swiglu.h"

namespace peftkern {

// Serial, over element ranges that start at a multiple of 128.
struct NF4Kernels {
  // [begin, end) starts at a multiple of the block size; writes those packed bytes and absmax.
  void (*quantize)(const void* src, DType dtype, int64_t begin, int64_t end, int64_t blocksize,
                   uint8_t* packed, float* absmax);
  // load_absmax.
  void (*scales)(const NF4View& w, int64_t first, int64_t count, float* out);
  // `absmax` holds the blocks from begin / blocksize on; `stream` allows non-temporal stores.
  void (*dequantize)(const NF4View& w, const float* absmax, int64_t begin, int64_t end, void* out,
                     DType dtype, bool stream);
};

struct NF4LinearKernels {
  using Product = void (*)(const NF4PieceArgs& args, const NF4Wave& wave);
  Product forward_panels, backward_panels;
  Product forward_few, backward_few;  // null in tables of bfloat16: those of float32 for AVX-512
  bool short_blocks;                  // few rows of blocks shorter than 64, and of ones with zeros
  bool any_codes = false;             // such blocks of NF4 and FP4, too
};

struct LoraKernels {
  void (*shrink)(const LoraShrinkArgs& args);
  void (*expand)(const LoraExpandArgs& args);
  void (*outer)(const LoraOuterArgs& args);
};

struct GroupedKernels {
  void (*linear)(const GroupedLinearArgs& args, const GroupedPlan& plan);
  void (*outer)(const GroupedOuterArgs& args, const GroupedPlan& plan);
};

// Serial, over rows [begin, end).
struct SwigluKernels {
  void (*forward)(const SwigluArgs& args, int64_t begin, int64_t end);
  void (*backward)(const SwigluBackwardArgs& args, int64_t begin, int64_t end);
};

struct DoraKernels {
  void (*norm)(const DoraNormArgs& args);
};

struct GramProductKernels {
  void (*run)(const GramProductArgs& args);
};

// Serial. `scratch` is scratch_doubles(r) long.
struct LowRankKernels {
  int64_t (*scratch_doubles)(int64_t r);
  // partial [ld, ld], ld = r rounded up to kLowRankPad: the upper triangle of the Gram matrix of
  // rows [begin, end) of the factor, or of the factor times `inverse` where that is given.
  void (*gram)(const LowRankFactor& factor, int64_t begin, int64_t end, const double* inverse,
               double* partial, double* scratch);
  // gram = D root^T root D with D = diag(norms); B inverse has orthonormal columns. All [r, r]; the
  // rows of root and the columns of inverse are zero from the returned rank on.
  int64_t (*factorize)(const double* gram, int64_t r, double* root, double* inverse, double* norms,
                       double* kappa, double* scratch);
  // c [r, r] = a b^T, or a b.
  void (*product)(const double* a, const double* b, bool transposed, int64_t r, double* c);
  // t [r, ld] = inverse times the first k columns of w; columns from `rank` on are zero.
  void (*combine)(const double* inverse, const double* w, int64_t r, int64_t rank, double* t,
                  double* scratch);
  // Rows [begin, end) of B t, or those columns of t^T A; `out` is the whole [length, k] or [k, n];
  // `stream` allows non-temporal stores.
  void (*rotate)(const LowRankFactor& factor, int64_t begin, int64_t end, const double* t,
                 int64_t k, bool stream, float* out, double* scratch);
  int64_t lanes;  // matrices that jacobi takes at once
  // jacobi_svd of matrices [first, first + count), count <= lanes.
  void (*jacobi)(const JacobiSvdArgs& args, int64_t first, int64_t count, double* scratch);
};

struct AdaLoraKernels {
  void (*importance)(const ImportanceArgs& args, const ImportanceTask* tasks, int64_t count);
  void (*gram)(const GramArgs& args);
  void (*gram_backward)(const GramArgs& args);
};

struct RosaKernels {
  void (*spmm)(const SpmmArgs& args);  // order is null
  void (*sddmm)(const SddmmArgs& args);
};

// The table of an instruction set with bfloat16 products holds those alone, with all else null:
// kernels_for takes the rest from AVX-512's.
struct CpuKernels {
  NF4LinearKernels nf4_linear_bf16 = {};  // bfloat16 activations
  GroupedKernels grouped_bf16 = {};       // the same
  NF4LinearKernels nf4_linear = {};       // float32
  GroupedKernels grouped = {};            // and other types
  NF4Kernels nf4 = {};
  LoraKernels lora = {};
  DoraKernels dora = {};
  LowRankKernels low_rank = {};
  AdaLoraKernels adalora = {};
  RosaKernels rosa = {};
  SwigluKernels swiglu = {};
  GramProductKernels gram_product = {};
};

// Defined where the instruction set is built.
extern const CpuKernels kScalarKernels, kAvx2Kernels, kAvx512Kernels, kAvx512Bf16Kernels,
    kAmxBf16Kernels;

// The complete table; throws std::invalid_argument unless the instruction set is available here.
const CpuKernels& kernels_for(Isa isa);

}  // namespace peftkern
