// One-sided Jacobi: the formulas that the CPU and the CUDA kernels share. Torch-free, no
// containers.
//
// The columns of X [n, n] are rotated in pairs until they are orthogonal: X V = U diag(sigma). X is
// the transposed R of a column-pivoted QR, whose columns come sorted and nearly orthogonal, so that
// 5 to 10 sweeps do. Drmac and Veselic 2008, "New fast and accurate Jacobi SVD algorithm";
// Rutishauser 1966 for the form of the rotation.
//
// Templates over T: double, float, or a vector of doubles that brings its own operators,
// jacobi_sqrt and select_gt. Everything is in an anonymous namespace: each instruction set gets its
// own copy.
#pragma once

#include <math.h>
#include <stdint.h>

#ifdef __CUDACC__
#define PEFTKERN_HOST_DEVICE __host__ __device__
#else
#define PEFTKERN_HOST_DEVICE
#endif

namespace peftkern {
namespace {

// A pair counts as orthogonal at |x.y| <= kJacobiTolerance |x| |y|.
constexpr double kJacobiTolerance = 0x1p-50;
// A sweep that met no pair above this was the last: convergence is quadratic, its own rotations
// leave at most the square.
constexpr double kJacobiLastSweep = 1e-8;
constexpr int kJacobiSweeps = 30;
// Products of squared norms below this underflow next to a largest norm of about one: such columns
// lie far below the rounding errors of the others and count as zero.
constexpr double kJacobiTiny = 1e-280;
// Of a pivot of the Cholesky decomposition with unit diagonal, times the rank: what is left of a
// column that depends on the others.
constexpr double kDependent = 1e-15;
// Estimated condition number above which the Gram matrix is taken a second time, of Q: one pass
// leaves |Q^T Q - I| near 2^-53 kappa^2.
constexpr double kSecondPass = 1e5;

PEFTKERN_HOST_DEVICE inline double jacobi_sqrt(double x) { return sqrt(x); }
PEFTKERN_HOST_DEVICE inline float jacobi_sqrt(float x) { return sqrtf(x); }
PEFTKERN_HOST_DEVICE inline double jacobi_abs(double x) { return fabs(x); }
PEFTKERN_HOST_DEVICE inline float jacobi_abs(float x) { return fabsf(x); }
// a > b ? x : y, element by element; a NaN is not greater.
PEFTKERN_HOST_DEVICE inline double select_gt(double a, double b, double x, double y) {
  return a > b ? x : y;
}
PEFTKERN_HOST_DEVICE inline float select_gt(float a, float b, float x, float y) {
  return a > b ? x : y;
}

// |x.y| / (|x| |y|) from the squared norms alpha, beta and the product gamma; 0 for zero columns.
template <class T>
PEFTKERN_HOST_DEVICE inline T jacobi_cosine(T alpha, T beta, T gamma, T zero, T tiny) {
  const T product = alpha * beta;
  const T safe = select_gt(product, tiny, product, tiny);
  return select_gt(product, tiny, jacobi_abs(gamma) / jacobi_sqrt(safe), zero);
}

// |x.y| > tolerance |x| |y|: jacobi_cosine without its root and its quotient.
template <class T>
PEFTKERN_HOST_DEVICE inline bool jacobi_exceeds(T alpha, T beta, T gamma, T tolerance) {
  const T product = alpha * beta;
  return product > T(kJacobiTiny) && gamma * gamma > tolerance * tolerance * product;
}

// The rotation that makes two columns orthogonal: s = sin, t = tan, tau = s / (1 + cos) of the
// smaller angle.
template <class T>
struct JacobiRotation {
  T s, t, tau;
};

// t = 2 gamma sign(d) / (|d| + sqrt(d^2 + 4 gamma^2)), d = beta - alpha; zero where gamma is.
template <class T>
PEFTKERN_HOST_DEVICE inline JacobiRotation<T> jacobi_rotation(T alpha, T beta, T gamma, T zero,
                                                              T one) {
  const T d = beta - alpha, twice = gamma + gamma;
  const T below = jacobi_abs(d) + jacobi_sqrt(d * d + twice * twice);
  const T t =
      select_gt(below, zero,
                select_gt(zero, d, zero - twice, twice) / select_gt(below, zero, below, one), zero);
  const T h = jacobi_sqrt(one + t * t);  // 1 / cos; the two quotients do not wait for each other
  return {t / h, t, t / (one + h)};
}

// x' = x - s (y + tau x), y' = y + s (x - tau y): corrections of x and y instead of new values, so
// that rounding errors do not pile up over the sweeps as with c x - s y.
template <class T>
PEFTKERN_HOST_DEVICE inline void jacobi_rotate(const JacobiRotation<T>& rotation, T& x, T& y) {
  const T old = x;
  x = old - rotation.s * (y + rotation.tau * old);
  y = y + rotation.s * (old - rotation.tau * y);
}

// Pair number `pair` in [0, n / 2) of round `round` in [0, n - 1) of a round-robin tournament of n
// columns, n even, p < q: the pairs of a round are disjoint, a sweep meets each pair once. For odd
// n play with n + 1 and leave out the pairs that hold column n.
template <class I>
PEFTKERN_HOST_DEVICE inline void tournament_pair(I n, I round, I pair, I* p, I* q) {
  const I ring = n - 1;
  const I ahead = round + pair, behind = round + ring - pair;
  const I a = pair == 0 ? ring : ahead < ring ? ahead : ahead - ring;
  const I b = pair == 0 ? round : behind < ring ? behind : behind - ring;
  *p = a < b ? a : b;
  *q = a < b ? b : a;
}

// Rank of column j among the columns by descending norm, ties by index.
template <class T>
PEFTKERN_HOST_DEVICE inline int64_t sorted_position(const T* norms, int64_t n, int64_t stride,
                                                    int64_t j) {
  const T own = norms[j * stride];
  int64_t position = 0;
  for (int64_t i = 0; i < n; ++i) {
    const T other = norms[i * stride];
    position += other > own || (other == own && i < j);
  }
  return position;
}

// `top`, or the entry of `v` that is largest in magnitude (the first of equals) if it is larger.
template <class T>
PEFTKERN_HOST_DEVICE inline T jacobi_top(T top, const T* v, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    if (jacobi_abs(v[i]) > jacobi_abs(top)) top = v[i];
  }
  return top;
}

// Singular vectors are given up to a common sign: +1 or -1 makes the top entry of the left one
// positive.
template <class T>
PEFTKERN_HOST_DEVICE inline T jacobi_sign(T top) {
  return top < T(0) ? T(-1) : T(1);
}

}  // namespace
}  // namespace peftkern
