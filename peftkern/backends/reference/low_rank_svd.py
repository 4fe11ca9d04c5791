"""Oracle of the SVD of low-rank products, in plain torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def low_rank_svd(
    lora_B: list[Tensor],
    lora_A: list[Tensor],
    scaling: list[float],
    vectors: bool,
    mode: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Decompose scaling * B A through two QR decompositions in float64.

    B = Q_B R_B, A^T = Q_A R_A, and U_c S V_c^T = scaling R_B R_A^T give U = Q_B U_c, V = Q_A V_c.
    Accurate in either mode.

    Args: lists of L pairs lora_B [m, r] and lora_A [r, n], any float dtypes, and their scaling.
    Returns: all U [m, k] one after the other in one flat tensor, all S [k], all Vh [k, n], where
        k = min(m, r, n), float64 if any factor is, else float32; U and Vh are empty unless
        `vectors`; rank and info int64 [L].
    """
    wide = any(tensor.dtype is torch.float64 for tensor in (*lora_B, *lora_A))
    dtype = torch.float64 if wide else torch.float32
    pairs = zip(lora_B, lora_A, scaling, strict=True)
    U, S, Vh, rank, info = zip(*(_low_rank_svd(*pair, dtype) for pair in pairs), strict=True)
    U, S, Vh = (torch.cat([t.reshape(-1).to(dtype) for t in flat]) for flat in (U, S, Vh))
    if not vectors:
        U, Vh = S.new_empty(0), S.new_empty(0)
    return U, S, Vh, torch.stack(rank), torch.stack(info)


def low_rank_svd_out(
    lora_B: list[Tensor],
    lora_A: list[Tensor],
    scaling: list[float],
    mode: str,
    U: list[Tensor],
    S: list[Tensor],
    Vh: list[Tensor],
    rank: Tensor,
    info: Tensor,
) -> None:
    """Write what `low_rank_svd` returns to tensors of every pair's own."""
    *columns, rank_found, info_found = low_rank_svd(lora_B, lora_A, scaling, True, mode)
    for tensors, flat in zip((U, S, Vh), columns, strict=True):
        parts = flat.split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))
    rank.copy_(rank_found)
    info.copy_(info_found)


def _low_rank_svd(
    lora_B: Tensor, lora_A: Tensor, scaling: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    r = lora_B.shape[1]
    B, A = lora_B.double(), lora_A.double()
    finite = torch.isfinite(B).all() & torch.isfinite(A).all() & math.isfinite(scaling)
    B, b, b_top = _unit_columns(torch.where(finite, B, 0.0))
    At, a, a_top = _unit_columns(torch.where(finite, A, 0.0).mT)
    weights = b * a  # the share of column l of B and row l of A
    top = weights.amax() if r else weights.new_zeros(())
    weights = weights / torch.where(top > 0, top, 1.0)
    (Q_B, R_B), (Q_A, R_A) = torch.linalg.qr(B), torch.linalg.qr(At)
    core = math.copysign(1.0, scaling) * (R_B * weights) @ R_A.mT
    U, S, Vh = torch.linalg.svd(core, full_matrices=False)
    floor = r * torch.finfo(torch.float64).eps * weights.sum()
    rank = ((floor < S) & (scaling != 0)).sum()
    keep = torch.arange(len(S), device=B.device) < rank
    nan = torch.where(finite, 0.0, math.nan)
    U = torch.where(keep, Q_B @ U, 0.0) + nan
    Vh = torch.where(keep[:, None], Vh @ Q_A.mT, 0.0) + nan
    factor = torch.tensor(abs(scaling) if math.isfinite(scaling) else 0.0, dtype=torch.float64)
    S = torch.where(keep, _product(S, top, b_top, a_top, factor.to(S.device)), 0.0)
    info = -2 * unrepresentable(S, keep, dtype).long()
    return U, S + nan, Vh, rank, torch.where(finite, info, -1)


def unrepresentable(sigma: Tensor, keep: Tensor, dtype: torch.dtype) -> Tensor:
    """Flag rows of singular values [..., k] with one under `keep` that is no normal number of
    `dtype`: infinite there, zero, or subnormal. Returns: bool [...]."""
    limits, values = torch.finfo(dtype), sigma.to(dtype)
    return (keep & ~((values >= limits.tiny) & (values <= limits.max))).any(-1)


def _product(values: Tensor, *factors: Tensor) -> Tensor:
    """Compute values * factors; no product over- or underflows unless the result does."""
    exponents = 0
    for factor in factors:
        mantissa, exponent = torch.frexp(factor)
        values, exponents = values * mantissa, exponents + exponent
    # Both halves are float64 numbers. As integers they would make ldexp a power in float32.
    exponents = exponents.clamp(-2000, 2000)
    half = exponents // 2
    return torch.ldexp(torch.ldexp(values, half.double()), (exponents - half).double())


def _unit_columns(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the columns divided by their norms (zero columns stay), the norms over the matrix's
    largest value, and that value: in parts, as their products may overflow."""
    top = matrix.abs().amax() if matrix.numel() else matrix.new_zeros(())
    scaled = matrix / torch.where(top > 0, top, 1.0)
    columns = scaled.abs().amax(0) if len(matrix) else matrix.new_zeros(matrix.shape[1])
    scaled = scaled / torch.where(columns > 0, columns, 1.0)
    norm = torch.linalg.vector_norm(scaled, dim=0)
    return scaled / torch.where(norm > 0, norm, 1.0), norm * columns, top
