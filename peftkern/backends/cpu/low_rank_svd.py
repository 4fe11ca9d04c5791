"""SVD of low-rank products: C++ for cores and rotations, LAPACK for the cores of large ranks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from peftkern.backends.cpu.module import isa_and_threads, library, refusal_dense
from peftkern.backends.pointers import address, dtype_code, fresh
from peftkern.backends.reference import unrepresentable

# Up to which Jacobi on many cores at once beats LAPACK on one after the other: 224 cores of rank 16
# in 3.0 ms against 6.1, of rank 64 in 187 against 81 (one thread, Xeon with AMX, November 2026).
JACOBI_RANK = 32
JACOBI_SWEEPS = 30  # 6 to 12 are usual


def refusal(lora_B: list[Tensor], lora_A: list[Tensor]) -> str | None:
    """Refuse other devices and float64, which deserves better than a float64 Gram matrix."""
    for tensor in (*lora_B, *lora_A):
        if (reason := refusal_dense(tensor)) is not None:
            return reason
    return None


def low_rank_svd(
    lora_B: list[Tensor],
    lora_A: list[Tensor],
    scaling: list[float],
    vectors: bool,
    mode: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    lora_B, lora_A = ([factor.contiguous() for factor in side] for side in (lora_B, lora_A))
    k = [min(*B.shape, A.shape[1]) for B, A in zip(lora_B, lora_A, strict=True)]
    S_at = [0, *itertools.accumulate(k)]
    U_at, Vh_at = [0], [0]
    for i, width in enumerate(k):
        U_at.append(U_at[i] + lora_B[i].shape[0] * width)
        Vh_at.append(Vh_at[i] + lora_A[i].shape[1] * width)
    S = torch.empty(S_at[-1], dtype=torch.float32, device="cpu")
    U, Vh = (_empty_float32(at[-1] if vectors else 0) for at in (U_at, Vh_at))
    rank, info = (torch.empty(len(k), dtype=torch.int64, device="cpu") for _ in range(2))
    members: dict[int, list[int]] = {}
    for i, A in enumerate(lora_A):
        members.setdefault(A.shape[0], []).append(i)
    for r, where in members.items():
        B, A, factors, starts, widths, U_starts, Vh_starts = (
            [column[i] for i in where] for column in (lora_B, lora_A, scaling, S_at, k, U_at, Vh_at)
        )
        cores, inverse, *rest = low_rank_cores(B, A, r, factors, mode == "accurate")
        widths = torch.tensor(widths, device="cpu")
        sigma, left, right, rank_r, info_r = _core_svd(cores, *rest, widths, vectors)
        rank[where], info[where] = rank_r, info_r
        columns = torch.arange(r, device="cpu")
        inside = columns < widths[:, None]
        S[(torch.tensor(starts, device="cpu")[:, None] + columns)[inside]] = sigma[inside].float()
        if vectors:
            kept = torch.where(info_r == -1, -1, rank_r)
            low_rank_rotate(B, A, r, inverse, left, right, kept, U, U_starts, Vh, Vh_starts)
    return U, S, Vh, rank, info


def _core_svd(
    cores: Tensor, scale: Tensor, floor: Tensor, info: Tensor, widths: Tensor, vectors: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor]:
    """Return singular values of the updates themselves [L, r], vectors of the cores, rank, info."""
    r = cores.shape[1]
    if r <= JACOBI_RANK:
        sigma, left, right, more = jacobi_svd(cores, JACOBI_SWEEPS, vectors)
        info = torch.where(info < 0, info, more)
    else:
        sigma, left, right = _lapack_svd(cores, vectors)
    rank = torch.minimum((sigma > floor[:, None]).sum(1), widths)
    kept = torch.arange(r, device="cpu") < rank[:, None]
    sigma = torch.where(kept, sigma * scale[:, None], 0.0)
    outside = unrepresentable(sigma, kept, torch.float32)
    sigma[info < 0] = math.nan
    return sigma, left, right, rank, torch.where(outside & (info == 0), -2, info)


def _lapack_svd(cores: Tensor, vectors: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return what `jacobi_svd` does, for ranks where LAPACK's bidiagonal SVD is faster."""
    if not vectors:
        return torch.linalg.svdvals(cores), None, None
    left, sigma, right = torch.linalg.svd(cores)
    top = left.gather(1, left.abs().argmax(1, keepdim=True))
    sign = torch.where(top < 0, -1.0, 1.0).to(left.dtype)
    return sigma, (left * sign).contiguous(), (right.mT * sign).contiguous()


def low_rank_cores(
    lora_B: Sequence[Tensor],
    lora_A: Sequence[Tensor],
    r: int,
    scaling: Sequence[float],
    second_pass: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the r x r cores of pairs of rank r; see csrc/include/peftkern/low_rank_svd.h.

    Returns: cores [L, r, r], inverse [L, 2, r, r], scale [L], floor [L], float64; info int64 [L].
    """
    count = len(lora_B)
    factors = torch.tensor(scaling, dtype=torch.float64, device="cpu")
    cores, inverse = _float64(count, r, r), _float64(count, 2, r, r)
    scale, floor = _float64(count), _float64(count)
    info = torch.empty(count, dtype=torch.int64, device="cpu")
    library().low_rank_cores(
        *isa_and_threads(),
        _low_rank_pairs(lora_B, lora_A, r),
        r,
        address("scaling", factors, torch.float64, count),
        second_pass,
        *map(fresh, (cores, inverse, scale, floor, info)),
    )
    return cores, inverse, scale, floor, info


def jacobi_svd(
    cores: Tensor, sweeps: int, vectors: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """Decompose float64 cores [L, r, r]: singular values [L, r], left and right vectors, info."""
    count, r, _ = cores.shape
    sigma = _float64(count, r)
    left, right = (_float64(count, r, r) if vectors else None for _ in range(2))
    info = torch.empty(count, dtype=torch.int64, device="cpu")
    library().jacobi_svd(
        *isa_and_threads(),
        count,
        r,
        sweeps,
        address("cores", cores, torch.float64, count * r * r),
        fresh(sigma),
        fresh(left),
        fresh(right),
        fresh(info),
    )
    return sigma, left, right, info


def low_rank_rotate(
    lora_B: Sequence[Tensor],
    lora_A: Sequence[Tensor],
    r: int,
    inverse: Tensor,
    left: Tensor,
    right: Tensor,
    rank: Tensor,
    U: Tensor,
    U_offsets: Sequence[int],
    Vh: Tensor,
    Vh_offsets: Sequence[int],
) -> None:
    """Write U [m, k] and Vh [k, n] of every pair into flat float32 tensors, each at its offset.

    k = min(r, m, n); inverse from `low_rank_cores`; left, right [L, r, r] float64; rank int64.
    """
    count = len(lora_B)
    library().low_rank_rotate(
        *isa_and_threads(),
        _low_rank_pairs(lora_B, lora_A, r),
        r,
        address("inverse", inverse, torch.float64, 2 * count * r * r),
        address("left", left, torch.float64, count * r * r),
        address("right", right, torch.float64, count * r * r),
        address("rank", rank, torch.int64, count),
        address("U", U, torch.float32, U.numel()),
        U.numel(),
        U_offsets,
        address("Vh", Vh, torch.float32, Vh.numel()),
        Vh.numel(),
        Vh_offsets,
    )


def _empty_float32(numel: int) -> Tensor:
    """Allocate a pre-faulted float32 tensor, on huge pages if available."""
    tensor = torch.empty(numel, dtype=torch.float32, device="cpu")
    library().map_pages(fresh(tensor), 4 * numel)
    return tensor


def _low_rank_pairs(
    lora_B: Sequence[Tensor], lora_A: Sequence[Tensor], r: int
) -> list[tuple[int, int, int, int, int, int]]:
    """Return m, n, address and dtype of lora_B, address and dtype of lora_A of every pair."""
    return [
        (
            B.shape[0],
            A.shape[1],
            address("lora_B", B, B.dtype, B.shape[0] * r),
            dtype_code("lora_B", B),
            address("lora_A", A, A.dtype, r * A.shape[1]),
            dtype_code("lora_A", A),
        )
        for B, A in zip(lora_B, lora_A, strict=True)
    ]


def _float64(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float64, device="cpu")
