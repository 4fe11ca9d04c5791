// The small matrices of the low-rank SVD: pivoted Cholesky decomposition of a Gram matrix, and the
// SVD of r x r cores by QR-preconditioned one-sided Jacobi, one matrix per vector lane. Compiled
// once per instruction set.
#pragma once

#include "low_rank_products.h"

namespace peftkern {
namespace {
namespace low_rank {

// Rows of `root` from R^T R = `left` (destroyed), diagonal pivots, in the given column order:
// nothing is swapped, row t is zero at the pivots before its own. Returns the rank.
inline int64_t cholesky(double* left, int64_t r, double* root, int64_t* pivots) {
  double* done = left + r * r;
  for (int64_t i = 0; i < r; ++i) done[i] = 0.0;
  for (int64_t t = 0; t < r; ++t) {
    int64_t pivot = -1;
    double top = static_cast<double>(r) * kDependent;
    for (int64_t i = 0; i < r; ++i) {
      if (done[i] == 0.0 && left[i * r + i] > top) pivot = i, top = left[i * r + i];
    }
    if (pivot < 0) return t;
    pivots[t] = pivot;
    double* row = root + t * r;
    const double diagonal = sqrt(top);
    for (int64_t j = 0; j < r; ++j) row[j] = done[j] != 0.0 ? 0.0 : left[pivot * r + j] / diagonal;
    row[pivot] = diagonal;
    done[pivot] = 1.0;
    for (int64_t i = 0; i < r; ++i) {
      if (done[i] == 0.0) add_scaled(left + i * r, -row[i], row, r);
    }
  }
  return r;
}

// inverse, r x r: rows `pivots` hold R^-1 of the triangular k x k matrix R that is columns `pivots`
// of root, other rows and columns are zero.
inline void invert(const double* root, int64_t r, int64_t k, const int64_t* pivots,
                   double* inverse) {
  std::memset(inverse, 0, static_cast<size_t>(r * r) * sizeof(double));
  for (int64_t a = k - 1; a >= 0; --a) {
    double* row = inverse + pivots[a] * r;
    const double* coefficients = root + a * r;
    for (int64_t b = a + 1; b < k; ++b) {
      add_scaled(row, -coefficients[pivots[b]], inverse + pivots[b] * r, k);
    }
    row[a] = 1.0;
    const double diagonal = coefficients[pivots[a]];
    for (int64_t j = a; j < k; ++j) row[j] /= diagonal;
  }
}

// The Gram matrix is scaled to a unit diagonal first: how dependent a column is has nothing to do
// with its length, and so the rank does not change when a column of B is traded against a row of A.
int64_t factorize(const double* gram, int64_t r, double* root, double* inverse, double* norms,
                  double* kappa, double* scratch) {
  double* left = scratch;
  int64_t* pivots = reinterpret_cast<int64_t*>(scratch + r * r + r);
  double* reciprocal = scratch + r * r + 2 * r;
  for (int64_t i = 0; i < r; ++i) {
    norms[i] = sqrt(gram[i * r + i]);
    reciprocal[i] = norms[i] > 0.0 ? 1.0 / norms[i] : 0.0;
  }
  for (int64_t i = 0; i < r; ++i) {
    for (int64_t j = 0; j < r; ++j) {
      left[i * r + j] = gram[i * r + j] * reciprocal[i] * reciprocal[j];
    }
    left[i * r + i] = norms[i] > 0.0 ? 1.0 : 0.0;
  }
  std::memset(root, 0, static_cast<size_t>(r * r) * sizeof(double));
  const int64_t k = cholesky(left, r, root, pivots);
  invert(root, r, k, pivots, inverse);
  *kappa = sqrt(dot(root, root, r * r) * dot(inverse, inverse, r * r));
  for (int64_t i = 0; i < r; ++i) {
    for (int64_t j = 0; j < k; ++j) inverse[i * r + j] *= reciprocal[i];
  }
  return k;
}

void product(const double* a, const double* b, bool transposed, int64_t r, double* c) {
  for (int64_t i = 0; i < r; ++i) {
    double* row = c + i * r;
    if (transposed) {
      for (int64_t j = 0; j < r; ++j) row[j] = dot(a + i * r, b + j * r, r);
      continue;
    }
    std::memset(row, 0, static_cast<size_t>(r) * sizeof(double));
    for (int64_t l = 0; l < r; ++l) add_scaled(row, a[i * r + l], b + l * r, r);
  }
}

// Column-pivoted Householder QR. `columns` [r, r] holds the columns of the matrix as rows: on
// return R^T below and on the diagonal (row j: column order[j]); `q`, the columns of Q as rows.
inline void householder(double* columns, int64_t r, double* q, int64_t* order, double* taus) {
  for (int64_t j = 0; j < r; ++j) order[j] = j;
  for (int64_t t = 0; t < r; ++t) {
    int64_t pivot = t;
    double top = -1.0;
    for (int64_t j = t; j < r; ++j) {
      const double norm = dot(columns + j * r + t, columns + j * r + t, r - t);
      if (norm > top) pivot = j, top = norm;
    }
    for (int64_t i = 0; i < r && pivot != t; ++i) {
      const double swap = columns[t * r + i];
      columns[t * r + i] = columns[pivot * r + i];
      columns[pivot * r + i] = swap;
    }
    const int64_t swap = order[t];
    order[t] = order[pivot];
    order[pivot] = swap;
    // v = (1, v_1, ...) in place, below the diagonal; H = I - tau v v^T makes column t (beta, 0).
    double* v = columns + t * r + t;
    const double below = dot(v + 1, v + 1, r - t - 1);
    taus[t] = 0.0;
    if (below > 0.0) {
      const double beta = v[0] > 0.0 ? -sqrt(top) : sqrt(top);
      taus[t] = (beta - v[0]) / beta;
      const double scale = 1.0 / (v[0] - beta);
      for (int64_t i = 1; i < r - t; ++i) v[i] *= scale;
      v[0] = beta;
    }
    for (int64_t j = t + 1; j < r; ++j) {
      double* w = columns + j * r + t;
      const double factor = taus[t] * (w[0] + dot(v + 1, w + 1, r - t - 1));
      w[0] -= factor;
      add_scaled(w + 1, -factor, v + 1, r - t - 1);
    }
  }
  std::memset(q, 0, static_cast<size_t>(r * r) * sizeof(double));
  for (int64_t reflected = 0; reflected < r; ++reflected) {  // the last one first
    const int64_t t = r - 1 - reflected;
    const double* v = columns + t * r + t;
    q[t * r + t] = 1.0;
    for (int64_t j = t; j < r; ++j) {
      double* w = q + j * r + t;
      const double factor = taus[t] * (w[0] + dot(v + 1, w + 1, r - t - 1));
      w[0] -= factor;
      add_scaled(w + 1, -factor, v + 1, r - t - 1);
    }
  }
}

// Squared norms of the r columns of x, which are r x lanes doubles each.
inline void column_norms(const double* x, int64_t r, double* norms) {
  for (int64_t j = 0; j < r; ++j) {
    Doubles sum = doubles_set1(0.0);
    for (int64_t i = 0; i < r; ++i) {
      const Doubles value = doubles_load(x + (j * r + i) * kDoubles);
      sum = doubles_fma(value, value, sum);
    }
    doubles_store(norms + j * kDoubles, sum);
  }
}

inline Doubles column_dot(const double* x, const double* y, int64_t r) {
  Doubles even = doubles_set1(0.0), odd = even;
  int64_t i = 0;
  for (; i + 2 <= r; i += 2) {
    even = doubles_fma(doubles_load(x + i * kDoubles), doubles_load(y + i * kDoubles), even);
    odd = doubles_fma(doubles_load(x + (i + 1) * kDoubles), doubles_load(y + (i + 1) * kDoubles),
                      odd);
  }
  if (i < r)
    even = doubles_fma(doubles_load(x + i * kDoubles), doubles_load(y + i * kDoubles), even);
  return even + odd;
}

inline void rotate_columns(const JacobiRotation<Doubles>& rotation, double* x, double* y,
                           int64_t r) {
  for (int64_t i = 0; i < r; ++i) {
    Doubles a = doubles_load(x + i * kDoubles), b = doubles_load(y + i * kDoubles);
    jacobi_rotate(rotation, a, b);
    doubles_store(x + i * kDoubles, a);
    doubles_store(y + i * kDoubles, b);
  }
}

// One sweep over all pairs of columns of x, and of v unless it is null. Lanes where `active` is
// zero keep their bits. Returns the largest cosine met; `left` counts those above the tolerance.
inline Doubles jacobi_sweep(double* x, double* v, int64_t r, double* norms, Doubles active,
                            Doubles* left) {
  const Doubles zero = doubles_set1(0.0), one = doubles_set1(1.0);
  const Doubles tiny = doubles_set1(kJacobiTiny), tolerance = doubles_set1(kJacobiTolerance);
  const int64_t even = r + r % 2, column = r * kDoubles;
  Doubles worst = zero;
  *left = zero;
  column_norms(x, r, norms);
  for (int64_t round = 0; round + 1 < even; ++round) {
    for (int64_t pair = 0; pair < even / 2; ++pair) {
      int64_t p, q;
      tournament_pair(even, round, pair, &p, &q);
      if (q >= r) continue;
      const Doubles alpha = doubles_load(norms + p * kDoubles);
      const Doubles beta = doubles_load(norms + q * kDoubles);
      Doubles gamma = column_dot(x + p * column, x + q * column, r);
      const Doubles cosine = jacobi_cosine(alpha, beta, gamma, zero, tiny) * active;
      worst = select_gt(cosine, worst, cosine, worst);
      if (!any_gt(cosine, tolerance)) continue;
      *left = *left + select_gt(cosine, tolerance, one, zero);
      gamma = select_gt(cosine, tolerance, gamma, zero);
      const JacobiRotation<Doubles> rotation = jacobi_rotation(alpha, beta, gamma, zero, one);
      rotate_columns(rotation, x + p * column, x + q * column, r);
      if (v) rotate_columns(rotation, v + p * column, v + q * column, r);
      doubles_store(norms + p * kDoubles, alpha - rotation.t * gamma);
      doubles_store(norms + q * kDoubles, beta + rotation.t * gamma);
    }
  }
  return worst;
}

// Sorted singular values of one lane and, unless left is null, its vectors: left = Q V, right =
// P X / sigma.
inline void store_lane(const double* x, const double* v, const double* norms, int64_t lane,
                       const double* q, const int64_t* order, int64_t r, double* sigma,
                       double* left, double* right, double* column) {
  for (int64_t j = 0; j < r; ++j) {
    const int64_t to = sorted_position(norms + lane, r, kDoubles, j);
    const double value = sqrt(norms[j * kDoubles + lane]);
    sigma[to] = value;
    if (!left) continue;
    for (int64_t i = 0; i < r; ++i) column[i] = 0.0;
    for (int64_t l = 0; l < r; ++l) {
      add_scaled(column, v[(j * r + l) * kDoubles + lane], q + l * r, r);
    }
    const double sign = jacobi_sign(jacobi_top(0.0, column, r));
    const double scale = value > 0.0 ? sign / value : 0.0;
    for (int64_t i = 0; i < r; ++i) {
      left[i * r + to] = sign * column[i];
      right[order[i] * r + to] = scale * x[(j * r + i) * kDoubles + lane];
    }
  }
}

void jacobi(const JacobiSvdArgs& args, int64_t first, int64_t count, double* scratch) {
  const int64_t r = args.r, size = r * r;
  double* x = scratch;
  double* v = x + size * kDoubles;
  double* q = v + size * kDoubles;
  double* norms = q + size * kDoubles;
  double* columns = norms + r * kDoubles;
  double* taus = columns + size;
  int64_t* order = reinterpret_cast<int64_t*>(taus + r);
  std::memset(scratch, 0, static_cast<size_t>(2 * size * kDoubles) * sizeof(double));
  double active[kDoubles] = {}, left[kDoubles], worst[kDoubles];
  for (int64_t lane = 0; lane < count; ++lane) {
    const double* core = args.cores + (first + lane) * size;
    for (int64_t i = 0; i < size; ++i) columns[i] = core[i % r * r + i / r];
    householder(columns, r, q + lane * size, order + lane * r, taus);
    for (int64_t j = 0; j < r; ++j) {  // column i of x is row i of R
      for (int64_t i = 0; i <= j; ++i) x[(i * r + j) * kDoubles + lane] = columns[j * r + i];
      v[(j * r + j) * kDoubles + lane] = 1.0;
    }
    active[lane] = 1.0;
  }
  for (int sweep = 0; sweep < args.sweeps; ++sweep) {
    Doubles pairs;
    const Doubles cosine =
        jacobi_sweep(x, args.left ? v : nullptr, r, norms, doubles_load(active), &pairs);
    doubles_store(worst, cosine);
    doubles_store(left, pairs);
    bool more = false;
    for (int64_t lane = 0; lane < count; ++lane) {
      if (active[lane] == 0.0) continue;
      const bool done = worst[lane] <= kJacobiLastSweep;
      args.info[first + lane] = done ? 0 : static_cast<int64_t>(left[lane]);
      if (done) active[lane] = 0.0;
      more = more || !done;
    }
    if (!more) break;
  }
  column_norms(x, r, norms);
  for (int64_t lane = 0; lane < count; ++lane) {
    const int64_t at = first + lane;
    store_lane(x, v, norms, lane, q + lane * size, order + lane * r, r, args.sigma + at * r,
               args.left ? args.left + at * size : nullptr,
               args.right ? args.right + at * size : nullptr, taus);
  }
}

// Enough for every kernel here.
int64_t scratch_doubles(int64_t r) {
  const int64_t ld = padded(r), products = 2 * piece_doubles(r) + 2 * ld * ld;
  const int64_t matrices = (3 * r * r + 2 * r) * kDoubles + r * r + 2 * r;
  return products > matrices ? products : matrices;
}

}  // namespace low_rank
}  // namespace
}  // namespace peftkern
