"""Exact choice of how many values each layer keeps under a budget, near a greedy one.

Values of a layer descend and cost the same, so a choice of values is a knapsack. Its linear
relaxation takes them by value per cost up to a critical ratio d; any choice x is worth

    value(x) = bound - sum of |value - d cost| over the items in which x differs - d * (unspent)

Items in which a better choice can differ have a penalty |value - d cost| below the gap between the
bound and the best choice so far: few of thousands. They are taken up from the least penalty on,
with the choices that none other beats in both cost and value (Nemhauser and Ullmann 1969; the
expanding core is Pisinger's, 1997, doi:10.1287/opre.45.5.758).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

CHOICES = 1 << 22  # that are looked at; beyond them the best one so far is returned
_ROUNDING = 1e-12  # of the bound: gains below it are no gains


class _Item(NamedTuple):
    ratio: float
    value: float
    cost: float
    layer: int


class _Step(NamedTuple):
    """Choices after an item: which one each came from, and whether it differs in the item."""

    parent: Tensor
    differs: Tensor
    item: _Item
    inside: bool


def improve(
    values: Sequence[Sequence[float]], costs: Sequence[float], budget: float, counts: Sequence[int]
) -> list[int]:
    """Return counts whose first values are worth the most, or `counts` if none are worth more.

    Args: values of each layer, descending, the largest of all near 1; costs, positive, of one value
        of each layer; counts, a choice within the budget.
    """
    layers = enumerate(zip(costs, values, strict=True))
    items = [_Item(v / cost, v, cost, i) for i, (cost, vs) in layers for v in vs if v > 0.0]
    items.sort(key=lambda item: -item.ratio)
    taken, left = 0, budget
    while taken < len(items) and items[taken].cost <= left:
        left -= items[taken].cost
        taken += 1
    if taken == len(items):
        return list(counts)
    best = sum(sum(vs[:k]) for vs, k in zip(values, counts, strict=True))
    found = _deviations(items, taken, left, best)
    if found is None:
        return list(counts)
    better = [0] * len(costs)
    for item in items[:taken]:
        better[item.layer] += 1
    for item, change in found:
        better[item.layer] += change
    spent = sum(c * k for c, k in zip(costs, better, strict=True))
    return better if spent <= budget else list(counts)


def _deviations(
    items: list[_Item], taken: int, left: float, best: float
) -> list[tuple[_Item, int]] | None:
    """Return what to change in the first `taken` items for the greatest value, None if nothing.

    A choice is its unspent budget and its loss, the sum of penalties; value = bound - loss -
    critical * unspent. It may overspend for now, if items inside are still to come.
    """
    critical = items[taken].ratio
    bound = sum(item.value for item in items[:taken]) + critical * left
    least = _ROUNDING * bound
    gap = bound - best
    core = sorted(
        (abs(item.value - critical * item.cost), number) for number, item in enumerate(items)
    )
    unspent = torch.tensor([left], dtype=torch.float64)
    loss, steps, chosen, looked_at = torch.zeros_like(unspent), list[_Step](), None, 0
    if critical * left < gap - least:  # the prefix itself, where the greedy went on
        gap, chosen = critical * left, (0, 0)
    for penalty, number in core:
        if penalty > gap - least:
            break
        item, inside = items[number], number < taken
        change = item.cost if inside else -item.cost
        unspent, loss = torch.cat([unspent, unspent + change]), torch.cat([loss, loss + penalty])
        keep = (loss < gap - least).nonzero().flatten()
        keep = keep[_unbeaten(unspent[keep], loss[keep], critical)]
        half = len(loss) // 2
        unspent, loss = unspent[keep], loss[keep]
        steps.append(_Step(keep % half, keep >= half, item, inside))
        short = torch.where(unspent >= 0, loss + critical * unspent, torch.inf)
        if not len(short):
            break
        at = int(short.argmin())
        if float(short[at]) < gap - least:
            gap, chosen = float(short[at]), (len(steps), at)
        looked_at += half
        if looked_at > CHOICES:
            break
    return None if chosen is None else _changes(steps, *chosen)


def _unbeaten(unspent: Tensor, loss: Tensor, critical: float) -> Tensor:
    """Return the choices, by unspent budget, beside which none leaves more and is worth more."""
    worth = -(loss + critical * unspent)
    order = worth.argsort(descending=True, stable=True)
    order = order[unspent[order].argsort(descending=True, stable=True)]
    ahead = worth[order].cummax(0).values
    better = torch.ones_like(order, dtype=torch.bool)
    better[1:] = worth[order][1:] > ahead[:-1]
    return order[better]


def _changes(steps: list[_Step], last: int, at: int) -> list[tuple[_Item, int]]:
    found = []
    for step in reversed(steps[:last]):
        if bool(step.differs[at]):
            found.append((step.item, -1 if step.inside else 1))
        at = int(step.parent[at])
    return found
