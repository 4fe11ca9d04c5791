"""Ranks to which low-rank updates are cut, by a rule over their singular values S, descending.

    rule        value t                      rank of a layer
    rank        a rank                       t
    energy      share of sum S^2             least k with sum_{i<k} S_i^2 >= t sum S^2
    fro         share of |S|_2               least k with sum_{i<k} S_i^2 >= t^2 sum S^2
    sum         share of sum S               least k with sum_{i<k} S_i >= t sum S
    ratio       largest over smallest        number of S_i > S_0 / t
    average_rank   mean over the layers      those of the largest S^2 of all layers
    budget_bytes   bytes of all factors      those of the largest S^2 for a byte

energy is the float rank of PEFT's `convert_to_lora`; ratio, sum and fro are sv_ratio, sv_cumulative
and sv_fro of kohya's resize_lora. Every layer keeps one at least, as PEFT knows no rank 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peftkern.functional.low_rank_svd import allocate_rank

__all__ = ["RULES", "RankRule", "choose_ranks"]

RULES = ("rank", "energy", "fro", "sum", "ratio", "average_rank", "budget_bytes")
SHARES = ("energy", "fro", "sum")
GLOBAL = ("average_rank", "budget_bytes")  # which compare the layers with each other
ZERO = 1e-6  # largest singular value of what kohya's resize_lora takes for zero


@dataclass(frozen=True)
class RankRule:
    """Rule of the table above with its value; `most` bounds the rank of every layer.

    Raises: ValueError naming the rule.
    """

    rule: str
    value: float
    most: int | None = None

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"rule: expected one of {', '.join(RULES)}, got {self.rule!r}")
        value, least = self.value, 1.0 if self.rule in ("rank", "ratio", "average_rank") else 0.0
        most = 1.0 if self.rule in SHARES else math.inf
        if not (least <= value <= most and 0 < value < math.inf):
            expected = "in (0, 1]" if self.rule in SHARES else f"of at least {max(least, 1):g}"
            raise ValueError(f"{self.rule}: expected a number {expected}, got {value:g}")
        if self.rule in ("rank", "budget_bytes") and value != int(value):
            raise ValueError(f"{self.rule}: expected a whole number, got {value:g}")
        if self.most is not None and self.most < 1:
            raise ValueError(f"rank: expected at least 1, got {self.most}")

    @property
    def compares_layers(self) -> bool:
        return self.rule in GLOBAL


def choose_ranks(
    S: Sequence[Tensor],
    rule: RankRule,
    *,
    scaling: Sequence[float] | None = None,
    cost: Sequence[float] | None = None,
) -> list[int]:
    """Choose the rank of every layer, from 1 to the number of its singular values.

    Args: S [k] of each layer's update, descending; scaling of each, part of S, which the rules of
        one layer look behind as kohya's does (1); cost, bytes of one rank of each layer, for
        budget_bytes alone.
    Raises: ValueError naming the rule: a budget below one rank a layer, values that do not descend.
    """
    if rule.compares_layers:
        return _allocate(S, rule, cost)
    scaling = [1.0] * len(S) if scaling is None else scaling
    ranks = []
    for sigma, s in zip(S, scaling, strict=True):
        values = sigma.detach().double().cpu()
        rank = _rank(values / abs(s) if s else values, rule)
        ranks.append(max(1, min(rank, len(values), rule.most or rank)))
    return ranks


def _rank(values: Tensor, rule: RankRule) -> int:
    """Return the rank that a rule of one layer asks for, in float64."""
    if rule.rule == "rank":
        return int(rule.value)
    if not len(values) or values[0] <= ZERO:
        return 1
    if rule.rule == "ratio":
        return int((values > values[0] / rule.value).sum())
    powers = values if rule.rule == "sum" else values.square()
    share = rule.value**2 if rule.rule == "fro" else rule.value
    kept = powers.cumsum(0)
    return int(torch.searchsorted(kept, share * kept[-1])) + 1


def _allocate(S: Sequence[Tensor], rule: RankRule, cost: Sequence[float] | None) -> list[int]:
    budget = rule.value if rule.rule == "budget_bytes" else rule.value * len(S)
    cost = cost if rule.rule == "budget_bytes" else None
    try:
        return allocate_rank(S, budget, cost=cost, r_min=1, r_max=rule.most)
    except ValueError as error:
        if not str(error).startswith("budget"):
            raise
        least = sum(cost or [1.0] * len(S))
        raise ValueError(
            f"{rule.rule}: expected at least {least:g}, one rank in each layer, got {budget:g}"
        ) from None
