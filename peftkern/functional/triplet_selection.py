"""Choice of AdaLoRA's triplets under costs, floors and caps, without waiting for the device."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

_PARTS = 1 << 45  # that costs which are no integers are counted in: sums are exact, in any order


class _Tables(NamedTuple):
    """What does not change from mask to mask, int64 on the device, of all triplets in turn.

    owner, the layer; place, in the layer; cost; low and high, of the layer.
    """

    owner: Tensor
    place: Tensor
    cost: Tensor
    low: Tensor
    high: Tensor


def select_triplets(
    scores: Tensor,
    ranks: Sequence[int],
    budget: float,
    cost: Sequence[float],
    r_min: Sequence[int],
    r_max: Sequence[int],
) -> Tensor:
    """Return the mask of the triplets to keep, bool like scores.

    Every layer keeps its r_min best. Of the others, at most r_max in a layer, triplets are taken by
    score / cost and then by lower index, each one that fits into what is left of the budget. With
    one cost for all that is the greatest sum of scores there is; else it is below that by less than
    the greatest score of a triplet that was left out. NaN counts as the greatest score.

    Args: scores [sum of ranks]; cost of a triplet, positive, r_min and r_max of every layer.
    Raises: ValueError if the budget is below what r_min costs.
    """
    low = [min(lo, r) for lo, r in zip(r_min, ranks, strict=True)]
    units, whole = _units(cost, ranks, budget)
    left = whole - sum(unit * lo for unit, lo in zip(units, low, strict=True))
    if left < 0:
        least = sum(c * lo for c, lo in zip(cost, low, strict=True))
        raise ValueError(f"budget: expected at least {least:g}, the cost of r_min, got {budget:g}")
    args = tuple(ranks), tuple(units), tuple(low), tuple(r_max)
    tables = _tables(*args, scores.device)
    wide = torch.where(scores.isnan(), torch.inf, scores.double())
    rank = _ranks_in_layers(wide, tables)
    keep = rank < tables.low
    order = (wide / tables.cost).argsort(descending=True, stable=True)
    taken = ((rank < tables.high) & ~keep)[order]
    sizes, count = tables.cost[order], len(scores)
    at = torch.arange(count, device=scores.device)
    # What does not fit is left out, and with it all later ones that cost as much or more: nothing
    # fits later that does not now. Then sums go on behind it, until no cost is left to be dropped.
    for _ in range(len({unit for unit, r in zip(units, ranks, strict=True) if r})):
        misfit = taken & ((taken * sizes).cumsum(0) > left)
        first = torch.where(misfit, at, count).amin()
        least = torch.where(at == first, sizes, 0).sum()
        taken = taken & ((at < first) | (sizes < least))
    return keep.scatter(0, order, taken | keep[order])


def _ranks_in_layers(scores: Tensor, tables: _Tables) -> Tensor:
    """Return how many triplets of the same layer come before each, by score and then by index."""
    order = scores.argsort(descending=True, stable=True)
    order = order[tables.owner[order].argsort(stable=True)]
    return torch.empty_like(order).scatter_(0, order, tables.place)


def _units(cost: Sequence[float], ranks: Sequence[int], budget: float) -> tuple[list[int], int]:
    """Return costs and budget as integers: as they are, or in parts of what all triplets cost."""
    total = math.fsum(c * r for c, r in zip(cost, ranks, strict=True))
    if all(float(c).is_integer() for c in cost) and total < 2.0**53:
        return [int(c) for c in cost], int(min(budget, 2.0**62))
    scale = _PARTS / total if total else 1.0
    slack = sum(ranks)  # each cost may be rounded up by half of a part
    return [max(round(c * scale), 1) for c in cost], int(min(budget, total) * scale) + slack


@functools.lru_cache(maxsize=16)
def _tables(
    ranks: tuple[int, ...],
    units: tuple[int, ...],
    low: tuple[int, ...],
    high: tuple[int, ...],
    device: torch.device,
) -> _Tables:
    layers = torch.tensor([units, low, high, [*accumulate(ranks, initial=0)][:-1]])
    owner = torch.arange(len(ranks)).repeat_interleave(torch.tensor(ranks, dtype=torch.int64))
    cost, least, most, first = layers[:, owner]
    place = torch.arange(len(owner)) - first
    return _Tables(*(table.to(device) for table in (owner, place, cost, least, most)))
