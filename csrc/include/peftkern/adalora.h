// AdaLoRA on the CPU: importance of every triplet (lora_E[j], lora_A[j, :], lora_B[:, j]) of all
// layers in one pass, the global budget, and the orthogonality penalty. Torch-free.
//
//   I = |w g|;  ipt = beta1 ipt + (1 - beta1) I;  unc = beta2 unc + (1 - beta2) |I - ipt|
//   score_j = s(E_j) + mean_k s(A_jk) + mean_n s(B_nj),  s = ipt unc
//
// Bytes per float32 element: 16 read (w, g, ipt, unc), 8 written. Products and sums of the EMAs are
// rounded one after the other, as torch rounds them; sums of s are float32 within a lane of a chunk
// and double beyond, in an order that depends on the shapes alone.
#pragma once

#include <vector>

#include "peftkern/base.h"
#include "peftkern/isa.h"

namespace peftkern {

// lora_E[r], lora_A[r, K], lora_B[N, r] of one layer, contiguous.
struct Triplets {
  void* lora_E = nullptr;
  const void* lora_A = nullptr;
  const void* lora_B = nullptr;
  const void* grad_E = nullptr;  // null: zero
  const void* grad_A = nullptr;
  const void* grad_B = nullptr;
  int64_t r = 0, K = 0, N = 0;
};

// The share of one layer that one thread takes: rows [begin, end) of lora_A together with those
// elements of lora_E, or rows of lora_B. `sums` is the caller's: score per row, or per column.
struct ImportanceTask {
  int64_t layer = 0;
  bool columns = false;  // of lora_B
  int64_t begin = 0, end = 0;
  int64_t state = 0;  // where in ipt and unc the layer begins: E, A, B follow one another
  double* sums = nullptr;
};

struct ImportanceArgs {
  const Triplets* layers = nullptr;
  int64_t count = 0;
  DType dtype = DType::kFloat32;  // of parameters and gradients
  float* ipt = nullptr;           // [sum of r + r K + N r]
  float* unc = nullptr;
  int64_t state_len = 0;
  double beta1 = 0.85, beta2 = 0.85;
  float* scores = nullptr;  // [sum of r]
  int64_t scores_len = 0;
  int threads = 1;
};
void adalora_importance(Isa isa, const ImportanceArgs& args);

// Writes keep[count] and zeroes the elements of lora_E (of which only E, r and the size of `dtype`
// matter here) that are not kept. keep[i] = 1 for the `budget` best of scores[count]: by score,
// then by lower index; NaN comes first. `threshold_ties`: only what is greater than the best score
// that is not among them (none is then pruned if nothing has to be), unless all scores are zero.
void adalora_allocate(const float* scores, int64_t count, int64_t budget, bool threshold_ties,
                      const std::vector<Triplets>& layers, DType dtype, uint8_t* keep);

// Gram matrices: |X X^T - I|_F of rows (lora_A) or |X^T X - I|_F of columns (lora_B).
struct GramMatrix {
  const void* x = nullptr;
  int64_t r = 0, length = 0;  // of the vectors whose products it holds
  bool columns = false;       // x[length, r] instead of x[r, length]
  float* residual = nullptr;  // [r, r]: Gram - I; written by forward, read by backward
  void* grad = nullptr;       // backward only: scale residual x, or x residual; like x
  double scale = 0.0;
};

struct GramArgs {
  const GramMatrix* matrices = nullptr;
  int64_t count = 0;
  DType dtype = DType::kFloat32;
  double* norms = nullptr;  // [count]: sum of squares of the residual; forward only
  int threads = 1;
};
void adalora_gram(Isa isa, const GramArgs& args);
void adalora_gram_backward(Isa isa, const GramArgs& args);

}  // namespace peftkern
