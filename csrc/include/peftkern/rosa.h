// RoSA's products with a sparse matrix S on the CPU: y += x S^T, and the gradient of S's values at
// the places that S has. Torch-free.
//
//   spmm   y[t, n] += sum over entries (n, k) of values[n, k] x[t, k]
//   sddmm  values[n, k] = sum over t of dy[t, n] x[t, k]   for the entries (n, k) alone
//
// Entries run along T: sixteen rows of x at a time are transposed to a panel in float32, one, two
// or four vectors to a column, so that an entry is one fused multiply-add per vector, whose load
// comes from the L2 cache. The same 2 T nnz FLOP as a dense product has per element, at one load
// each: 64 B of L2 per 16 multiply-adds, against a dense product's registers. Memory: x once per
// call, y once, 8 bytes per entry (a value, a 32-bit index) for each panel of up to 64 rows of x;
// with one row of x those 8 bytes are all there is to wait for.
//
// y is read and written once, rounded once; sums are float32 in an order that depends on T and on S
// alone. Every index is checked before it is used, in every call: the tensors that hold them may
// have been written to since the last one.
#pragma once

#include "peftkern/base.h"
#include "peftkern/isa.h"

namespace peftkern {

// [rows, columns] in compressed rows: the entries of row i are [starts[i], starts[i + 1]).
struct SparseMatrix {
  const void* starts = nullptr;  // [rows + 1], int32, or int64 if `wide`
  const void* index = nullptr;   // [nnz], the column of each entry; of the same type
  bool wide = false;
  int64_t rows = 0, columns = 0, nnz = 0;
};

struct SpmmArgs {
  SparseMatrix s;
  const float* values = nullptr;  // [nnz]
  const void* order = nullptr;    // [nnz]: entry j has values[order[j]]; null: values[j]
  const void* x = nullptr;        // [T, columns]
  void* y = nullptr;              // [T, rows]
  int64_t T = 0;
  DType dtype = DType::kFloat32;  // of x and y
  int threads = 1;
};
void rosa_spmm(Isa isa, const SpmmArgs& args);

struct SddmmArgs {
  SparseMatrix s;
  const void* dy = nullptr;  // [T, rows]
  const void* x = nullptr;   // [T, columns]
  float* values = nullptr;   // [nnz], written
  int64_t T = 0;
  DType dtype = DType::kFloat32;  // of dy and x
  int threads = 1;
};
void rosa_sddmm(Isa isa, const SddmmArgs& args);

}  // namespace peftkern
