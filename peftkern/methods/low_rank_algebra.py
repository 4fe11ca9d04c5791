"""Exact algebra of low-rank updates scaling * B A of many layers: weighted sums, and truncation.

A sum of updates is the pair of their concatenated factors, and the best approximation of any pair
of a lower rank is in its SVD (`low_rank_svd`): no m x n matrix is formed.

A layer may be a stack of pairs, lora_B [E, m, r] and lora_A [E, r, n], as the experts of one module
are: its pairs keep one rank k, and its singular values are sqrt(sum_e S_e,k^2), whose squares are
what each k adds to the energy of the stack.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from peftkern.functional.low_rank_svd import (
    LoraFactors,
    LowRankSVD,
    low_rank_svd,
    low_rank_svdvals,
    truncate_lora,
)
from peftkern.functional.truncated_svd import Weight, truncated_svd
from peftkern.methods.rank_rules import RankRule, choose_ranks

__all__ = ["Loss", "above", "best_pair", "concatenate", "dora_weight", "keeping", "loss_of"]
__all__ += ["loss_of_part", "total_error", "truncate"]

CHUNK_BYTES = 256 << 20  # of factors that are decomposed at a time; their vectors take as much
RESOLVED = 1e-6  # of the largest singular value: smaller ones are `truncated_svd`'s rounding
FIRST = 64  # singular values that are computed before a rank is chosen by them
Progress = Callable[[int], None]
Choice = Callable[[Tensor, float], int | None]


class Loss(NamedTuple):
    """Cost of a truncation from `rank` to `kept`: energy |D|_F^2 before, lost of it; top, the
    largest singular value, and following, the largest that was lost, where they are known."""

    rank: int
    kept: int
    energy: float
    lost: float
    top: float | None
    following: float | None

    @property
    def share(self) -> float:
        """Lost energy over all energy."""
        return self.lost / self.energy if self.energy else 0.0

    @property
    def error(self) -> float:
        """Relative error |D - D'|_F / |D|_F."""
        return math.sqrt(self.share)


def total_error(losses: Sequence[Loss]) -> float:
    """Return the relative error of all layers, sqrt(sum lost / sum energy)."""
    energy = math.fsum(loss.energy for loss in losses)
    return math.sqrt(math.fsum(loss.lost for loss in losses) / energy) if energy else 0.0


def concatenate(terms: Sequence[tuple[Tensor, Tensor, float]]) -> LoraFactors:
    """Return the pair whose product is sum_i weight_i * lora_B_i @ lora_A_i, of rank sum r_i.

    Exact, but for the rounding of weight_i * lora_B_i, which a power of two does not cause.

    Args: (lora_B [..., m, r_i], lora_A [..., r_i, n], weight_i) of one layer.
    Returns: LoraFactors in float32, in float64 if any factor is.
    """
    wide = any(torch.float64 in (B.dtype, A.dtype) for B, A, _ in terms)
    dtype = torch.float64 if wide else torch.float32
    Bs = [B.detach().to(dtype) * weight for B, _, weight in terms]
    As = [A.detach().to(dtype) for _, A, _ in terms]
    return LoraFactors(torch.cat(Bs, -1), torch.cat(As, -2))


def truncate(
    lora_B: Sequence[Tensor],
    lora_A: Sequence[Tensor],
    scaling: Sequence[float],
    rule: RankRule,
    *,
    itemsize: int = 4,
    names: Sequence[str] | None = None,
    progress: Progress = lambda layers: None,
) -> tuple[list[LoraFactors], list[Loss]]:
    """Cut every layer to the rank that a rule chooses, with the least possible error.

    Args: lora_B [m, r] or [E, m, r] and lora_A [r, n] or [E, r, n] of each layer, any dtype of
        `low_rank_svd`; scaling of each; itemsize, bytes of a value of the results, for
        budget_bytes; names of the layers, for errors; progress, called with the number of layers
        that were finished.
    Returns: balanced factors for a scaling of 1, in float32 (float64 where the input is), and the
        loss of each layer.
    Raises: ValueError naming a layer that is not finite, or is beyond float32.
    Gradients: none.   Source: Eckart and Young 1936
    """
    names = names or [f"layer {number}" for number in range(len(lora_B))]
    ranks: list[int] = []
    if rule.compares_layers:
        spectra = []
        for chunk in _chunks(lora_B, lora_A):
            pairs = _pairs(lora_B[chunk], lora_A[chunk], scaling[chunk])
            spectra += _spectra(low_rank_svdvals(*pairs), lora_B[chunk])
        cost = [itemsize * _width(B, A) for B, A in zip(lora_B, lora_A, strict=True)]
        _check_finite(spectra, names)
        ranks = choose_ranks(spectra, rule, cost=cost)
    factors, losses = [], []
    for chunk in _chunks(lora_B, lora_A):
        svd = low_rank_svd(*_pairs(lora_B[chunk], lora_A[chunk], scaling[chunk]))
        spectra = _spectra(svd.S, lora_B[chunk])
        _check_finite(spectra, names[chunk])
        chosen = ranks[chunk] or choose_ranks(spectra, rule, scaling=scaling[chunk])
        factors += _cut(svd, chosen, lora_B[chunk])
        losses += map(loss_of, spectra, chosen)
        progress(len(chosen))
    return factors, losses


def best_pair(
    weight: Tensor,
    choice: int | Choice,
    *,
    minus: Weight | None = None,
    most: int | None = None,
) -> tuple[LoraFactors, Tensor, float]:
    """Return the best approximation of weight - minus, of a rank, or of one that is chosen.

    Args: choice, a rank, or a function of the largest singular values and of |weight - minus|_F^2
        that returns one, or None if it has to see smaller values; most, the largest rank.
    Returns: balanced factors, their singular values [k], and |weight - minus|_F.
    Raises: ValueError for a matrix that is not finite.
    """
    limit = min(*weight.shape, most or max(weight.shape))
    seen = min(choice if isinstance(choice, int) else FIRST, limit)
    while True:
        U, S, Vh, norm = truncated_svd(weight, seen, minus=minus)[:4]
        energy = norm.item() ** 2
        rank = seen if isinstance(choice, int) else choice(S, energy)
        if rank is not None or seen == limit:
            break
        seen = min(2 * seen, limit)
    rank = _resolved(S, 0.0) if rank is None else rank
    rank = max(1, min(rank, seen))
    U, S, Vh = U[:, :rank], S[:rank], Vh[:rank]
    root = S.sqrt()
    return LoraFactors(U * root, root[:, None] * Vh), S, norm.item()


def dora_weight(weight: Tensor, update: Tensor, magnitude: Tensor) -> Tensor:
    """Return the weight [m, n] that DoRA computes with, float32: magnitude / |W + D| (W + D), with
    norms over rows."""
    whole = weight.float() + update
    norm = torch.linalg.vector_norm(whole, dim=1)
    return whole.mul_((magnitude.flatten().float() / norm)[:, None])


def _resolved(values: Tensor, edge: float) -> int:
    return int((values > max(edge, RESOLVED * values[0].item())).sum())


def keeping(share: float) -> Choice:
    """Choose the least rank that keeps a share of the energy."""

    def choose(S: Tensor, energy: float) -> int | None:
        kept = S.double().square().cumsum(0).cpu()
        rank = int(torch.searchsorted(kept, share * energy)) + 1
        return rank if rank <= len(S) else None

    return choose


def above(edge: float) -> Choice:
    """Choose the number of singular values above an edge, of those that float32 resolves."""

    def choose(S: Tensor, energy: float) -> int | None:
        rank = _resolved(S, edge)
        return rank if rank < len(S) else None

    return choose


def loss_of_part(S: Tensor, energy: float, rank: int) -> Loss:
    """Return the loss of a matrix of which the first singular values are known, and kept."""
    kept = S.double().square().sum().item()
    return Loss(rank, len(S), energy, max(energy - kept, 0.0), S[0].item(), None)


def loss_of(S: Tensor, kept: int) -> Loss:
    """Return what is lost of singular values [k] when the first `kept` stay."""
    powers = S.double().square()
    following = S[kept].item() if kept < len(S) else 0.0
    energy, lost = powers.sum().item(), powers[kept:].sum().item()
    return Loss(len(S), kept, energy, lost, S[0].item() if len(S) else 0.0, following)


def _chunks(lora_B: Sequence[Tensor], lora_A: Sequence[Tensor]) -> Iterator[slice]:
    """Yield ranges of layers of about CHUNK_BYTES in float32."""
    start = size = 0
    for i, (B, A) in enumerate(zip(lora_B, lora_A, strict=True)):
        size += 4 * (B.numel() + A.numel())
        if size >= CHUNK_BYTES or i == len(lora_B) - 1:
            yield slice(start, i + 1)
            start, size = i + 1, 0


def _pairs(
    lora_B: Sequence[Tensor], lora_A: Sequence[Tensor], scaling: Sequence[float]
) -> tuple[list[Tensor], list[Tensor], list[float]]:
    """Return the pairs of all layers in one list, those of a stack one after the other."""
    Bs, As, factors = [], [], []
    for B, A, s in zip(lora_B, lora_A, scaling, strict=True):
        Bs += [B] if B.dim() == 2 else B.unbind()
        As += [A] if A.dim() == 2 else A.unbind()
        factors += [s] * _count(B)
    return Bs, As, factors


def _count(B: Tensor) -> int:
    return 1 if B.dim() == 2 else B.shape[0]


def _width(B: Tensor, A: Tensor) -> int:
    """Return how many values one rank of a layer has."""
    return _count(B) * (B.shape[-2] + A.shape[-1])


def _spectra(S: Sequence[Tensor], lora_B: Sequence[Tensor]) -> list[Tensor]:
    """Return the singular values of each layer [k]."""
    spectra, at = [], 0
    for B in lora_B:
        count = _count(B)
        one = S[at] if count == 1 else torch.stack(S[at : at + count]).double().norm(dim=0)
        spectra.append(one)
        at += count
    return spectra


def _check_finite(spectra: Sequence[Tensor], names: Sequence[str]) -> None:
    for sigma, name in zip(spectra, names, strict=True):
        if not torch.isfinite(sigma).all():
            raise ValueError(f"{name}: its update is not finite in float32")


def _cut(svd: LowRankSVD, ranks: Sequence[int], lora_B: Sequence[Tensor]) -> Iterator[LoraFactors]:
    """Yield the factors of each layer."""
    counts = [_count(B) for B in lora_B]
    of_pairs = [rank for rank, count in zip(ranks, counts, strict=True) for _ in range(count)]
    pairs = iter(truncate_lora(svd, of_pairs))
    for B, count in zip(lora_B, counts, strict=True):
        stack = [next(pairs) for _ in range(count)]
        yield stack[0] if B.dim() == 2 else LoraFactors(*map(torch.stack, zip(*stack, strict=True)))
