// NF4 matrix products: argument checks.
#include "peftkern/nf4_lora_linear.h"

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "peftkern/checks.h"

namespace peftkern {
namespace {

void validate(const NF4LinearArgs& args) {
  require(args.dtype != DType::kFloat16, "dtype: expected float32 or bfloat16");
  require(args.threads >= 1, "threads: expected at least 1");
  require(args.N >= 1 && args.K >= 1, "weight: expected at least one row and one column");
  const int64_t numel = checked_mul(args.N, args.K, "weight: N x K");
  require(args.w.numel == numel, "weight: numel", args.w.numel, numel, "values of N x K");
  // Twice what any address or padded copy needs, so that no later size can overflow.
  checked_mul(checked_mul(args.M, args.K, "x: M x K"), 64, "x: bytes");
  checked_mul(checked_mul(args.M, args.N, "y: M x N"), 64, "y: bytes");
  checked_mul(checked_mul(args.r, args.N, "lora_B: N x r"), 64, "lora_B: bytes");
  checked_mul(checked_mul(args.r, args.K, "lora_A: r x K"), 64, "lora_A: bytes");
  checked_mul(checked_mul(args.r, args.M, "s: M x r"), 64, "s: bytes");
  validate(args.w);
  validate_rows(args.w, args.K);
  require(args.M == 0 || (args.in && args.out), "in, out: null pointer");
  require(args.M * args.r == 0 || (args.s && args.factor), "s, lora: null pointer");
  const auto agrees = [&](const auto* adapter, const float* s) {
    return !adapter ||
           (adapter->M == args.M && adapter->K == args.K && adapter->r == args.r && s == args.s);
  };
  require(agrees(args.shrink, args.shrink ? args.shrink->s : nullptr) &&
              agrees(args.gradients, args.gradients ? args.gradients->ds : nullptr),
          "shrink, gradients: expected the M, K, r and s of the product");
}

const NF4LinearKernels& products(Isa isa, DType dtype) {
  const CpuKernels& kernels = kernels_for(isa);
  return dtype == DType::kBFloat16 ? kernels.nf4_linear_bf16 : kernels.nf4_linear;
}

constexpr int64_t kForwardRows = 512;  // rows of x in a piece: what is packed of it and the sums of
constexpr int64_t kBackwardRows = 1024;          // a panel have to stay in the second-level cache
constexpr int64_t kWaveRows = 2048;              // packed rows of a call, unless one piece has more
constexpr int64_t kWaveBlocks = 4 << 20;         // scales that a call expands, likewise
constexpr int64_t kPairRows = 32, kFewRows = 8;  // what rows are packed by, in panels or few

// The kernels for few rows read 64 weights from a multiple of 64 on, of one block, or where there
// are such kernels of shorter ones, of any codes or of those that bfloat16 holds; other weights go
// through panels.
bool whole_groups(const NF4LinearKernels& kernels, const NF4PieceArgs& args) {
  const bool one = args.w.blocksize >= 64 && !args.w.zero;
  const bool codes = kernels.any_codes || args.w.low_first();
  return args.K % 64 == 0 && (one || (kernels.short_blocks && codes));
}

// Rows at the end of a group that go to the kernels for few rows: all of a small one, and of
// forward a small rest.
int64_t few_of(const NF4LinearKernels& kernels, NF4Product product, const NF4PieceArgs& args,
               int64_t M) {
  if (!whole_groups(kernels, args)) return 0;
  if (M <= args.few_rows) return M;
  const int64_t rest = M % kPairRows;
  return product == NF4Product::kForward && rest <= args.few_rows / 2 ? rest : 0;
}

void run(NF4LinearKernels::Product kernel, const NF4PieceArgs& args, int64_t pad,
         std::vector<NF4Piece> pieces) {
  std::stable_sort(pieces.begin(), pieces.end(),
                   [](const NF4Piece& a, const NF4Piece& b) { return a.M > b.M; });
  const int64_t blocks = !args.w.float_scales() ? args.N * args.K / args.w.blocksize : 0;
  for (size_t first = 0, end = 0; first < pieces.size(); first = end) {
    int64_t rows = 0;
    while (end < pieces.size()) {
      const int64_t padded = (pieces[end].M + pad - 1) / pad * pad;
      const int64_t count = static_cast<int64_t>(end - first) + 1;
      const bool other = pieces[first].M > kPairRows && pieces[end].M <= kPairRows;
      if (count > 1 && (rows + padded > kWaveRows || count * blocks > kWaveBlocks || other)) break;
      pieces[end++].start = rows;
      rows += padded;
    }
    kernel(args, {&pieces[first], static_cast<int64_t>(end - first), rows});
  }
}

// A call without groups: one of all rows.
void whole(Isa isa, NF4Product product, const NF4LinearArgs& args) {
  NF4PieceArgs pieces;
  static_cast<NF4LinearArgs&>(pieces) = args;
  pieces.out_dtype = args.dtype;
  const NF4Piece group{0, args.M};
  nf4_groups(isa, product, pieces, &group, 1);
}

}  // namespace

void nf4_groups(Isa isa, NF4Product product, const NF4PieceArgs& args, const NF4Piece* groups,
                int64_t count) {
  const NF4LinearKernels& kernels = products(isa, args.dtype);
  const bool backward = product == NF4Product::kBackward;
  std::vector<NF4Piece> panels, few;
  for (const NF4Piece* g = groups; g < groups + count; ++g) {
    const int64_t rest = few_of(kernels, product, args, g->M),
                  most = backward ? kBackwardRows : kForwardRows;
    for (int64_t m = 0; m < g->M - rest; m += most) {
      panels.push_back({g->first + m, std::min(most, g->M - rest - m), g->weight});
    }
    if (rest > 0) few.push_back({g->first + g->M - rest, rest, g->weight});
  }
  run(backward ? kernels.backward_panels : kernels.forward_panels, args, kPairRows,
      std::move(panels));
  run(backward ? kernels.backward_few : kernels.forward_few, args, kFewRows, std::move(few));
}

void nf4_lora_linear_forward(Isa isa, const NF4LinearArgs& args) {
  kernels_for(isa);  // which refuses one that is not here, before anything else
  validate(args);
  if (args.shrink && args.r > 0) lora_shrink(isa, *args.shrink);
  whole(isa, NF4Product::kForward, args);
}

void nf4_lora_linear_backward(Isa isa, const NF4LinearArgs& args) {
  kernels_for(isa);
  validate(args);
  if (args.gradients) lora_backward(isa, *args.gradients);
  if (args.M == 0) return;
  if (!args.gradients || !args.gradients->keep) {
    whole(isa, NF4Product::kBackward, args);
    return;
  }
  NF4LinearArgs frozen = args;
  frozen.r = 0;
  whole(isa, NF4Product::kBackward, frozen);
  LoraExpandArgs expand;
  expand.M = args.M, expand.K = args.K, expand.r = args.r;
  expand.dtype = args.dtype, expand.threads = args.threads;
  expand.keep = args.gradients->keep, expand.scale = args.gradients->keep_scale;
  expand.s = args.s, expand.a = args.factor, expand.y = args.out;
  lora_expand(isa, expand);
}

}  // namespace peftkern
