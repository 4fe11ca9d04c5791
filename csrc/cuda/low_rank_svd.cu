// Small dense algebra of the low-rank SVD in float64, a thread block for each r x r matrix, r <=
// 128: SVD by one-sided Jacobi, and pivoted Cholesky of Gram matrices. jacobi.h has the formulas,
// and csrc/cpu/low_rank_svd_kernels.h takes the same steps.
//
// QR with column pivots, C^T = X Q^T with X = R^T in C's column order; rotations of the columns of
// X and Q until those of X are orthogonal: X V = right diag(sigma), left = Q V; sort; sign. A round
// rotates r / 2 disjoint pairs, each by 4 (r <= 16) or 8 lanes; a sweep has r - 1 rounds. A round
// of an H200's SM: the chain load, product, shuffles, roots, quotients, store, barrier 1000 clocks;
// memory 64 (r = 16), 1024 (64), 4600 (128): 224 matrices take 0.06, 0.6 to 1, and 7 ms.
// Counted, not measured.
#include <math.h>

#include "intrinsics.cuh"
#include "launch.cuh"
#include "peftkern/checks.h"
#include "peftkern/cuda_low_rank_svd.h"
#include "peftkern/jacobi.h"

namespace peftkern {
namespace {

__host__ __device__ constexpr int lanes_for(int rank) { return rank <= 16 ? 4 : 8; }
__host__ __device__ constexpr int threads_for(int rank) {  // also one for each row of [X; Q]
  return ((rank + 1) / 2 * lanes_for(rank) + 31) / 32 * 32;
}

// Placement of columns: in shared memory, but for their last rows, not at all. X and Q take 70 KB
// at r = 64, but the 272 KB of r = 128 fit nowhere: of 256 rows the last 40 (227 KB: sm_90, sm_100)
// or 104 (163 KB: sm_80) are Q's in global memory, all where not even X fits (99 KB, r > 104). Q in
// float32 would fit, but drifts from orthogonal by 7e-7; solving for the vectors instead of
// carrying Q loses those of small sigma. Sums have the same order wherever their rows lie.
enum class Place { kShared, kTail, kMemory };

// Memory layout. Rows of X, then as many of Q, each padded with zeros to whole groups of lanes.
struct Layout {
  int r, rows, total;  // rows of X; of a column
  int held, stride;    // of a column: rows in shared memory, doubles that they take
  int64_t shared_bytes;

  Layout(int64_t rank, bool vectors, int64_t limit) : r(static_cast<int>(rank)) {
    const int lanes = lanes_for(r);
    rows = (r + lanes - 1) / lanes * lanes;
    total = vectors ? 2 * rows : rows;
    held = total;
    stride = total + (16 + lanes - total % 16) % 16;
    const int64_t column = r * int64_t{sizeof(double)}, rest = 4 * column + 192;
    if (stride * column + rest > limit) {
      require(r > 64 && limit >= rest, "shared_limit", limit, "more");
      const int64_t most = (limit - rest) / column / 8;  // groups of rows: an odd number is best
      held = stride = static_cast<int>(most - (most % 2 == 0)) * 8;
      if (held > total) held = total;
      if (held < rows) held = stride = 0;
    }
    shared_bytes = stride * column + rest;
  }
  Place place() const {
    return held == total ? Place::kShared : held > 0 ? Place::kTail : Place::kMemory;
  }
  int64_t spilled() const { return int64_t{r} * (total - held); }
};

struct JacobiArgument {
  Layout layout;
  int64_t count;
  int sweeps;
  const double* cores;
  double *sigma, *left, *right, *workspace;
  int64_t* info;
};

// Columns of [X; Q]: the first `held` rows of each in shared memory, the others in global memory.
template <Place kPlace>
struct Columns {
  double *shared, *spilled;
  int stride, held, rest;

  __device__ __forceinline__ double* in_shared(int column, int row) const {
    return shared + column * stride + row;
  }
  __device__ __forceinline__ double* in_memory(int column, int row) const {
    return spilled + column * rest + (row - held);
  }
  __device__ __forceinline__ bool holds(int row) const {
    return kPlace == Place::kShared || (kPlace == Place::kTail && row < held);
  }
  __device__ __forceinline__ double load(int column, int row) const {
    return holds(row) ? *in_shared(column, row) : *in_memory(column, row);
  }
  __device__ __forceinline__ void store(int column, int row, double value) const {
    *(holds(row) ? in_shared(column, row) : in_memory(column, row)) = value;
  }
  __device__ __forceinline__ double* x(int column, int row) const {
    if constexpr (kPlace == Place::kMemory) return in_memory(column, row);
    return in_shared(column, row);
  }
};

// The rest of shared memory: doubles [r] but for the slots, one for each warp.
struct Scratch {
  double* base;
  int r;

  __device__ __forceinline__ double* values() const { return base; }  // slots
  __device__ __forceinline__ int* slots() const { return reinterpret_cast<int*>(base + 16); }
  __device__ __forceinline__ double* norms() const { return base + 24; }
  __device__ __forceinline__ double* vector() const { return base + 24 + r; }
  __device__ __forceinline__ double* signs() const { return base + 24 + 2 * r; }
  __device__ __forceinline__ int* order() const {
    return reinterpret_cast<int*>(base + 24 + 3 * r);
  }
};

template <bool kOneWarp>
__device__ __forceinline__ void sync() {
  if constexpr (kOneWarp) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

__device__ __forceinline__ int thread_index() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ int warps() { return static_cast<int>(blockDim.x) / 32; }

// The largest `value` of the block and the smallest index that has it, for every thread.
template <bool kOneWarp>
__device__ __forceinline__ void block_top(const Scratch& s, double& value, int& index) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    const double other = __shfl_xor_sync(kFullMask, value, step);
    const int at = __shfl_xor_sync(kFullMask, index, step);
    if (other > value || (other == value && at < index)) value = other, index = at;
  }
  if constexpr (kOneWarp) return;
  if (lane_index() == 0) s.values()[warp_index()] = value, s.slots()[warp_index()] = index;
  __syncthreads();
  value = s.values()[0], index = s.slots()[0];
  for (int warp = 1; warp < warps(); ++warp) {
    if (s.values()[warp] > value) value = s.values()[warp], index = s.slots()[warp];
  }
}

// X = C^T times a power of two, Q = 1; returns the power's exponent, or false for NaN and Inf.
template <bool kOneWarp, Place kPlace>
__device__ __forceinline__ bool load_core(const JacobiArgument& a, const Scratch& s,
                                          const Columns<kPlace>& columns, const double* core,
                                          int* exponent) {
  const int r = a.layout.r;
  double top = 0.0;
  int nobody = 0;
  for (int i = thread_index(); i < r * r; i += static_cast<int>(blockDim.x)) {
    const double size = fabs(core[i]);
    if (!(size <= top)) top = size <= 0x1.fffffffffffffp1023 ? size : INFINITY;
  }
  block_top<kOneWarp>(s, top, nobody);
  if (top > 0x1.fffffffffffffp1023) return false;
  frexp(top, exponent);  // 0 for 0
  *exponent = max(-1000, min(1000, *exponent));
  const double scale = ldexp(1.0, -*exponent);
  for (int column = warp_index(); column < r; column += warps()) {
    for (int row = lane_index(); row < a.layout.total; row += 32) {
      double value = row == a.layout.rows + column ? 1.0 : 0.0;
      if (row < r) value = core[column * r + row] * scale;
      columns.store(column, row, value);
    }
  }
  sync<kOneWarp>();
  return true;
}

// X becomes R^T and Q the product of the reflections that made it so, a row for each thread.
template <bool kOneWarp, Place kPlace>
__device__ __forceinline__ void pivoted_qr(const Layout& layout, const Scratch& s,
                                           const Columns<kPlace>& columns) {
  const int r = layout.r, row = thread_index();
  const bool of_x = row < r;
  bool waiting = row < r || (row >= layout.rows && row < layout.total);
  double square = -1.0;  // of the rest of a row of X that was no pivot
  if (of_x) {
    square = 0.0;
    for (int c = 0; c < r; ++c) square += columns.load(c, row) * columns.load(c, row);
  }
  for (int t = 0; t < r; ++t) {
    double top = square;
    int pivot = row;
    block_top<kOneWarp>(s, top, pivot);
    if (!(top > kJacobiTiny)) break;  // nothing is left, for every thread
    if (row >= t && row < r) s.vector()[row] = columns.load(row, pivot);
    sync<kOneWarp>();
    // H = 1 - v v^T / (beta (beta - lead)), v = x - beta e_t, takes the pivot's rest x to beta e_t.
    const double lead = s.vector()[t];
    const double beta = lead > 0.0 ? -sqrt(top) : sqrt(top);
    if (row == pivot) {
      columns.store(t, row, beta);
      for (int c = t + 1; c < r; ++c) columns.store(c, row, 0.0);
      waiting = false;
      square = -1.0;
    } else if (waiting) {
      const double first = columns.load(t, row);
      double even = first * (lead - beta), odd = 0.0;
      int c = t + 1;
#pragma unroll 4
      for (; c + 1 < r; c += 2) {
        even += columns.load(c, row) * s.vector()[c];
        odd += columns.load(c + 1, row) * s.vector()[c + 1];
      }
      if (c < r) odd += columns.load(c, row) * s.vector()[c];
      const double factor = (even + odd) / (beta * (beta - lead));
      columns.store(t, row, first - factor * (lead - beta));
      double rest = 0.0;
      for (c = t + 1; c < r; c += 4) {  // loads before stores, or they would wait for them
        double value[4] = {};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (c + i < r) value[i] = columns.load(c + i, row) - factor * s.vector()[c + i];
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (c + i < r) columns.store(c + i, row, value[i]);
          rest += value[i] * value[i];
        }
      }
      if (of_x) square = rest;
    }
    sync<kOneWarp>();
  }
}

// Squared norms of the columns of X; the pairs of the first round have them all.
template <int kLanes, Place kPlace>
__device__ __forceinline__ void column_norms(const Layout& layout, const Scratch& s,
                                             const Columns<kPlace>& columns) {
  const int r = layout.r, even = r + r % 2, lane = thread_index() % kLanes;
  int p = 0, q = r;
  if (thread_index() / kLanes < even / 2) tournament_pair(even, 0, thread_index() / kLanes, &p, &q);
  const bool first = thread_index() / kLanes < even / 2, second = q < r;
  double alpha = 0.0, beta = 0.0;
  for (int row = lane; row < layout.rows; row += kLanes) {
    const double x = first ? columns.load(p, row) : 0.0, y = second ? columns.load(q, row) : 0.0;
    alpha += x * x;
    beta += y * y;
  }
  alpha = lanes_sum<kLanes>(alpha), beta = lanes_sum<kLanes>(beta);
  if (lane == 0 && first) s.norms()[p] = alpha;
  if (lane == 0 && second) s.norms()[q] = beta;
}

// Every kLanes-th of the next `rows` rows of two columns, four at a time: the loads of one row may
// not pass the stores of another.
template <int kLanes>
__device__ __forceinline__ void rotate_rows(const JacobiRotation<double>& rotation, double* x,
                                            double* y, int rows) {
  int row = 0;
#pragma unroll 1
  for (; row + 3 * kLanes < rows; row += 4 * kLanes) {
    double v[4], w[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = x[row + i * kLanes], w[i] = y[row + i * kLanes];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      jacobi_rotate(rotation, v[i], w[i]);
      x[row + i * kLanes] = v[i], y[row + i * kLanes] = w[i];
    }
  }
#pragma unroll 1
  for (; row < rows; row += kLanes) jacobi_rotate(rotation, x[row], y[row]);
}

// All pairs of columns once. Returns how many were rotated, above kAgain if another sweep is
// needed.
constexpr uint32_t kAgain = 1u << 31;
template <int kRank, bool kOneWarp, Place kPlace>
__device__ __forceinline__ uint32_t sweep(const Layout& layout, const Scratch& s,
                                          const Columns<kPlace>& columns) {
  constexpr int kLanes = lanes_for(kRank);
  // Rows of X that a lane keeps in registers; addresses of global memory take them, too.
  constexpr int kRows = kPlace == Place::kMemory ? 2 : kRank < 64 ? kRank / kLanes : 8;
  constexpr int kSure = kRank == 16 ? 0 : kRank / 2;  // rows of X, at least
  const int r = layout.r, even = r + r % 2;
  const int lane = thread_index() % kLanes, pair = thread_index() / kLanes;
  uint32_t turned = 0;
  column_norms<kLanes>(layout, s, columns);
  sync<kOneWarp>();
#pragma unroll 1
  for (int round = 0; round + 1 < even; ++round) {
    int p = 0, q = r;
    if (pair < even / 2) tournament_pair(even, round, pair, &p, &q);
    double x[kRows], y[kRows], alpha = 0.0, beta = 0.0, gamma[2] = {};
    if (q < r) {
      alpha = s.norms()[p], beta = s.norms()[q];
#pragma unroll
      for (int k = 0; k < kRows; ++k) {
        x[k] = y[k] = 0.0;
        if (k * kLanes >= kSure && k * kLanes >= r) continue;
        x[k] = *columns.x(p, k * kLanes + lane);
        y[k] = *columns.x(q, k * kLanes + lane);
        gamma[k % 2] += x[k] * y[k];
      }
#pragma unroll 2
      for (int row = kRows * kLanes + lane; row < layout.rows; row += 2 * kLanes) {
        gamma[0] += *columns.x(p, row) * *columns.x(q, row);
        if (row + kLanes >= layout.rows) break;
        gamma[1] += *columns.x(p, row + kLanes) * *columns.x(q, row + kLanes);
      }
    }
    const double product = lanes_sum<kLanes>(gamma[0] + gamma[1]);
    __syncwarp();  // before a norm that a neighbor reads is replaced
    if (q < r && jacobi_exceeds(alpha, beta, product, kJacobiTolerance)) {
      if (jacobi_exceeds(alpha, beta, product, kJacobiLastSweep)) turned |= kAgain;
      const JacobiRotation<double> rotation = jacobi_rotation(alpha, beta, product, 0.0, 1.0);
#pragma unroll
      for (int k = 0; k < kRows; ++k) {
        if (k * kLanes >= kSure && k * kLanes >= r) continue;
        jacobi_rotate(rotation, x[k], y[k]);
        *columns.x(p, k * kLanes + lane) = x[k];
        *columns.x(q, k * kLanes + lane) = y[k];
      }
      const int held = kPlace == Place::kTail ? columns.held : layout.total;
      const int begin = min(kRows * kLanes, layout.rows);
      rotate_rows<kLanes>(rotation, columns.x(p, begin + lane), columns.x(q, begin + lane),
                          held - begin);
      if constexpr (kPlace == Place::kTail) {
        rotate_rows<kLanes>(rotation, columns.in_memory(p, held + lane),
                            columns.in_memory(q, held + lane), layout.total - held);
      }
      if (lane == 0) {
        ++turned;
        s.norms()[p] = alpha - rotation.t * product;
        s.norms()[q] = beta + rotation.t * product;
      }
    }
    sync<kOneWarp>();
  }
  const bool again = __any_sync(kFullMask, turned >= kAgain);
  turned = __reduce_add_sync(kFullMask, turned & ~kAgain) | (again ? kAgain : 0);
  if constexpr (kOneWarp) return turned;
  if (lane_index() == 0) s.slots()[warp_index()] = static_cast<int>(turned);
  __syncthreads();
  uint32_t all = 0, flags = 0;
  for (int warp = 0; warp < warps(); ++warp) {
    const uint32_t slot = static_cast<uint32_t>(s.slots()[warp]);
    all += slot & ~kAgain;
    flags |= slot & kAgain;
  }
  return all | flags;
}

// Sorted values, and the vectors of a common sign: row by row, so that neighbors store together.
template <bool kOneWarp, Place kPlace>
__device__ __forceinline__ void store_results(const JacobiArgument& a, const Scratch& s,
                                              const Columns<kPlace>& columns, int64_t matrix,
                                              double scale) {
  const Layout& layout = a.layout;
  const int r = layout.r, j = thread_index();
  const bool vectors = layout.total > layout.rows;
  if (j < r) {
    const int to = static_cast<int>(sorted_position(s.norms(), r, 1, j));
    const double value = sqrt(s.norms()[j]);
    s.order()[to] = j;
    a.sigma[matrix * r + to] = value * scale;
    if (vectors) {
      const int begin = layout.rows, end = layout.rows + r;
      const int middle = kPlace == Place::kTail ? min(end, columns.held) : end;
      double top = jacobi_top(0.0, columns.x(j, begin), middle - begin);
      if (middle < end) top = jacobi_top(top, columns.in_memory(j, middle), end - middle);
      s.signs()[j] = jacobi_sign(top);
      s.vector()[j] = value > 0.0 ? jacobi_sign(top) / value : 0.0;
    }
  }
  sync<kOneWarp>();
  if (!vectors) return;
  double* left = a.left + matrix * r * r;
  double* right = a.right + matrix * r * r;
  for (int row = warp_index(); row < r; row += warps()) {
    for (int to = lane_index(); to < r; to += 32) {
      const int column = s.order()[to];
      left[row * r + to] = s.signs()[column] * columns.load(column, layout.rows + row);
      right[row * r + to] = s.vector()[column] * columns.load(column, row);
    }
  }
}

__device__ __forceinline__ void store_nan(const JacobiArgument& a, int64_t matrix) {
  const int r = a.layout.r;
  const double nan = __longlong_as_double(0x7ff8000000000000);
  for (int i = thread_index(); i < r * r; i += static_cast<int>(blockDim.x)) {
    if (i < r) a.sigma[matrix * r + i] = nan;
    if (!a.left) continue;
    a.left[matrix * r * r + i] = nan;
    a.right[matrix * r * r + i] = nan;
  }
}

template <int kRank, Place kPlace>  // kRank: the largest r
__global__ void __launch_bounds__(threads_for(kRank), kRank == 64 ? 2 : 1)
    jacobi_kernel(const __grid_constant__ JacobiArgument a) {
  constexpr bool kOneWarp = threads_for(kRank) == 32;
  const int r = a.layout.r;
  double* shared = dynamic_shared<double>();
  const Scratch s = {shared + r * a.layout.stride, r};
  const int rest = a.layout.total - a.layout.held;
  for (int64_t matrix = blockIdx.x; matrix < a.count; matrix += gridDim.x) {
    double* spilled = a.workspace + matrix * r * rest;
    const Columns<kPlace> columns = {shared, spilled, a.layout.stride, a.layout.held, rest};
    int exponent;
    uint32_t left = 0;
    const double* core = a.cores + matrix * r * r;
    if (!load_core<kOneWarp>(a, s, columns, core, &exponent)) {
      store_nan(a, matrix);
      if (thread_index() == 0) a.info[matrix] = -1;
      sync<kOneWarp>();
      continue;
    }
    pivoted_qr<kOneWarp>(a.layout, s, columns);
#pragma unroll 1
    for (int i = 0; i < a.sweeps; ++i) {
      left = sweep<kRank, kOneWarp>(a.layout, s, columns);
      if (!(left & kAgain)) break;
    }
    if (thread_index() == 0) a.info[matrix] = left & kAgain ? int64_t{left & ~kAgain} : 0;
    column_norms<lanes_for(kRank)>(a.layout, s, columns);
    sync<kOneWarp>();
    store_results<kOneWarp>(a, s, columns, matrix, ldexp(1.0, exponent));
    sync<kOneWarp>();
  }
}

// ---- pivoted Cholesky

struct RootsArgument {
  Layout layout;
  int64_t count;
  const double* grams;
  double *roots, *inverses, *norms, *workspace;
};

// A Gram matrix with unit diagonal, and below it a unit matrix to which the same elimination is
// done: a step takes from every column its entry at the pivot times the pivot's column. Nothing is
// swapped: rows of past pivots are zero. A thread has a row and reads but that and the vector.
template <Place kPlace>
__global__ void __launch_bounds__(512, 1) roots_kernel(const __grid_constant__ RootsArgument a) {
  const int r = a.layout.r, row = thread_index(), below = row - a.layout.rows;
  double* shared = dynamic_shared<double>();
  const Scratch s = {shared + r * a.layout.stride, r};
  const int rest = a.layout.total - a.layout.held;
  for (int64_t matrix = blockIdx.x; matrix < a.count; matrix += gridDim.x) {
    const Columns<kPlace> columns = {shared, a.workspace + matrix * r * rest, a.layout.stride,
                                     a.layout.held, rest};
    const double* gram = a.grams + matrix * r * r;
    double* root = a.roots + matrix * r * r;
    double* inverse = a.inverses + matrix * r * r;
    if (row < r) {
      const double norm = sqrt(gram[row * r + row]);
      a.norms[matrix * r + row] = norm;
      s.norms()[row] = norm > 0.0 ? 1.0 / norm : 0.0;
    }
    __syncthreads();
    const double reciprocal = below >= 0 && below < r ? s.norms()[below] : 0.0;
    for (int column = warp_index(); column < r; column += warps()) {
      for (int i = lane_index(); i < a.layout.total; i += 32) {
        double value = i == a.layout.rows + column ? 1.0 : 0.0;
        if (i < r) value = gram[column * r + i] * (s.norms()[i] * s.norms()[column]);
        if (i == column) value = s.norms()[i] > 0.0 ? 1.0 : 0.0;
        columns.store(column, i, value);
      }
    }
    __syncthreads();
    double diagonal = row < r ? columns.load(row, row) : -1.0;
    int rank = 0;
    for (; rank < r; ++rank) {
      double top = diagonal;
      int pivot = row;
      block_top<false>(s, top, pivot);
      if (!(top > r * kDependent)) break;
      const double pivotal = sqrt(top);
      double own = row < a.layout.total ? columns.load(pivot, row) / pivotal : 0.0;
      if (row == pivot) own = pivotal;
      if (row < r) s.vector()[row] = root[rank * r + row] = own;
      if (below >= 0 && below < r) inverse[below * r + rank] = own * reciprocal;
      __syncthreads();
      diagonal = row == pivot ? -1.0 : diagonal < 0.0 ? diagonal : diagonal - own * own;
      if (row >= a.layout.total) continue;
      if (row == pivot) own = 0.0;
#pragma unroll 1
      for (int c = 0; c < r; c += 4) {
        double value[4] = {};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (c + i < r) value[i] = columns.load(c + i, row) - own * s.vector()[c + i];
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (c + i < r) columns.store(c + i, row, row == pivot ? 0.0 : value[i]);
        }
      }
    }
    for (; rank < r; ++rank) {
      if (row < r) root[rank * r + row] = 0.0;
      if (below >= 0 && below < r) inverse[below * r + rank] = 0.0;
    }
    __syncthreads();
  }
}

Layout layout_for(int64_t r, bool vectors, int64_t shared_limit) {
  require(r >= 0 && r <= kCudaJacobiRank, "r", r, "0 to 128");
  require(shared_limit >= 0, "shared_limit", shared_limit, "at least 0");
  return {r, vectors, shared_limit > 0 ? shared_limit : most_shared_bytes()};
}

void check_room(const Layout& layout, int64_t count, const double* workspace, int64_t length) {
  require(count >= 0, "count", count, "at least 0");
  checked_mul(checked_mul(int64_t{layout.r} * layout.r, 8, "r x r"), count, "count x r x r");
  const int64_t wanted = checked_mul(layout.spilled(), count, "workspace");
  require(length >= wanted, "workspace", length, wanted, "doubles");
  if (wanted > 0 && !workspace) fail("workspace: null pointer");
}

}  // namespace

int64_t cuda_jacobi_workspace(int64_t r, bool vectors, int64_t shared_limit) {
  return layout_for(r, vectors, shared_limit).spilled();
}

int cuda_jacobi_svd(const CudaJacobiSvdArgs& args, CudaStream stream) {
  require(args.sweeps >= 0, "sweeps", args.sweeps, "at least 0");
  if (!args.left != !args.right) fail("left, right: expected both or none");
  const Layout layout = layout_for(args.r, args.left != nullptr, args.shared_limit);
  check_room(layout, args.count, args.workspace, args.workspace_len);
  if (args.count == 0 || args.r == 0) return cudaSuccess;
  if (!args.cores || !args.sigma || !args.info) fail("cores, sigma, info: null pointer");
  const JacobiArgument a = {layout,    args.count, args.sweeps,    args.cores, args.sigma,
                            args.left, args.right, args.workspace, args.info};
  const Place place = layout.place();
  const auto kernel = place == Place::kTail     ? jacobi_kernel<128, Place::kTail>
                      : place == Place::kMemory ? jacobi_kernel<128, Place::kMemory>
                      : args.r <= 16            ? jacobi_kernel<16, Place::kShared>
                      : args.r <= 32            ? jacobi_kernel<32, Place::kShared>
                      : args.r <= 64            ? jacobi_kernel<64, Place::kShared>
                                                : jacobi_kernel<128, Place::kShared>;
  return launch(kernel, grid_size(args.count, 1), static_cast<unsigned>(threads_for(layout.r)),
                static_cast<size_t>(layout.shared_bytes), stream, a);
}

int cuda_gram_roots(const CudaGramRootsArgs& args, CudaStream stream) {
  const Layout layout = layout_for(args.r, true, args.shared_limit);
  check_room(layout, args.count, args.workspace, args.workspace_len);
  if (args.count == 0 || args.r == 0) return cudaSuccess;
  if (!args.grams || !args.roots || !args.inverses || !args.norms) {
    fail("grams, roots, inverses, norms: null pointer");
  }
  const RootsArgument a = {layout,        args.count, args.grams,    args.roots,
                           args.inverses, args.norms, args.workspace};
  const Place place = layout.place();
  const auto kernel = place == Place::kTail     ? roots_kernel<Place::kTail>
                      : place == Place::kMemory ? roots_kernel<Place::kMemory>
                                                : roots_kernel<Place::kShared>;
  return launch(kernel, grid_size(args.count, 1), static_cast<unsigned>(threads_for(layout.r)),
                static_cast<size_t>(layout.shared_bytes), stream, a);
}

}  // namespace peftkern
