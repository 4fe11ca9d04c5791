// Singular values and vectors of scaling * B A, B [m, r] and A [r, n], without forming it: three
// steps over many pairs of one rank, each alone or all in one call. Torch-free.
//
// With Gram matrices in float64, B = Q_B R_B and A^T = Q_A R_A by a pivoted Cholesky decomposition:
// the core C = scaling R_B R_A^T is r x r, C = L diag(sigma) R^T, U = Q_B L, V = Q_A R.
//
// Bytes: both factors are read twice, the second time from a cache where `low_rank_svd` takes a few
// pairs at a time, U and V written once, 4 B per element each in float32. FLOPs per element: r for
// the Gram matrix (half of it is mirrored), 2 r to rotate, all in float64.
#pragma once

#include "peftkern/base.h"
#include "peftkern/isa.h"

namespace peftkern {

struct LowRankPair {
  const void* b = nullptr;  // [m, r]
  const void* a = nullptr;  // [r, n]
  DType b_dtype = DType::kFloat32, a_dtype = DType::kFloat32;
  int64_t m = 0, n = 0;
  // Where step 3 writes, k = min(r, m, n): U [m, k] and Vh [k, n], both null for the singular
  // values alone, and S [k].
  float* u = nullptr;
  float* s = nullptr;
  float* vh = nullptr;
};

// Step 1. Per pair: the core, and how to get from the factors to Q_B and Q_A.
struct LowRankCoresArgs {
  const LowRankPair* pairs = nullptr;
  int64_t count = 0, r = 0;
  const double* scaling = nullptr;  // [count]
  bool second_pass = true;          // where the condition number asks for it
  int threads = 1;
  double* cores = nullptr;    // [count, r, r], divided by `scale`; zero past the factors' ranks
  double* inverse = nullptr;  // [count, 2, r, r]: Q_B = B inverse[0], Q_A = A^T inverse[1]
  double* scale = nullptr;    // [count]
  double* floor = nullptr;    // [count]: singular values of a core up to this are rounding errors
  int64_t* info = nullptr;    // [count]: -1 where anything is NaN or Inf (the core is 0), or 0
};
void low_rank_cores(Isa isa, const LowRankCoresArgs& args);

// Step 2. Singular values, descending, and vectors (columns) of finite r x r matrices.
struct JacobiSvdArgs {
  const double* cores = nullptr;  // [count, r, r]
  int64_t count = 0, r = 0;
  int sweeps = 0;  // at most
  int threads = 1;
  double* sigma = nullptr;  // [count, r]
  double* left = nullptr;   // [count, r, r], or null together with `right`: values only
  double* right = nullptr;  // [count, r, r]
  int64_t* info = nullptr;  // [count]: pairs of columns that the last sweep found not orthogonal
};
void jacobi_svd(Isa isa, const JacobiSvdArgs& args);

// Step 3. U = B inverse[0] left, S = scale sigma and Vh = (inverse[1] right)^T A, zero from `rank`
// on: the numerical rank, singular values above `floor`. All are NaN where info is -1.
struct LowRankResultsArgs {
  const LowRankPair* pairs = nullptr;
  int64_t count = 0, r = 0;
  const double* inverse = nullptr;  // [count, 2, r, r]
  const double* left = nullptr;     // [count, r, r], or null together with `right`: values only
  const double* right = nullptr;    // [count, r, r]
  const double* sigma = nullptr;    // [count, r], descending
  const double* scale = nullptr;    // [count]
  const double* floor = nullptr;    // [count]
  int threads = 1;
  bool stream = false;      // past the caches, which the results do not fit in
  int64_t* rank = nullptr;  // [count]
  int64_t* info = nullptr;  // [count]: -2 instead of 0 where a value of S is no normal float32
};
void low_rank_results(Isa isa, const LowRankResultsArgs& args);

// All three. The bits are those of the steps.
struct LowRankSvdArgs {
  const LowRankPair* pairs = nullptr;
  int64_t count = 0, r = 0;
  const double* scaling = nullptr;  // [count]
  bool second_pass = true, vectors = true, stream = false;
  int sweeps = 0, threads = 1;
  int64_t* rank = nullptr;  // [count]
  int64_t* info = nullptr;  // [count]
};
void low_rank_svd(Isa isa, const LowRankSvdArgs& args);

// One factor as the kernels see it: B has `length` rows of r, A (`wide`) r rows of `length`.
struct LowRankFactor {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t length = 0, r = 0;
  bool wide = false;
};

// Leading dimension of matrices that kernels fill with whole vectors.
inline constexpr int64_t kLowRankPad = 16;

}  // namespace peftkern
