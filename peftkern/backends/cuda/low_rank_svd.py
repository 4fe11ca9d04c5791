"""SVD of low-rank products: Cholesky and Jacobi kernels in CUDA C++, products of torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from peftkern.backends.cuda.module import (
    launching_on,
    library,
    refusal_device,
    refusal_library,
)
from peftkern.backends.pointers import DTYPE_CODES, address, address_table, fresh
from peftkern.backends.reference import unrepresentable

JACOBI_SWEEPS = 20  # 6 to 9 are usual


def refusal(lora_B: list[Tensor], lora_A: list[Tensor]) -> str | None:
    """Refuse devices, ranks, and float64, which deserves better than a float64 Gram matrix."""
    device = lora_B[0].device
    for tensor in (*lora_B, *lora_A):
        if tensor.dtype not in DTYPE_CODES:
            return f"the dtype is {tensor.dtype}"
        if tensor.device != device:
            return f"tensors are on {device} and {tensor.device}"
    r = max(A.shape[0] for A in lora_A)
    if reason := refusal_library():
        return reason
    module = library()
    if r > module.JACOBI_RANK:
        return f"the rank is {r}, more than {module.JACOBI_RANK}"
    return refusal_device(device)


def low_rank_svd(
    lora_B: list[Tensor],
    lora_A: list[Tensor],
    scaling: list[float],
    vectors: bool,
    mode: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run the steps of csrc/include/peftkern/low_rank_svd.h, one rank after the other, in float64.

    Cholesky and Jacobi are kernels, the products are torch's: up to seven launches for each pair.
    "accurate" takes the Gram matrix of every factor twice: the device alone knows which of them
    need it, and nothing waits for its answer.
    """
    device = lora_B[0].device
    sides = lora_B, [A.mT for A in lora_A]  # [length, r] each
    k = [min(*B.shape, A.shape[1]) for B, A in zip(lora_B, lora_A, strict=True)]
    lengths = [[factor.shape[0] for factor in side] for side in sides]
    numels = [[m * width * vectors for m, width in zip(side, k, strict=True)] for side in lengths]
    S, U, Vh = (
        torch.empty(sum(sizes), dtype=torch.float32, device=device) for sizes in (k, *numels)
    )
    S_parts, U_parts, Vh_parts = (
        flat.split(sizes) for flat, sizes in zip((S, U, Vh), (k, *numels), strict=True)
    )
    rank, info = (torch.zeros(len(k), dtype=torch.int64, device=device) for _ in range(2))
    members: dict[int, list[int]] = {}
    for i, A in enumerate(lora_A):
        if A.shape[0]:
            members.setdefault(A.shape[0], []).append(i)
    for where in members.values():
        factors = [side[i] for side in sides for i in where]
        bits = torch.tensor([scaling[i] for i in where], dtype=torch.float64, device="cpu")
        numbers = [*bits.view(torch.int64).tolist(), *(k[i] for i in where), *where]
        factor, most, at = address_table([], device, numbers).chunk(3)
        factor = factor.view(torch.float64)
        sigma, combined, rank_r, info_r = _decompose(factors, factor, most, mode == "accurate")
        rank[at], info[at] = rank_r, info_r
        for number, i in enumerate(where):
            S_parts[i].copy_(sigma[number, : k[i]])
            if not vectors:
                continue
            left, right = (side[number, :, : k[i]] for side in combined)
            U_parts[i].view(lengths[0][i], k[i]).copy_(lora_B[i].double() @ left)
            Vh_parts[i].view(k[i], lengths[1][i]).copy_(right.mT @ lora_A[i].double())
    return U, S, Vh, rank, info


def _decompose(
    factors: list[Tensor], scaling: Tensor, widths: Tensor, accurate: bool
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor, Tensor]:
    """Decompose the pairs of one rank: `factors` are all B [m, r], then all A^T [n, r].

    Returns: sigma [L, r], zero from the rank on; the matrices [L, r, r] that make U of B and V of
    A^T; rank, at most `widths`, and info.
    """
    count, r = len(scaling), factors[0].shape[1]
    gram = _grams(factors)
    finite = gram.isfinite().all(-1).all(-1)
    gram = torch.where(finite[:, None, None], gram, 0.0)
    root, inverse, norms = gram_roots(gram)
    if accurate:
        root_of_Q, inverse_of_Q, norms_of_Q = gram_roots(_grams(factors, inverse))
        root = (root_of_Q * norms_of_Q[:, None, :]) @ root
        inverse = inverse @ inverse_of_Q
    bad = ~(finite[:count] & finite[count:] & scaling.isfinite())
    weights = norms[:count] * norms[count:]  # of column l of B times row l of A
    scale = weights.amax(1)
    weights = torch.where((scale > 0)[:, None], weights / scale[:, None], 0.0)
    weights = torch.where(bad[:, None], 0.0, weights * scaling.sign()[:, None])
    cores = (root[:count] * weights[:, None, :]) @ root[count:].mT
    sigma, left, right, more = jacobi_svd(cores, JACOBI_SWEEPS, True)
    floor = r * 2.0**-52 * weights.abs().sum(1)  # what lies below are rounding errors
    rank = torch.minimum((sigma > floor[:, None]).sum(1), widths)
    kept = torch.arange(r, device=sigma.device) < rank[:, None]
    sigma = torch.where(kept, sigma * (scale * scaling.abs())[:, None], 0.0)
    outside = unrepresentable(sigma, kept, torch.float32)
    sigma = torch.where(bad[:, None], math.nan, sigma)
    unit = torch.where(kept, 1.0, 0.0)[:, None, :]
    unit = torch.where(bad[:, None, None], math.nan, unit)
    combined = inverse[:count] @ left * unit, inverse[count:] @ right * unit
    info = torch.where(bad, -1, torch.where(outside & (more == 0), -2, more))
    return sigma, combined, rank, info


def _grams(factors: list[Tensor], inverse: Tensor | None = None) -> Tensor:
    """Return the Gram matrices [2 L, r, r] of the factors, or of factors[i] @ inverse[i]."""
    r = factors[0].shape[1]
    grams = torch.empty(len(factors), r, r, dtype=torch.float64, device=factors[0].device)
    for i, factor in enumerate(factors):
        columns = factor.double()
        if inverse is not None:
            columns = columns @ inverse[i]
        torch.mm(columns.mT, columns, out=grams[i])
    return grams


def jacobi_svd(
    cores: Tensor, sweeps: int, vectors: bool, shared_limit: int = 0
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """Decompose float64 matrices [n, r, r], r up to 128, that need not be finite.

    One that is not gives NaN and info -1. `shared_limit` bounds the shared memory of a matrix in
    bytes; 0: by the device.

    Returns: singular values [n, r], left and right vectors (columns) or None, info.
    """
    address = _square("cores", cores)
    device, (count, r, _) = cores.device, cores.shape
    sigma = torch.empty(count, r, dtype=torch.float64, device=device)
    left, right = (torch.empty_like(cores) if vectors else None for _ in range(2))
    info = torch.empty(count, dtype=torch.int64, device=device)
    if not cores.numel():
        return sigma, left, right, info.zero_()
    with launching_on(device) as stream:
        workspace = _workspace(cores, vectors, shared_limit)
        library().jacobi_svd(
            stream,
            count,
            r,
            sweeps,
            address,
            fresh(sigma),
            fresh(left),
            fresh(right),
            fresh(info),
            fresh(workspace),
            workspace.numel(),
            shared_limit,
        )
    return sigma, left, right, info


def gram_roots(grams: Tensor, shared_limit: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Decompose (pivoted Cholesky) finite float64 Gram matrices [n, r, r] of Q root D.

    grams = D root^T root D with D = diag(norms), Q = factor @ inverse. Rows of root and columns of
    inverse are zero from the rank on.

    Returns: root and inverse [n, r, r], norms [n, r].
    """
    address = _square("grams", grams)
    device, (count, r, _) = grams.device, grams.shape
    roots, inverses = torch.empty_like(grams), torch.empty_like(grams)
    norms = torch.empty(count, r, dtype=torch.float64, device=device)
    with launching_on(device) as stream:
        workspace = _workspace(grams, True, shared_limit)
        library().gram_roots(
            stream,
            count,
            r,
            address,
            fresh(roots),
            fresh(inverses),
            fresh(norms),
            fresh(workspace),
            workspace.numel(),
            shared_limit,
        )
    return roots, inverses, norms


def _square(name: str, matrices: Tensor) -> int:
    """Return the address of contiguous float64 matrices [n, r, r] that Jacobi's kernels take."""
    shape = tuple(matrices.shape)
    most = library().JACOBI_RANK
    if len(shape) != 3 or shape[1] != shape[2] or shape[1] > most:
        raise ValueError(f"{name}: expected [n, r, r] with r up to {most}, got {shape}")
    return address(name, matrices, torch.float64, matrices.numel(), matrices.device)


def _workspace(matrices: Tensor, vectors: bool, shared_limit: int) -> Tensor:
    """Allocate the global-memory spill workspace of these matrices."""
    count, r, _ = matrices.shape
    each = library().jacobi_workspace(r, vectors, shared_limit)
    return torch.empty(count * each, dtype=torch.float64, device=matrices.device)
