"""Ranks of layers before training: a budget shared out by what each further rank is worth.

    by             a rank of a layer is worth
    weights        sigma_i(W)^2 / |W|^2, what it keeps of the weight
    activations    sigma_i(X)^2 / |X|^2 of the centered inputs, the variance that it explains (EVA)
    gradients      sigma_i(G)^2 of the gradient of the weight: the loss falls by as much, per step
    gora           mean |W * G| of the layer, in proportion to which it gets its ranks

Weights and inputs of different layers have no scale in common, so they count as shares of their
layer; gradients are those of one loss, and count as they are.

Sources: Meng et al. 2024, arXiv:2404.02948 (weights); Paischer et al. 2024, arXiv:2410.07170
(activations); Wang et al. 2024, arXiv:2407.05000 (gradients); He et al. 2025, arXiv:2502.12171
(gora)
"""

from __future__ import annotations

import itertools
import math
import numbers
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkern.functional.arguments import mismatch
from peftkern.functional.panels import Panels
from peftkern.functional.rank_allocation import COSTS, allocate_rank, rank_costs
from peftkern.functional.truncated_svd import Weight, truncated_svd
from peftkern.methods.initialization.from_data import PrincipalComponents
from peftkern.methods.initialization.statistics import named

__all__ = ["LayerRank", "LayerSpectrum", "LoraBudget", "choose_layer_ranks"]

RELATIVE = {"weights": True, "activations": True, "gradients": False, "gora": False}
SOURCES = tuple(RELATIVE)
MOST = 2  # times LoRA's rank, which a layer gets at most: rho of EVA
_TOGETHER = 1 << 24  # values of the layers whose spectra come from one call


@dataclass(frozen=True)
class LayerSpectrum:
    """What the ranks of one layer are worth.

    shape [m, n] of its weight. S [k]: singular values, descending, of what the ranks are chosen
    by; norm, |.|_F of that. excess, certificate: of `truncated_svd` at k values. unreached: what
    of the layer the data did not reach, in words. experts: matrices of that shape that have one
    rank, a stack, whose squares of S and norm are added up, and whose bounds are the largest.
    """

    name: str
    shape: tuple[int, int]
    S: Tensor
    norm: float
    excess: float | None = None
    certificate: float | None = None
    unreached: str = ""
    experts: int = 1

    @classmethod
    def without_data(cls, name: str, shape: tuple[int, int], why: str) -> LayerSpectrum:
        """Return that of a layer which the data does not reach: no rank of it is worth anything."""
        return cls(name, shape, torch.zeros(0, device="cpu"), 0.0, unreached=why)


@dataclass(frozen=True)
class LayerRank:
    """Rank of one layer; 0, it gets no adapter.

    cost of one rank. kept: share of the squared norm of the weight, the inputs or the gradient that
    a matrix of this rank keeps; of "gora", the layer's share of the importance of all. The rest as
    in `LayerSpectrum`.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    cost: float
    kept: float
    S: tuple[float, ...]
    excess: float | None = None
    certificate: float | None = None
    unreached: str = ""
    experts: int = 1

    @property
    def parameters(self) -> int:
        return self.experts * self.rank * sum(self.shape)


@dataclass(frozen=True)
class LoraBudget:
    """The budget of LoRA of one rank, to be shared out anew, and the ranks that a layer may have.

    rank: of that LoRA, whose cost is not exceeded; total: a cost, instead. cost of one rank of a
    layer: by a name of `rank_costs`, of which all but "rank" count every expert, or {layer:
    number}. min_rank, max_rank: of a layer, by default 1 and twice `rank`; never more than its
    smaller side.

    Raises: ValueError naming the argument.
    """

    rank: int = 16
    total: float | None = None
    cost: str | Mapping[str, float] = "rank"
    min_rank: int = 1
    max_rank: int | None = None

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 1:
            raise mismatch("rank", "an integer of at least 1", self.rank)
        if not (isinstance(self.cost, Mapping) or self.cost in COSTS):
            raise mismatch("cost", f"one of {', '.join(COSTS)}, or {{layer: number}}", self.cost)
        total = self.total
        if total is not None and not (_is_number(total) and 0 < total < math.inf):
            raise mismatch("budget", "a number above 0, or None", total)
        if type(self.min_rank) is not int or self.min_rank < 0:
            raise mismatch("min_rank", "an integer of at least 0", self.min_rank)
        low = max(self.min_rank, 1)
        if self.max_rank is not None and (type(self.max_rank) is not int or self.max_rank < low):
            raise mismatch("max_rank", f"an integer of at least {low}, or None", self.max_rank)

    @property
    def count(self) -> int:
        """Number of singular values that are needed of each layer."""
        return self.max_rank or max(MOST * self.rank, self.min_rank)

    def costs(self, spectra: Sequence[LayerSpectrum]) -> list[float]:
        """Return the cost of one rank of each layer. Raises: ValueError for one that has none."""
        if isinstance(self.cost, str):
            costs = rank_costs(self.cost, [one.shape for one in spectra])
            if self.cost != "rank":
                costs = [cost * one.experts for cost, one in zip(costs, spectra, strict=True)]
            return costs
        for one in spectra:
            value = self.cost.get(one.name)
            if not (_is_number(value) and 0 < value < math.inf):
                raise mismatch("cost", f"a number above 0 for {one.name}", value)
        return [float(self.cost[one.name]) for one in spectra]


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def choose_layer_ranks(
    spectra: Sequence[LayerSpectrum], budget: LoraBudget, by: str, relative: bool | None = None
) -> tuple[list[LayerRank], float]:
    """Give the budget to the ranks that are worth most for their cost: `allocate_rank`.

    Args: by, one of the table above; relative, whether singular values count as shares of their
        layer's, by default as the table has it.
    Returns: the rank of each layer, and the budget in units of cost.
    Raises: ValueError naming the argument: min_rank beyond a layer's smaller side or the budget.
    """
    if not spectra:
        raise ValueError("model: expected layers to choose ranks for, got none")
    relative = RELATIVE[by] if relative is None else relative
    costs = budget.costs(spectra)
    limits = [min(budget.count, *one.shape) for one in spectra]
    total = budget.total
    if total is None:
        total = sum(c * min(budget.rank, *s.shape) for c, s in zip(costs, spectra, strict=True))
    for one in spectra:
        if budget.min_rank > min(one.shape):
            most = f"at most {min(one.shape)}, the smaller side of {one.name}"
            raise mismatch("min_rank", most, budget.min_rank)
    least = budget.min_rank * sum(costs)
    if least > total:
        raise ValueError(
            f"budget: expected at least {least:g}, what min_rank={budget.min_rank} costs in "
            f"{len(spectra)} layers, got {total:g}"
        )
    worth = [
        _gora_worth(one, cost, limit) if by == "gora" else _worth(one, relative, limit)
        for one, cost, limit in zip(spectra, costs, limits, strict=True)
    ]
    ranks = allocate_rank(worth, total, cost=costs, r_min=budget.min_rank, r_max=limits)
    whole = math.fsum(one.norm for one in spectra) if by == "gora" else None
    layers = [
        _layer_rank(one, rank, cost, whole)
        for one, rank, cost in zip(spectra, ranks, costs, strict=True)
    ]
    return layers, float(total)


def _worth(one: LayerSpectrum, relative: bool, limit: int) -> Tensor:
    """Return what `allocate_rank` compares; zeros where a layer may have more ranks than values."""
    S = one.S.detach().double().cpu()[:limit]
    if relative and one.norm:
        S = S / one.norm
    return torch.cat([S, S.new_zeros(limit - len(S))])


def _gora_worth(one: LayerSpectrum, cost: float, limit: int) -> Tensor:
    """Return what makes `allocate_rank` give ranks in proportion to importance / sqrt(m + n).

    GoRA rounds r * sum sqrt(m + n) * share / sqrt(m + n) and cuts it off, which misses the budget.
    Here the i-th rank is worth its cost times that proportion / (i - 1/2): Webster's method of
    rounding within a total, with floors and caps.
    """
    places = torch.arange(1, limit + 1, dtype=torch.float64, device="cpu") - 0.5
    return (cost * one.norm / math.sqrt(sum(one.shape)) / places).sqrt()


def _layer_rank(one: LayerSpectrum, rank: int, cost: float, whole: float | None) -> LayerRank:
    S = one.S.detach().double().cpu()
    if whole is not None:
        kept = one.norm / whole if whole else 0.0
    else:
        kept = min((S[:rank] / one.norm).square().sum().item(), 1.0) if one.norm else 0.0
    rest = one.excess, one.certificate, one.unreached, one.experts
    return LayerRank(one.name, one.shape, rank, cost, kept, tuple(S.tolist()), *rest)


def matrix_spectra(
    matrices: Iterable[tuple[str, Weight]], count: int, **options: Any
) -> Iterator[LayerSpectrum]:
    """Yield the `count` largest singular values of named matrices, dense or NF4, as they come.

    Those that follow each other under one name are the experts of a stack, and give one spectrum.
    Small ones are decomposed together, large ones alone: memory of one of them.

    Args: options, of `truncated_svd`: tol, certify, seed.
    Raises: ValueError naming the layer, on NaN or Inf.
    """
    found = _each_spectrum(matrices, count, options)
    for _, parts in itertools.groupby(found, attrgetter("name")):
        yield stacked(list(parts))


def stacked(parts: Sequence[LayerSpectrum]) -> LayerSpectrum:
    """Return the spectrum of matrices of the same shape that have one rank."""
    if len(parts) == 1:
        return parts[0]
    name, shape = parts[0].name, parts[0].shape
    most = max(len(one.S) for one in parts)  # of few inputs there are fewer
    S = torch.stack([F.pad(one.S.double().cpu(), (0, most - len(one.S))) for one in parts])
    S = torch.linalg.vector_norm(S, dim=0)
    norm = math.hypot(*(one.norm for one in parts))
    bounds = (
        max((value for one in parts if (value := getattr(one, bound)) is not None), default=None)
        for bound in ("excess", "certificate")
    )
    return LayerSpectrum(name, shape, S, norm, *bounds, experts=len(parts))


def _each_spectrum(
    matrices: Iterable[tuple[str, Weight]], count: int, options: Mapping[str, Any]
) -> Iterator[LayerSpectrum]:
    group: list[tuple[str, Weight]] = []
    values = 0
    for name, matrix in matrices:
        if group and group[0][1].device != matrix.device:
            yield from _decomposed(group, count, options)
            group, values = [], 0
        group.append((name, matrix))
        values += math.prod(matrix.shape)
        del matrix  # before the next is read
        if values >= _TOGETHER:
            found = _decomposed(group, count, options)
            group, values = [], 0
            yield from found
    yield from _decomposed(group, count, options)


def _decomposed(
    group: Sequence[tuple[str, Weight]], count: int, options: Mapping[str, Any]
) -> list[LayerSpectrum]:
    if not group:
        return []
    count = min(count, max(max(matrix.shape) for _, matrix in group))  # a cap may be any number
    try:
        svd = truncated_svd([matrix for _, matrix in group], count, **options)
    except ValueError:
        for name, matrix in group:  # which is it?
            with named(name):
                truncated_svd(matrix, count, **options)
        raise
    certificates = [None] * len(group) if svd.certificate is None else svd.certificate.tolist()
    return [
        LayerSpectrum(name, (matrix.shape[0], matrix.shape[1]), S.clone(), *numbers)
        for (name, matrix), S, *numbers in zip(
            group, svd.S, svd.norm.tolist(), svd.excess.tolist(), certificates, strict=True
        )
    ]


def input_spectrum(name: str, shape: tuple[int, int], found: PrincipalComponents) -> LayerSpectrum:
    """Return what the principal components of a layer's inputs explain."""
    if found.S is None:
        return LayerSpectrum.without_data(name, shape, "no batch runs through it")
    return LayerSpectrum(name, shape, found.S, found.norm)


def gora_importance(name: str, weight: Weight, gradient: Tensor) -> LayerSpectrum:
    """Return the importance mean |W * G| of a layer, as `norm`; it has no singular values."""
    m, n = weight.shape
    total = 0.0
    for rows, panel in Panels(weight, None):
        total += (panel * gradient[rows]).abs().sum(dtype=torch.float64).item()
    return LayerSpectrum(name, (m, n), torch.zeros(0, device="cpu"), total / (m * n))
