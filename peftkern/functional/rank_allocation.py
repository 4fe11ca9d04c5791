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

from peftkern.functional.arguments import check_float, check_values, integer, is_listed, mismatch
from peftkern.functional.knapsack import improve

COSTS = ("rank", "parameters", "bytes", "flops")


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
    cost: Sequence[float] | str | None = None,
    r_min: int | Sequence[int] = 0,
    r_max: int | Sequence[int] | None = None,
    shapes: Sequence[tuple[int, int]] | None = None,
    itemsize: int = 4,
    exact: bool = True,
) -> list[int]:
    """Choose how many singular values each layer keeps so that the loss is least.

    Maximises the sum over layers of the first ranks[l] values sigma^2 subject to
    sum cost[l] * ranks[l] <= budget. At unit cost taking the largest is exactly optimal (Eckart and
    Young), with floors and caps, too. With other costs the largest sigma^2 / cost are taken as long
    as they fit, which is worth less than the best choice by less than the largest component; with
    `exact` that is then improved to the best choice, to 1e-12 of all energy, unless more than 2^22
    partial choices compete, as where sigma^2 / cost is the same for thousands of values: then to
    the best one that was found. Ties go to the lower layer. Zeros are not taken beyond r_min.
    Reads S once on the host.

    Args: S [k] of each layer, descending, or [E, k] of experts whose updates have one rank
        together: their squares add up; budget in units of cost; cost positive, of one rank of each
        layer (1), or "rank", "parameters", "bytes" or "flops" of the layers' `shapes` (m, n), see
        `rank_costs`; r_min and r_max one number or one for each layer (0 and k); a layer has at
        most k; itemsize, bytes of a value, for "bytes"; exact, False for the first step alone.
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
    S = list(S)
    values = [sigma.detach().double().abs().tolist() for sigma in _joined(S)]
    count = len(values)
    if not isinstance(exact, bool):
        raise TypeError(f"exact: expected True or False, got a {type(exact).__name__}")
    if isinstance(cost, str):
        cost = _named_costs(cost, S, shapes, itemsize)
    costs = [1.0] * count if cost is None else [float(c) for c in each("cost", cost, count)]
    low = [integer("r_min", r) for r in each("r_min", r_min, count)]
    high = [len(v) for v in values] if r_max is None else each("r_max", r_max, count)
    high = [integer("r_max", r) for r in high]
    high = [min(h, len(v)) for h, v in zip(high, values, strict=True)]
    _check_layers(values, costs, low, high)
    left = budget - sum(c * r for c, r in zip(costs, low, strict=True))
    if not left >= 0:
        raise ValueError(f"budget: expected at least {budget - left:g}, r_min's cost, got {budget}")
    ranks = _filled(values, costs, low, high, left)
    if exact and len(set(costs)) > 1:
        ranks = _improved(values, costs, low, high, budget, ranks)
    return ranks


def rank_costs(
    kind: str, shapes: Sequence[tuple[int, int]], *, itemsize: int | Sequence[int] = 4
) -> list[float]:
    """Return what one rank costs in each layer: lora_B [m, 1] and lora_A [1, n].

    kind          cost of a rank
    rank          1
    parameters    m + n
    bytes         itemsize * (m + n)
    flops         2 * (m + n), of a token's forward pass

    Args: shapes (m, n) of every layer's weight; itemsize, bytes of a value, one or one per layer.
    Raises: TypeError or ValueError naming the argument.
    """
    if kind not in COSTS:
        raise ValueError(f"cost: expected one of {', '.join(COSTS)}, or numbers, got {kind!r}")
    if not is_listed(shapes) or not all(is_listed(shape) and len(shape) == 2 for shape in shapes):
        raise mismatch("shapes", "(m, n) of every layer", shapes)
    shapes = [[integer("shapes", size) for size in shape] for shape in shapes]
    sizes = [integer("itemsize", size, 1) for size in each("itemsize", itemsize, len(shapes))]
    if kind == "rank":
        return [1.0] * len(shapes)
    units = sizes if kind == "bytes" else [2 if kind == "flops" else 1] * len(shapes)
    return [float(unit * (m + n)) for unit, (m, n) in zip(units, shapes, strict=True)]


def _named_costs(
    kind: str, S: list[Tensor], shapes: Sequence[tuple[int, int]] | None, itemsize: int
) -> list[float]:
    """Return `rank_costs` of layers, of experts together."""
    if kind == "rank":
        return [1.0] * len(S)
    costs = rank_costs(kind, shapes, itemsize=itemsize)
    if len(costs) != len(S):
        raise ValueError(f"shapes: expected (m, n) of {len(S)} layers, got {len(costs)}")
    experts = [sigma.shape[0] if sigma.dim() == 2 else 1 for sigma in S]
    return [count * one for count, one in zip(experts, costs, strict=True)]


def _joined(S: list[Tensor]) -> list[Tensor]:
    """Return [k] of every layer: of experts [E, k] the norms over them, scaled against overflow."""
    found = []
    for layer, sigma in enumerate(S):
        if isinstance(sigma, Tensor):
            check_values(f"S[{layer}]", sigma)
        if isinstance(sigma, Tensor) and sigma.dim() == 2:
            sigma = sigma.detach().double()
            top = sigma.abs().amax() if sigma.numel() else sigma.new_ones(())
            top = torch.where(top > 0, top, 1.0)
            sigma = (sigma / top).square().sum(0).sqrt() * top
        found.append(sigma)
    return _singular_values(found)[1]


def _check_layers(
    values: list[list[float]], costs: list[float], low: list[int], high: list[int]
) -> None:
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


def _improved(
    values: list[list[float]],
    costs: list[float],
    low: list[int],
    high: list[int],
    budget: float,
    ranks: list[int],
) -> list[int]:
    """Return the ranks of the greatest energy, `ranks` if none have more."""
    # As shares of the largest, whose squares stay within float64.
    top = max((sigma[0] for sigma in values if sigma), default=0.0) or 1.0
    free = [
        [(one / top) ** 2 for one in sigma[lo:hi]]
        for sigma, lo, hi in zip(values, low, high, strict=True)
    ]
    left = budget - sum(c * r for c, r in zip(costs, low, strict=True))
    more = improve(free, costs, left, [r - lo for r, lo in zip(ranks, low, strict=True)])
    best = [lo + k for lo, k in zip(low, more, strict=True)]
    if best == ranks:
        return ranks
    left = budget - sum(c * r for c, r in zip(costs, best, strict=True))
    return _filled(values, costs, best, high, left)


def _filled(
    values: list[list[float]], costs: list[float], ranks: list[int], high: list[int], left: float
) -> list[int]:
    """Return ranks with more values, by value and cost, as long as they fit."""
    ranks = list(ranks)

    def offer(layer: int) -> tuple[float, int]:
        # In the order of sigma^2 / cost, whose squares may be beyond float64.
        return -values[layer][ranks[layer]] / math.sqrt(costs[layer]), layer

    heap = [offer(layer) for layer in range(len(ranks)) if ranks[layer] < high[layer]]
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
        check_float("S" if single else f"S[{layer}]", sigma)
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
