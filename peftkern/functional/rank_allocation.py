"""Statistics of the singular values of many layers, and what rank each layer is worth."""

from __future__ import annotations

import heapq
import itertools
import math
import numbers
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from peftkern.functional.arguments import is_listed


class SpectralStats(NamedTuple):
    """Statistics of `spectral_stats`: float64, [] or [L]."""

    energy: Tensor
    stable_rank: Tensor
    effective_rank: Tensor


def spectral_stats(S: Tensor | Sequence[Tensor]) -> SpectralStats:
    """Compute energy, stable rank and effective rank of singular values [k], or of a list.

    energy = sum sigma^2 = |dW|_F^2; stable_rank = energy / sigma_1^2;
    effective_rank = exp(-sum p log p), p = sigma / sum sigma. Both ranks of a zero matrix are 0,
    and NaN where S holds NaN or Inf. Energies beyond float64 are Inf or 0; the ranks stay right.

    Raises: TypeError or ValueError naming the argument.
    Gradients: none.
    Source: Rudelson and Vershynin 2007 (stable rank); Roy and Vetterli 2007 (effective rank)
    """
    single, values = _singular_values(S)
    rows = []
    for sigma in values:
        sigma = sigma.detach().double()
        top = sigma.amax() if sigma.numel() else sigma.new_zeros(())
        unit = sigma / torch.where(top == 0, 1.0, top)
        share = unit / torch.where(top == 0, 1.0, unit.sum())
        entropy = torch.special.entr(share).sum()
        effective = torch.where(top == 0, 0.0, entropy.exp())
        rows.append((sigma.square().sum(), unit.square().sum(), effective))
    if single:
        return SpectralStats(*rows[0])
    if not rows:
        return SpectralStats(*(torch.zeros(0, dtype=torch.float64) for _ in range(3)))
    return SpectralStats(*(torch.stack(column) for column in zip(*rows, strict=True)))


def allocate_rank(
    S: Sequence[Tensor],
    budget: float,
    *,
    cost: Sequence[float] | None = None,
    r_min: int | Sequence[int] = 0,
    r_max: int | Sequence[int] | None = None,
) -> list[int]:
    """Choose how many singular values each layer keeps so that the loss is least.

    Maximises the sum over layers of the first ranks[l] values sigma^2 subject to
    sum cost[l] * ranks[l] <= budget. At unit cost taking the largest is exactly optimal (Eckart and
    Young); with other costs, e.g. m + n of each layer, the largest sigma^2 / cost are taken as long
    as they fit, which is optimal up to one component. Ties go to the lower layer. Zeros are not
    taken beyond r_min. Reads S once on the host.

    Args: S [k] of each layer, descending; budget in units of cost; cost positive, for each layer
        (1); r_min and r_max one number or one for each layer (0 and k); a layer has at most k.
    Returns: the ranks, a list of int.
    Raises: TypeError or ValueError naming the argument: counts that differ, NaN or Inf (with the
        layer), values that do not descend, bounds that contradict, a budget below r_min's cost.
    Gradients: none.
    """
    if not is_listed(S):
        came = type(S).__name__
        raise TypeError(f"S: expected a list of tensors, one for each layer, got a {came}")
    if not isinstance(budget, (float, numbers.Real)):
        raise TypeError(f"budget: expected a number, got a {type(budget).__name__}")
    values = [sigma.detach().double().abs().tolist() for sigma in _singular_values(S)[1]]
    count = len(values)
    costs = [1.0] * count if cost is None else [float(c) for c in each("cost", cost, count)]
    low = each("r_min", r_min, count)
    high = each("r_max", [len(v) for v in values] if r_max is None else r_max, count)
    high = [min(h, len(v)) for h, v in zip(high, values, strict=True)]
    for layer, sigma in enumerate(values):
        if not all(math.isfinite(value) for value in sigma):
            raise ValueError(f"S: expected finite values, layer {layer} holds NaN or Inf")
        if any(a < b for a, b in itertools.pairwise(sigma)):
            raise ValueError(f"S: expected descending values, those of layer {layer} are not")
        if not costs[layer] > 0 or math.isinf(costs[layer]):
            raise ValueError(f"cost: expected positive numbers, layer {layer} has {costs[layer]}")
        if not 0 <= low[layer] <= high[layer]:
            raise ValueError(
                f"r_min, r_max: expected 0 <= r_min <= min(r_max, {len(sigma)}), layer {layer} "
                f"has {low[layer]} and {high[layer]}"
            )
    left = budget - sum(c * r for c, r in zip(costs, low, strict=True))
    if not left >= 0:
        raise ValueError(f"budget: expected at least {budget - left:g}, r_min's cost, got {budget}")
    ranks = list(low)

    def offer(layer: int) -> tuple[float, int]:
        # In the order of sigma^2 / cost, whose squares may be beyond float64.
        return -values[layer][ranks[layer]] / math.sqrt(costs[layer]), layer

    heap = [offer(layer) for layer in range(count) if ranks[layer] < high[layer]]
    heapq.heapify(heap)
    while heap:
        gain, layer = heapq.heappop(heap)
        if gain == 0.0 or costs[layer] > left:  # no later value of the layer is larger or cheaper
            continue
        left -= costs[layer]
        ranks[layer] += 1
        if ranks[layer] < high[layer]:
            heapq.heappush(heap, offer(layer))
    return ranks


def _singular_values(S: Tensor | Sequence[Tensor]) -> tuple[bool, list[Tensor]]:
    single = isinstance(S, Tensor)
    if not single and not is_listed(S):
        raise TypeError(f"S: expected a tensor or a list of them, got a {type(S).__name__}")
    values = [S] if single else list(S)
    for layer, sigma in enumerate(values):
        if not isinstance(sigma, Tensor):
            raise TypeError(f"S: expected tensors, layer {layer} is {type(sigma).__name__}")
        if sigma.dim() != 1:
            raise ValueError(f"S: expected [k], layer {layer} has {tuple(sigma.shape)}")
    return single, values


def each(name: str, value: float | Sequence[float], count: int) -> list:
    """Return `count` numbers: those given, or the one given."""
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, (float, numbers.Real)):
        return [value] * count
    values = list(value) if is_listed(value) else [value]
    if not all(isinstance(one, (float, numbers.Real)) for one in values):
        came = type(value).__name__
        raise TypeError(f"{name}: expected a number, or a list of {count}, got a {came}")
    if len(values) != count:
        raise ValueError(f"{name}: expected {count} numbers, got {len(values)}")
    return values
