"""SVD of low-rank products: C++, with LAPACK for the cores of large ranks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from peftkern.backends.cpu.module import isa_and_threads, library, refusal_dense
from peftkern.backends.pointers import address, addresses, dtype_code, fresh, optional

# Up to which Jacobi on many cores at once beats LAPACK on one after the other: 224 cores of rank 16
# in 3.0 ms against 6.1, of rank 64 in 187 against 81 (one thread, Xeon with AMX, November 2026).
JACOBI_RANK = 32
JACOBI_SWEEPS = 30  # 6 to 12 are usual
# From which on results are written past the caches, new memory too: what the system has zeroed at
# its first touch has left them by then (224 updates of 4096x4096, r=16: 66 ms of processor time
# instead of 70, Xeon with AMX, November 2026).
STREAM_BYTES = 8 << 20


def refusal(lora_B: list[Tensor], lora_A: list[Tensor]) -> str | None:
    """Refuse other devices and float64, which deserves better than a float64 Gram matrix."""
    kinds = {(tensor.dtype, tensor.device): tensor for tensor in (*lora_B, *lora_A)}
    return next(filter(None, map(refusal_dense, kinds.values())), None)


refusal_out = refusal


class Places(NamedTuple):
    """Addresses of the float32 results of every pair, U and Vh 0 for values alone."""

    U: Sequence[int]
    S: Sequence[int]
    Vh: Sequence[int]


def low_rank_svd(
    lora_B: list[Tensor],
    lora_A: list[Tensor],
    scaling: list[float],
    vectors: bool,
    mode: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    sizes = _sizes(lora_B, lora_A)
    results, places = [], []
    for numels, wanted in zip(sizes, (vectors, True, vectors), strict=True):
        flat = _empty_float32(sum(numels) if wanted else 0)
        starts = itertools.accumulate((4 * n for n in numels[:-1]), initial=fresh(flat))
        results.append(flat)
        places.append(list(starts) if wanted else [0] * len(numels))
    rank, info = (torch.empty(len(lora_B), dtype=torch.int64, device="cpu") for _ in range(2))
    _decompose(lora_B, lora_A, scaling, mode, Places(*places), vectors, rank, info)
    return *results, rank, info


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
    columns = zip(("U", "S", "Vh"), (U, S, Vh), _sizes(lora_B, lora_A), strict=True)
    places = Places(*(addresses(name, t, torch.float32, numels) for name, t, numels in columns))
    _decompose(lora_B, lora_A, scaling, mode, places, True, rank, info)


def _sizes(lora_B: list[Tensor], lora_A: list[Tensor]) -> tuple[list[int], list[int], list[int]]:
    """Return how many values U, S and Vh of every pair have."""
    shapes = [(*B.shape, A.shape[1]) for B, A in zip(lora_B, lora_A, strict=True)]
    k = [min(shape) for shape in shapes]
    return (
        [m * width for (m, _, _), width in zip(shapes, k, strict=True)],
        k,
        [n * width for (_, _, n), width in zip(shapes, k, strict=True)],
    )


def _decompose(
    lora_B: list[Tensor],
    lora_A: list[Tensor],
    scaling: list[float],
    mode: str,
    places: Places,
    vectors: bool,
    rank: Tensor,
    info: Tensor,
) -> None:
    """Write the results of all pairs, those of each rank in one go."""
    in_U, _, in_Vh = (4 * sum(numels) for numels in _sizes(lora_B, lora_A))
    stream = in_U + in_Vh > STREAM_BYTES
    lora_B, lora_A = ([factor.contiguous() for factor in side] for side in (lora_B, lora_A))
    ranks = [len(A) for A in lora_A]
    for r in dict.fromkeys(ranks):
        where = [i for i, other in enumerate(ranks) if other == r]
        B, A, factors, *at = ([c[i] for i in where] for c in (lora_B, lora_A, scaling, *places))
        pairs, second_pass = low_rank_pairs(B, A, r, Places(*at)), mode == "accurate"
        if r <= JACOBI_RANK:
            results = low_rank_pairs_svd(pairs, r, factors, second_pass, vectors, stream)
        else:
            cores, *rest = low_rank_cores(pairs, r, factors, second_pass)
            results = low_rank_results(pairs, r, _lapack_svd(cores, vectors), *rest, stream)
        rank[where], info[where] = results


def _lapack_svd(cores: Tensor, vectors: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return what `jacobi_svd` does, for ranks where LAPACK's bidiagonal SVD is faster."""
    if not vectors:
        return torch.linalg.svdvals(cores), None, None
    left, sigma, right = torch.linalg.svd(cores)
    top = left.gather(1, left.abs().argmax(1, keepdim=True))
    sign = torch.where(top < 0, -1.0, 1.0).to(left.dtype)
    return sigma, (left * sign).contiguous(), (right.mT * sign).contiguous()


def low_rank_pairs(
    lora_B: Sequence[Tensor], lora_A: Sequence[Tensor], r: int, places: Places
) -> list[tuple[int, ...]]:
    """Return what C++ takes of every pair of rank r: `low_rank_pairs` in csrc/cpu/bind.cpp."""
    m, n = [len(B) for B in lora_B], [A.shape[1] for A in lora_A]
    columns = [m, n]
    for name, factors, lengths in (("lora_B", lora_B, m), ("lora_A", lora_A, n)):
        columns.append(addresses(name, factors, None, [length * r for length in lengths]))
        columns.append([dtype_code(name, factor) for factor in factors])
    return list(zip(*columns, *places, strict=True))


def low_rank_pairs_svd(
    pairs: list[tuple[int, ...]],
    r: int,
    scaling: Sequence[float],
    second_pass: bool,
    vectors: bool,
    stream: bool,
) -> tuple[Tensor, Tensor]:
    """Write U, S and Vh of pairs of rank r where they say, by all steps; return rank and info."""
    count = len(pairs)
    factors = torch.tensor(scaling, dtype=torch.float64, device="cpu")
    rank, info = _int64(count), _int64(count)
    library().low_rank_svd(
        *isa_and_threads(),
        pairs,
        r,
        address("scaling", factors, torch.float64, count),
        second_pass,
        JACOBI_SWEEPS,
        vectors,
        stream,
        fresh(rank),
        fresh(info),
    )
    return rank, info


def low_rank_cores(
    pairs: list[tuple[int, ...]], r: int, scaling: Sequence[float], second_pass: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the r x r cores of pairs of rank r; see csrc/include/peftkern/low_rank_svd.h.

    Returns: cores [L, r, r], inverse [L, 2, r, r], scale [L], floor [L], float64; info int64 [L].
    """
    count = len(pairs)
    factors = torch.tensor(scaling, dtype=torch.float64, device="cpu")
    cores, inverse = _float64(count, r, r), _float64(count, 2, r, r)
    scale, floor, info = _float64(count), _float64(count), _int64(count)
    library().low_rank_cores(
        *isa_and_threads(),
        pairs,
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
    info = _int64(count)
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


def low_rank_results(
    pairs: list[tuple[int, ...]],
    r: int,
    svd: tuple[Tensor, Tensor | None, Tensor | None],
    inverse: Tensor,
    scale: Tensor,
    floor: Tensor,
    info: Tensor,
    stream: bool,
) -> tuple[Tensor, Tensor]:
    """Write U, S and Vh of pairs of rank r where they say; return rank and info.

    svd: singular values of the cores [L, r], left and right vectors [L, r, r], or None for both;
    the rest from `low_rank_cores`.
    """
    count, (sigma, left, right) = len(pairs), svd
    rank, info = _int64(count), info.clone()
    library().low_rank_results(
        *isa_and_threads(),
        pairs,
        r,
        address("inverse", inverse, torch.float64, 2 * count * r * r),
        optional("left", left, torch.float64, count * r * r),
        optional("right", right, torch.float64, count * r * r),
        address("sigma", sigma, torch.float64, count * r),
        address("scale", scale, torch.float64, count),
        address("floor", floor, torch.float64, count),
        stream,
        fresh(rank),
        address("info", info, torch.int64, count),
    )
    return rank, info


def _empty_float32(numel: int) -> Tensor:
    """Allocate a float32 tensor whose pages are huge if the system has such to give."""
    tensor = torch.empty(numel, dtype=torch.float32, device="cpu")
    library().advise_huge_pages(fresh(tensor), 4 * numel)
    return tensor


def _float64(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float64, device="cpu")


def _int64(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.int64, device="cpu")
