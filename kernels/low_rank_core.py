"""Small matrices of the low-rank SVD on a GPU: one program per factor or pair, in float64.

The algorithms of csrc/cpu/low_rank_svd_kernels.h, on matrices that lie in a program's registers:
pivoted Cholesky decomposition of Gram matrices, pivoted QR of the cores, one-sided Jacobi, and what
is made of its vectors. Matrices are [R, R], R a power of two; ranks below are padded with zeros,
which no step changes. `low_rank_svd.py` has the long products and the launches.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Constants of csrc/include/peftkern/jacobi.h; those that compare cosines are squared.
DEPENDENT = tl.constexpr(1e-15)
SECOND_PASS = tl.constexpr(1e5)
ORTHOGONAL = tl.constexpr(2.0**-100)
LAST_SWEEP = tl.constexpr(1e-16)
TINY = tl.constexpr(1e-280)
EPSILON = tl.constexpr(2.0**-52)
NORMAL = tl.constexpr(2.0**-126)  # the smallest of float32

# Rows of the table, which have a number for each pair. What exists twice has one for B and then one
# for A, sides 0 and 1.
ADDRESS = tl.constexpr(0)
LENGTH = tl.constexpr(2)
DTYPE_CODE = tl.constexpr(4)
OUTPUT = tl.constexpr(6)  # where U and Vh begin
RANK = tl.constexpr(8)
OUTPUT_S = tl.constexpr(9)
SCALING = tl.constexpr(10)  # bits of a float64
INDEX = tl.constexpr(11)  # of rank and info
FIRST_TILE = tl.constexpr(12)


@triton.jit
def field(table_ptr, field, pair, count):
    return tl.load(table_ptr + field * count + pair)


@triton.jit
def square(matrix_ptr, R: tl.constexpr):
    return matrix_ptr + tl.arange(0, R)[:, None] * R + tl.arange(0, R)[None, :]


@triton.jit
def _product(a_ptr, b_ptr, R: tl.constexpr):
    """Multiply two matrices in memory without tensor cores, which few GPUs have for float64."""
    index = tl.arange(0, R)
    out = tl.zeros((R, R), tl.float64)
    for k in range(R):
        column = tl.load(a_ptr + index * R + k)
        out += column[:, None] * tl.load(b_ptr + k * R + index)[None, :]
    return out


@triton.jit
def _reciprocal(x):
    return tl.where(x > 0.0, 1.0 / tl.where(x > 0.0, x, 1.0), 0.0)


@triton.jit
def _unit_gram(partial_ptr, tiles, R: tl.constexpr):
    """Scale a factor's Gram matrix to a unit diagonal; all zero unless it is finite.

    Returns: the matrix and its diagonal, lengths, their reciprocals, and whether it was finite.
    """
    index = tl.arange(0, R)
    on_diagonal = index[:, None] == index[None, :]
    gram = tl.zeros((R, R), tl.float64)
    for tile in range(tiles):
        gram += tl.load(square(partial_ptr + tile * R * R, R))
    finite = tl.sum(tl.sum(tl.where(on_diagonal, gram, 0.0), 1), 0) < float("inf")
    gram = tl.where(finite, gram, 0.0)
    down = tl.sqrt(tl.sum(tl.where(on_diagonal, gram, 0.0), 1))
    norms = tl.sqrt(tl.sum(tl.where(on_diagonal, gram, 0.0), 0))
    reciprocal = _reciprocal(norms)
    gram = gram * _reciprocal(down)[:, None] * reciprocal[None, :]
    return gram, tl.where(down > 0.0, 1.0, 0.0).to(tl.float64), norms, reciprocal, finite


@triton.jit(do_not_specialize=["count"])
def low_rank_factorize_kernel(
    table_ptr,
    kappa_ptr,
    norms_ptr,
    factors_ptr,
    partial_ptr,
    count,
    SECOND: tl.constexpr,
    ROWS: tl.constexpr,
    R: tl.constexpr,
):
    """Factorize a Gram matrix = D root^T root D, D = diag(norms); inverse: Q = factor * inverse.

    A pivoted Cholesky decomposition of the matrix with unit diagonal; nothing is swapped: rows and
    columns of past pivots are zero. The steps of the elimination, done to a unit matrix as well,
    leave the inverse's columns. Non-finite factors: all zero, kappa NaN. SECOND: the Gram matrix
    is Q's, and its root and inverse join those of the first pass.
    """
    factor = tl.program_id(0).to(tl.int64)
    pair, side = factor % count, factor // count
    first_ptr = factors_ptr + 4 * factor * R * R
    factors_ptr = first_ptr
    if SECOND:
        factors_ptr += 2 * R * R
        if not tl.load(kappa_ptr + factor) > SECOND_PASS:
            return
    length = field(table_ptr, LENGTH + side, pair, count)
    r = field(table_ptr, RANK, pair, count).to(tl.int32)
    partial_ptr += field(table_ptr, FIRST_TILE + side, pair, count) * R * R
    index = tl.arange(0, R)
    i, j = index[:, None], index[None, :]
    left, diagonal, norms, reciprocal, finite = _unit_gram(partial_ptr, tl.cdiv(length, ROWS), R)
    unit = tl.where(i == j, 1.0, 0.0).to(tl.float64)
    root_squares = tl.zeros_like(norms)
    inverse_squares = tl.zeros_like(norms)
    for t in range(R):
        top, pivot = tl.max(diagonal, 0, return_indices=True)
        found = top > r * DEPENDENT
        pivotal = tl.sqrt(tl.where(found, top, 1.0))
        share = tl.where(found, 1.0 / pivotal, 0.0)
        row = tl.sum(tl.where(i == pivot, left, 0.0), 0) * share
        column = tl.sum(tl.where(j == pivot, left, 0.0), 1) * share
        row = tl.where(index == pivot, pivotal * pivotal * share, row)
        inverse = tl.sum(tl.where(i == pivot, unit, 0.0), 0) * share
        left = tl.where((i == pivot) | (j == pivot), 0.0, left - column[:, None] * row[None, :])
        unit -= column[:, None] * inverse[None, :]
        diagonal = tl.where(index == pivot, -1.0, diagonal - column * column)
        root_squares += row * row
        inverse_squares += inverse * inverse
        tl.store(factors_ptr + t * R + index, row * norms if SECOND else row)
        tl.store(factors_ptr + R * R + index * R + t, inverse * reciprocal)
    if SECOND:
        tl.debug_barrier()
        root = _product(factors_ptr, first_ptr, R)
        inverse = _product(first_ptr + R * R, factors_ptr + R * R, R)
        tl.debug_barrier()
        tl.store(square(factors_ptr, R), root)
        tl.store(square(factors_ptr + R * R, R), inverse)
    else:
        kappa = tl.sqrt(tl.sum(root_squares, 0) * tl.sum(inverse_squares, 0))
        tl.store(kappa_ptr + factor, tl.where(finite, kappa, float("nan")))
        tl.store(norms_ptr + factor * R + index, norms)


@triton.jit
def _pivoted_qr(a, r, R: tl.constexpr):
    """Return R^T in C's column order, and Q, of Householder's column-pivoted QR of C = a^T."""
    index = tl.arange(0, R)
    i, j = index[:, None], index[None, :]
    q = tl.where(i == j, 1.0, 0.0).to(tl.float64)
    done = tl.zeros((R,), tl.int32)
    for t in range(r):
        rest = tl.where(j >= t, a, 0.0)
        squares = tl.where(done > 0, -1.0, tl.sum(rest * rest, 1))
        top, pivot = tl.max(squares, 0, return_indices=True)
        v = tl.sum(tl.where(i == pivot, rest, 0.0), 0)
        lead = tl.sum(tl.where(index == t, v, 0.0), 0)
        below = tl.sum(tl.where(index > t, v * v, 0.0), 0) > 0.0
        beta = tl.sqrt(tl.where(below, top, 1.0))
        beta = tl.where(lead > 0.0, -beta, beta)
        tau = tl.where(below, (beta - lead) / beta, 0.0)
        v = tl.where(index == t, 1.0, v / tl.where(below, lead - beta, 1.0))
        a -= (tau * tl.sum(rest * v[None, :], 1))[:, None] * v[None, :]
        a = tl.where((i == pivot) & (j > t), 0.0, a)
        q -= (tau * tl.sum(q * v[None, :], 1))[:, None] * v[None, :]
        done = tl.where(index == pivot, 1, done)
    return a, q


@triton.jit
def _rotated(x, y, s, tau):
    return x - s * (y + tau * x), y + s * (x - tau * y)


@triton.jit
def _moved(x, y, HALF: tl.constexpr):
    """Permute columns for the next round of a tournament: all but x[:, 0] walk once around."""
    k = tl.arange(0, HALF)[None, :] + tl.zeros(x.shape, tl.int32)
    to_right = tl.gather(tl.where(k == 0, y, x), tl.maximum(k - 1, 0), 1)
    to_left = tl.gather(y, tl.minimum(k + 1, HALF - 1), 1)
    return tl.where(k == 0, x, to_right), tl.where(k == HALF - 1, x, to_left)


@triton.jit
def _products(x, y):
    """Return x.x, y.y, x.y of the columns by one reduction, so one barrier instead of three."""
    both = x * y
    squares, gamma = tl.split(tl.sum(tl.join(tl.join(x * x, y * y), tl.join(both, both)), 0))
    alpha, beta = tl.split(squares)
    gamma, _ = tl.split(gamma)
    return alpha, beta, gamma


@triton.jit
def _lengths(norms_ptr, pair, count, index):
    """Return the length of column l of B times that of row l of A, and the largest product."""
    lengths = tl.load(norms_ptr + pair * index.shape[0] + index)
    lengths *= tl.load(norms_ptr + (count + pair) * index.shape[0] + index)
    return lengths, tl.max(lengths, 0)


@triton.jit
def _scaling(table_ptr, pair, count):
    return field(table_ptr, SCALING, pair, count).to(tl.float64, bitcast=True)


@triton.jit
def _last_pass(factors_ptr, kappa_ptr, factor, ACCURATE: tl.constexpr, R: tl.constexpr):
    """Return the address of root and inverse of the last pass over a factor."""
    factors_ptr += 4 * factor * R * R
    if ACCURATE:
        factors_ptr += tl.where(tl.load(kappa_ptr + factor) > SECOND_PASS, 2 * R * R, 0)
    return factors_ptr


@triton.jit(do_not_specialize=["count"])
def low_rank_core_kernel(
    table_ptr,
    kappa_ptr,
    norms_ptr,
    factors_ptr,
    vectors_ptr,
    info_ptr,
    count,
    ACCURATE: tl.constexpr,
    R: tl.constexpr,
):
    """Form a pair's core and its QR: R^T and Q, for Jacobi. Info: 0, or -1 if not finite."""
    pair = tl.program_id(0).to(tl.int64)
    kappa = tl.load(kappa_ptr + pair) + tl.load(kappa_ptr + count + pair)
    scaling = _scaling(table_ptr, pair, count)
    good = (tl.abs(scaling) < float("inf")) & (kappa == kappa)
    where = field(table_ptr, INDEX, pair, count)
    tl.store(info_ptr + where, tl.where(good, 0, -1).to(tl.int64))
    sign = tl.where(scaling > 0.0, 1.0, tl.where(scaling < 0.0, -1.0, 0.0))
    sign = tl.where(good, sign, 0.0)
    B_ptr = _last_pass(factors_ptr, kappa_ptr, pair, ACCURATE, R)
    A_ptr = _last_pass(factors_ptr, kappa_ptr, count + pair, ACCURATE, R)
    index = tl.arange(0, R)
    lengths, scale = _lengths(norms_ptr, pair, count, index)
    sign /= tl.where(scale > 0.0, scale, 1.0)
    a = tl.zeros((R, R), tl.float64)
    for k in range(R):
        weight = sign * tl.sum(tl.where(index == k, lengths, 0.0), 0)
        row = tl.load(B_ptr + index * R + k) * weight
        a += tl.load(A_ptr + index * R + k)[:, None] * row[None, :]
    a, q = _pivoted_qr(a, field(table_ptr, RANK, pair, count).to(tl.int32), R)
    vectors_ptr += 2 * pair * R * R
    tl.store(square(vectors_ptr, R), q)
    tl.store(square(vectors_ptr + R * R, R), a)


@triton.jit(do_not_specialize=["count"])
def low_rank_jacobi_kernel(
    table_ptr, vectors_ptr, info_ptr, count, SWEEPS: tl.constexpr, R: tl.constexpr
):
    """Rotates the columns of R^T until they are orthogonal; Q's columns follow.

    Info: how many pairs of columns the last sweep found not orthogonal, if it was not to be one.
    """
    pair = tl.program_id(0).to(tl.int64)
    vectors_ptr += 2 * pair * R * R
    HALF: tl.constexpr = R // 2
    v, w = tl.split(tl.reshape(tl.load(square(vectors_ptr, R)), (R, HALF, 2)))
    x, y = tl.split(tl.reshape(tl.load(square(vectors_ptr + R * R, R)), (R, HALF, 2)))
    sweep = 0
    busy = 1
    left = 0
    while (sweep < SWEEPS) & (busy > 0):
        large = tl.zeros((HALF,), tl.int32)
        turned = tl.zeros((HALF,), tl.int32)
        for _ in range(R - 1):
            alpha, beta, gamma = _products(x, y)
            product = alpha * beta
            projection = tl.where(product > TINY, gamma * gamma, 0.0)
            turn = projection > ORTHOGONAL * product
            turned += turn.to(tl.int32)
            large += (projection > LAST_SWEEP * product).to(tl.int32)
            d = beta - alpha
            twice = tl.where(d < 0.0, -2.0, 2.0) * gamma
            below = tl.abs(d) + tl.sqrt(d * d + twice * twice)
            t = tl.where(turn, twice, 0.0) / tl.where(turn, below, 1.0)
            c = 1.0 / tl.sqrt(1.0 + t * t)
            s = c * t
            tau = (s / (1.0 + c))[None, :]
            s = s[None, :]
            x, y = _rotated(x, y, s, tau)
            v, w = _rotated(v, w, s, tau)
            x, y = _moved(x, y, HALF)
            v, w = _moved(v, w, HALF)
        sweep += 1
        busy = tl.max(large, 0)
        left = tl.sum(turned, 0)
    tl.store(square(vectors_ptr, R), tl.reshape(tl.join(v, w), (R, R)))
    tl.store(square(vectors_ptr + R * R, R), tl.reshape(tl.join(x, y), (R, R)))
    where = field(table_ptr, INDEX, pair, count)
    tl.store(info_ptr + where, left.to(tl.int64), mask=busy > 0)


@triton.jit(do_not_specialize=["count"])
def low_rank_combine_kernel(
    table_ptr,
    kappa_ptr,
    norms_ptr,
    factors_ptr,
    vectors_ptr,
    combined_ptr,
    s_ptr,
    rank_ptr,
    info_ptr,
    count,
    ACCURATE: tl.constexpr,
    R: tl.constexpr,
):
    """Sort what Jacobi left into S, rank and the matrices that turn a pair's factors into U, V."""
    pair = tl.program_id(0).to(tl.int64)
    r = field(table_ptr, RANK, pair, count)
    width = tl.minimum(field(table_ptr, LENGTH, pair, count), r)
    width = tl.minimum(field(table_ptr, LENGTH + 1, pair, count), width)
    where = field(table_ptr, INDEX, pair, count)
    info = tl.load(info_ptr + where)
    good = info >= 0
    vectors_ptr += 2 * pair * R * R
    left = tl.load(square(vectors_ptr, R))
    right = tl.load(square(vectors_ptr + R * R, R))
    index = tl.arange(0, R)
    i = index[:, None]
    squares = tl.sum(right * right, 0)
    above = (squares[:, None] > squares[None, :]) | (
        (squares[:, None] == squares[None, :]) & (i < index[None, :])
    )
    position = tl.sum(above.to(tl.int32), 0)
    sigma = tl.sqrt(squares)
    lengths, scale = _lengths(norms_ptr, pair, count, index)
    sum_of_weights = tl.sum(lengths, 0) / tl.where(scale > 0.0, scale, 1.0)
    floor = r.to(tl.float64) * EPSILON * sum_of_weights
    rank = tl.minimum(tl.sum((sigma > floor).to(tl.int64), 0), width)
    kept = position < rank
    scale *= tl.abs(_scaling(table_ptr, pair, count))
    values = tl.where(good, tl.where(kept, sigma * scale, 0.0), float("nan")).to(tl.float32)
    outside = kept & ((values < NORMAL) | (values == float("inf")))
    tl.store(info_ptr + where, -2, mask=(info == 0) & (tl.max(outside.to(tl.int32), 0) > 0))
    s_ptr += field(table_ptr, OUTPUT_S, pair, count)
    tl.store(s_ptr + position, values, mask=position < width)
    tl.store(rank_ptr + where, rank)

    # The entry of a left vector that is largest in magnitude (the first of equals) is positive.
    _, largest = tl.max(tl.abs(left), 0, return_indices=True)
    top = tl.sum(tl.where(i == largest[None, :], left, 0.0), 0)
    sign = tl.where(kept, tl.where(top < 0.0, -1.0, 1.0), 0.0)
    right = sign / tl.where(kept, sigma, 1.0)
    combined_ptr += 2 * pair * R * R + i * R + position[None, :]
    inverse_ptr = _last_pass(factors_ptr, kappa_ptr, pair, ACCURATE, R) + R * R
    combined = _product(inverse_ptr, vectors_ptr, R) * sign[None, :]
    tl.store(combined_ptr, tl.where(good, combined, float("nan")))
    inverse_ptr = _last_pass(factors_ptr, kappa_ptr, count + pair, ACCURATE, R) + R * R
    combined = _product(inverse_ptr, vectors_ptr + R * R, R) * right[None, :]
    tl.store(combined_ptr + R * R, tl.where(good, combined, float("nan")))
