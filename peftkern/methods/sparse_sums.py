"""Weighted sums of sparsified updates: TIES, DARE and magnitude pruning of dense matrices.

What is dropped is chosen by element, so the result has no low rank and is formed densely, one
layer at a time; `peftkern.methods.low_rank_algebra` has what needs no dense matrix. The expectation
of DARE's result is the plain weighted sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

__all__ = ["METHODS", "SIGNS", "sparse_sum"]

METHODS = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
SIGNS = ("total", "frequency")


def sparse_sum(
    method: str,
    updates: Sequence[Callable[[], Tensor]],
    weights: Sequence[float],
    density: float,
    *,
    signs: str = "total",
    generator: Generator | None = None,
) -> Tensor:
    """Return a weighted sum of updates, of each of which a share `density` of the elements stays.

    magnitude_prune keeps the largest, ties and dare_* as named: the largest (ties) or, divided by
    density, random ones (dare). *_ties then drop what is not of the sign that the element has in
    most updates, by its sum ("total") or by count ("frequency"), and divide by how many remain.

    Args: updates, one function for each, which makes a matrix that may be written to; density in
        (0, 1]; generator of the random choice, default torch's.
    Raises: ValueError naming the argument.
    Source: Yadav et al. 2023, arXiv:2306.01708 (TIES); Yu et al. 2023, arXiv:2311.03099 (DARE)
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    if density is None or not 0 < density <= 1:
        raise ValueError(f"density: expected a number in (0, 1], got {density}")
    if signs not in SIGNS:
        raise ValueError(f"signs: expected one of {', '.join(SIGNS)}, got {signs!r}")
    drop = _drop_random_ if method.startswith("dare") else _keep_largest_
    kept = [drop(update(), density, generator) for update in updates]
    if not method.endswith("ties"):
        total = torch.zeros_like(kept[0])
        for update, weight in zip(kept, weights, strict=True):
            total.add_(update, alpha=weight)
        return total
    score = torch.zeros_like(kept[0])
    for update in kept:
        score += update if signs == "total" else update.sign()
    elected = torch.where(score >= 0, 1.0, -1.0)
    total, count = torch.zeros_like(score), torch.zeros_like(score)
    for update, weight in zip(kept, weights, strict=True):
        agrees = update.sign() == elected
        total.add_(update * agrees, alpha=weight)
        count += agrees
    return total / count.clamp_(min=1.0)


def _keep_largest_(update: Tensor, density: float, generator: Generator | None) -> Tensor:
    """Zero all but the int(density * size) elements of the largest magnitude, equal ones kept."""
    count = int(density * update.numel())
    if count == update.numel():
        return update
    if count == 0:
        return update.zero_()
    magnitude = update.abs()
    least = magnitude.flatten().kthvalue(update.numel() - count + 1).values
    return update.mul_(magnitude >= least)


def _drop_random_(update: Tensor, density: float, generator: Generator | None) -> Tensor:
    if density == 1:
        return update
    chosen = torch.bernoulli(torch.full_like(update, density), generator=generator)
    return update.mul_(chosen).div_(density)
