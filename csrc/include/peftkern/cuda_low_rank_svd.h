// SVD of many small matrices on a CUDA device: launch signatures. As in cuda_nf4.h, pointers are
// the device's, a launch neither waits nor allocates, bad sizes throw std::invalid_argument, and
// what comes back is the launch's cudaError_t as an int.
#pragma once

#include <cstdint>

#include "peftkern/cuda_nf4.h"

namespace peftkern {

inline constexpr int64_t kCudaJacobiRank = 128;  // at most

// As JacobiSvdArgs of low_rank_svd.h, and the matrices need not be finite: where one is not, sigma
// and vectors are NaN and info is -1. Any scale: a power of two makes the largest entry about one.
struct CudaJacobiSvdArgs {
  const double* cores = nullptr;  // [count, r, r]
  int64_t count = 0, r = 0;
  int sweeps = 0;           // at most
  double* sigma = nullptr;  // [count, r], descending
  double* left = nullptr;   // [count, r, r], or null together with `right`: values only
  double* right = nullptr;  // [count, r, r]
  int64_t* info = nullptr;  // [count]: pairs of columns that the last sweep found not orthogonal
  double* workspace = nullptr;
  int64_t workspace_len = 0;
  int64_t shared_limit = 0;  // bytes that a block may take; 0: what the device has
};
int cuda_jacobi_svd(const CudaJacobiSvdArgs& args, CudaStream stream);

// Pivoted Cholesky decomposition of finite Gram matrices: factorize() of low_rank_svd.h. gram = D
// root^T root D with D = diag(norms), and a factor times its inverse has orthonormal columns; rows
// of root and columns of inverse are zero from the rank on.
struct CudaGramRootsArgs {
  const double* grams = nullptr;  // [count, r, r]
  int64_t count = 0, r = 0;
  double* roots = nullptr;      // [count, r, r]
  double* inverses = nullptr;   // [count, r, r]
  double* norms = nullptr;      // [count, r]
  double* workspace = nullptr;  // as with vectors
  int64_t workspace_len = 0;
  int64_t shared_limit = 0;
};
int cuda_gram_roots(const CudaGramRootsArgs& args, CudaStream stream);

// Doubles of workspace for each matrix, on the current device: what its shared memory cannot hold.
int64_t cuda_jacobi_workspace(int64_t r, bool vectors, int64_t shared_limit);

}  // namespace peftkern
