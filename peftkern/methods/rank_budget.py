"""Budgets of AdaLoRA in ranks, parameters, bytes, FLOPs or any unit, with floors and caps.

budget = RankBudget(2_000_000, "parameters", min_rank=1, max_rank={"v_proj": 8})
RankAllocator(model, target_r=4, total_step=1000, budget=budget)
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from peftkern.functional.adalora import UNLIMITED
from peftkern.functional.rank_allocation import COSTS, rank_costs
from peftkern.layers.names import has_parts

__all__ = ["RankBudget", "RankLimits"]

_EXPERT = re.compile(r"(?:^|\.)experts?\.\d+(?:\.|$)")
# What configs of transformers call the experts of a layer, and those that a token goes to.
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token")


@dataclass(frozen=True)
class RankLimits:
    """`RankBudget` of certain layers: what each triplet costs, floors and caps, by layer.

    max_rank: None for a layer without a cap. target_budget: what the triplets at the end may cost;
    init_budget: what all cost at first, as far as the caps admit them. The budget falls between
    them as `BudgetSchedule` has it. Limits are equal whatever triplets there were at first.
    """

    cost: dict[str, float]
    min_rank: dict[str, int]
    max_rank: dict[str, int | None]
    target_budget: float
    init_budget: float = field(compare=False)

    def of(self, layers: Sequence[str]) -> dict[str, list[Any]]:
        """Return the arguments of `adalora_allocate_` for layers in that order."""
        caps = (self.max_rank[name] for name in layers)
        return {
            "cost": [self.cost[name] for name in layers],
            "r_min": [self.min_rank[name] for name in layers],
            "r_max": [UNLIMITED if cap is None else cap for cap in caps],
        }

    def state_dict(self) -> dict[str, Any]:
        """Return plain numbers, which JSON keeps to the last bit."""
        return dataclasses.asdict(self)

    @classmethod
    def from_state(cls, state: Mapping[str, Any], layers: Sequence[str]) -> RankLimits:
        """Read what `state_dict` gave. Raises: ValueError if it is not of these layers."""
        try:
            limits = cls(**state)
            same = all(
                held.keys() == set(layers)
                for held in (limits.cost, limits.min_rank, limits.max_rank)
            )
        except (TypeError, AttributeError):
            same = False
        if not same:
            raise ValueError("limits: expected cost, min_rank and max_rank of the model's layers")
        return limits


@dataclass(frozen=True)
class RankBudget:
    """Budget of all triplets that are kept, in units of `cost`, with floors and caps per layer.

    Args:
        total: what the kept triplets may cost together at the end; None: what target_r triplets in
            every layer would.
        cost: of a triplet. "rank": 1; "parameters", "bytes" (in the dtype of lora_A): of its column
            of lora_B and its row of lora_A; "flops": of both, for a token's forward pass, and where
            a layer is one of the experts of a mixture, as the model's config has it, for the share
            of tokens that an expert sees. A mapping of names, or a function of a layer's name,
            gives any other: measured milliseconds per triplet. Of processes that train together the
            first one's numbers count.
        min_rank, max_rank: triplets that a layer keeps at least and at most, from the first mask
            on; for all layers, or a mapping of names. None: as many as there are.

    A name of a mapping is that of all layers in whose name it stands as consecutive dotted parts:
    "experts", "layers.0", "mlp.up_proj"; the first that fits counts. Layers without one have no
    floor and no cap; they need a cost.
    Raises: ValueError or TypeError naming the argument.
    """

    total: float | None = None
    cost: str | Mapping[str, float] | Callable[[str], float] = "rank"
    min_rank: int | Mapping[str, int] = 0
    max_rank: int | Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.cost, str):
            if self.cost not in COSTS:
                raise ValueError(
                    f"cost: expected one of {', '.join(COSTS)}, a mapping or a function, got "
                    f"{self.cost!r}"
                )
        elif not isinstance(self.cost, Mapping) and not callable(self.cost):
            came = type(self.cost).__name__
            raise TypeError(f"cost: expected a string, a mapping or a function, got a {came}")
        if self.total is not None:
            _positive("total", self.total)
        for name in ("min_rank", "max_rank"):
            given = getattr(self, name)
            for value in given.values() if isinstance(given, Mapping) else [given]:
                if value is not None or name == "min_rank":
                    _rank(name, value)

    @property
    def is_plain(self) -> bool:
        """True if it says no more than the method itself: target_r triplets a layer on average."""
        return self == RankBudget()

    def limits(
        self,
        layers: Mapping[str, tuple[Tensor, Tensor, Tensor]],
        target_r: float,
        model: nn.Module | None = None,
    ) -> RankLimits:
        """Work out the limits of layers.

        Args: layers, {name: (lora_E, lora_A, lora_B)}; model, whose config tells of experts.
        Raises: ValueError naming the argument: a name that no layer has, a layer without a cost, a
            floor above its cap, a budget below what the floors cost.
        """
        names = list(layers)
        cost = self._costs(layers, model)
        ranks = {name: E.shape[0] for name, (E, _, _) in layers.items()}
        low = _by_name("min_rank", self.min_rank, names, dict.fromkeys(names, 0))
        high = _by_name("max_rank", self.max_rank, names, dict.fromkeys(names))
        most = {name: r if high[name] is None else min(high[name], r) for name, r in ranks.items()}
        for name, r in ranks.items():
            if low[name] > most[name]:
                raise ValueError(
                    f"min_rank, max_rank: expected 0 <= min_rank <= min(max_rank, {r}), {name} has "
                    f"{low[name]} and {high[name]}"
                )
        target = self.total
        if target is None:
            target = math.fsum(cost[name] * target_r for name in names)
        least = math.fsum(cost[name] * low[name] for name in names)
        if target < least:
            raise ValueError(
                f"total: expected at least {least:g}, the cost of min_rank, got {target:g}"
            )
        first = math.fsum(cost[name] * most[name] for name in names)
        return RankLimits(cost, low, high, float(target), first)

    def _costs(
        self, layers: Mapping[str, tuple[Tensor, Tensor, Tensor]], model: nn.Module | None
    ) -> dict[str, float]:
        if isinstance(self.cost, str):
            shapes = [(B.shape[0], A.shape[1]) for _, A, B in layers.values()]
            sizes = [A.element_size() for _, A, _ in layers.values()]
            found = dict(zip(layers, rank_costs(self.cost, shapes, itemsize=sizes), strict=True))
            share = _expert_share(model) if self.cost == "flops" else 1.0
            return {n: c * share if _EXPERT.search(n) else c for n, c in found.items()}
        if isinstance(self.cost, Mapping):
            found = _by_name("cost", self.cost, list(layers), {})
            missing = [name for name in layers if name not in found]
            if missing:
                raise ValueError(f"cost: expected one for every layer, none fits {missing[0]}")
        else:
            found = {name: self.cost(name) for name in layers}
        return {name: _positive(f"cost of {name}", value) for name, value in found.items()}


def _by_name(argument: str, given: Any, names: list[str], default: dict[str, Any]) -> dict:
    """Return the value of each layer, or the default's; a mapping's first name that fits counts."""
    if given is None:
        return dict(default)
    if not isinstance(given, Mapping):
        return dict.fromkeys(names, given)
    found, used = dict(default), set()
    for name in names:
        entry = next((entry for entry in given if has_parts(name, (entry,))), None)
        if entry is not None and given[entry] is not None:
            found[name] = given[entry]
        used.update(entry for entry in given if has_parts(name, (entry,)))
    unknown = [entry for entry in given if entry not in used]
    if unknown:
        raise ValueError(f"{argument}: no layer has {unknown[0]!r} in its name")
    return found


def _expert_share(model: nn.Module | None) -> float:
    """Return the share of tokens that an expert sees, by the model's config; 1 if it says none."""
    config = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    of, chosen = (
        next((getattr(config, n) for n in names if getattr(config, n, None)), None)
        for names in (_EXPERTS, _CHOSEN)
    )
    return min(chosen / of, 1.0) if of and chosen else 1.0


def _positive(name: str, value: Any) -> float:
    if not isinstance(value, numbers.Real) or not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a positive number, got {value!r}")
    return float(value)


def _rank(name: str, value: Any) -> None:
    if not isinstance(value, numbers.Integral) or value < 0:
        raise ValueError(f"{name}: expected a number of triplets, got {value!r}")
