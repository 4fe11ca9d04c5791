"""AdaLoRA for plain torch: the budget of triplets over training, and its allocation.

wrap layers in peftkern.layers.SVDLinear, then
allocator = RankAllocator(model, target_r=4, total_step=1000, tinit=100, tfinal=300)
for step in range(1, 1001):
    (loss + 0.5 * allocator.orthogonality_loss()).backward()
    optimizer.step()
    allocator.update_and_allocate(step)
    optimizer.zero_grad()
allocator.compact_(optimizer)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftkern.functional.adalora import (
    TIES,
    adalora_allocate_,
    adalora_importance_,
    orthogonality_loss,
)
from peftkern.functional.arguments import integer, mismatch, number
from peftkern.layers.svd import SVDLinear
from peftkern.methods.compaction import check_states, shrink_triplets_
from peftkern.methods.processes import (
    are_plain,
    check_readable,
    check_unheld,
    is_sharded,
    part_of,
    whole,
    with_gradient,
)
from peftkern.methods.rank_budget import RankBudget, RankLimits

__all__ = ["BudgetSchedule", "Importance", "RankAllocator"]
Triplets = tuple[nn.Parameter, nn.Parameter, nn.Parameter]  # lora_E, lora_A, lora_B of a layer


@dataclass(frozen=True)
class BudgetSchedule:
    """Budget of triplets of all layers at a step, as the official code and PEFT count.

    b(t) = init_budget up to tinit, target_budget after total_step - tfinal, and between them
    int((init_budget - target_budget) * (1 - (t - tinit) / (total_step - tfinal - tinit))**3
    + target_budget), without int for budgets that are floats. Masks are drawn where t is a multiple
    of deltaT, and at `last_step`.

    Source: Zhang et al. 2023, eq. 12, arXiv:2303.10512
    """

    init_budget: float  # of triplets, whole numbers, or of what they cost
    target_budget: float
    total_step: int
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1  # the name that the paper and PEFT give it

    def __post_init__(self) -> None:
        for name in ("init_budget", "target_budget"):
            budget = getattr(self, name)
            if not number(name, budget) >= 0:
                raise mismatch(name, "a number of at least 0", budget)
        for name, low in (("total_step", 0), ("tinit", 0), ("tfinal", 0), ("deltaT", 1)):
            object.__setattr__(self, name, integer(name, getattr(self, name), low))
        if self.tinit >= self.last_step:
            raise ValueError(
                f"tinit: expected less than total_step - tfinal = {self.last_step}, "
                f"got {self.tinit}"
            )

    @property
    def last_step(self) -> int:
        """Step at which the mask becomes final."""
        return self.total_step - self.tfinal

    def __call__(self, step: int) -> tuple[float, bool]:
        """Return the budget at a step, and whether the mask is drawn anew."""
        if step <= self.tinit:
            return self.init_budget, False
        if step > self.last_step:
            return self.target_budget, True
        share = 1 - (step - self.tinit) / (self.last_step - self.tinit)
        excess = self.init_budget - self.target_budget
        budget = excess * share**3 + self.target_budget
        whole = isinstance(self.init_budget, int) and isinstance(self.target_budget, int)
        return int(budget) if whole else budget, step % self.deltaT == 0


class Importance:
    """EMAs of sensitivity and uncertainty of all triplets, each in one buffer, and their scores.

    layers: {name: (lora_E, lora_A, lora_B)}; the parameters may change, their shapes may not.
    """

    def __init__(self, layers: Mapping[str, Triplets], beta1: float, beta2: float) -> None:
        self.beta1, self.beta2 = beta1, beta2
        params = flat(layers.values())
        numel = sum(p.numel() for p in params)
        wide = torch.float64 if params[0].dtype is torch.float64 else torch.float32
        self.exp_avg_ipt = torch.zeros(numel, dtype=wide, device=params[0].device)
        self.exp_avg_unc = torch.zeros_like(self.exp_avg_ipt)
        self.scores: Tensor | None = None

    def update_(self, layers: Mapping[str, Triplets]) -> Tensor:
        """Take in the present gradients; return the new scores.

        Raises: ValueError if no parameter has a gradient, and on a CPU (elsewhere it would have to
            wait; see `check_finite`) if a score is not finite, naming the layer.
        """
        params = flat(layers.values())
        grads = [p.grad for p in params]
        if all(grad is None for grad in grads):
            raise ValueError(
                "grads: no parameter has one; call update_and_allocate after backward() and "
                "before zero_grad()"
            )
        self.scores = adalora_importance_(
            params, grads, self.exp_avg_ipt, self.exp_avg_unc, beta1=self.beta1, beta2=self.beta2
        )
        if self.scores.is_cpu:
            self.check_finite(layers)
        return self.scores

    def rescore(self, layers: Mapping[str, Triplets]) -> Tensor:
        """Compute the scores of the EMAs as they are, after these have been loaded."""
        shapes = [p.shape for p in flat(layers.values())]
        products = (self.exp_avg_ipt * self.exp_avg_unc).split([shape.numel() for shape in shapes])
        s = [product.view(shape) for product, shape in zip(products, shapes, strict=True)]
        triplets = zip(s[::3], s[1::3], s[2::3], strict=True)
        self.scores = torch.cat([E.view(-1) + (A.mean(1) + B.mean(0)) for E, A, B in triplets])
        return self.scores

    def check_finite(self, layers: Mapping[str, Triplets]) -> None:
        """Raise ValueError naming the layers whose scores are not finite; waits for the device."""
        if self.scores is None or bool(torch.isfinite(self.scores).all()):
            return
        parts = self.scores.split([E.shape[0] for E, _, _ in layers.values()])
        names = [n for n, part in zip(layers, parts, strict=True) if not part.isfinite().all()]
        raise ValueError(
            f"grads: not finite in {', '.join(names)}; their importance is what it was before, and "
            "no mask can be drawn at this step"
        )

    def compact_(self, layers: Mapping[str, Triplets], keep: Sequence[Tensor]) -> None:
        """Drop the triplets that `keep` (one mask per layer) does not name; call before they go."""
        shapes = [p.shape for p in flat(layers.values())]
        for name in ("exp_avg_ipt", "exp_avg_unc"):
            parts = getattr(self, name).split([shape.numel() for shape in shapes])
            kept = [
                part.view(shape)[:, keep[i // 3]] if i % 3 == 2 else part.view(shape)[keep[i // 3]]
                for i, (part, shape) in enumerate(zip(parts, shapes, strict=True))
            ]
            setattr(self, name, torch.cat([part.reshape(-1) for part in kept]))
        if self.scores is not None:
            self.scores = self.scores[torch.cat(list(keep))]


class RankAllocator:
    """Pruning of a model's SVDLinear layers to a budget of triplets that falls over training.

    Args:
        model: a module that holds `SVDLinear` layers.
        target_r: triplets per layer at the end, on average; the important layers get more.
        total_step, tinit, tfinal, deltaT: of the schedule, see `BudgetSchedule`.
        beta1, beta2: of the EMAs of sensitivity and uncertainty.
        ties: see `peftkern.functional.adalora.adalora_allocate_`.
        budget: in other units than triplets, with floors and caps per layer; a total in it takes
            the place of target_r.

    Raises: ValueError if there is no such layer, or on a value that makes no sense.
    Source: Zhang et al. 2023, algorithm 1, arXiv:2303.10512
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        target_r: float,
        total_step: int,
        tinit: int = 0,
        tfinal: int = 0,
        deltaT: int = 1,
        beta1: float = 0.85,
        beta2: float = 0.85,
        ties: str = "exact",
        budget: RankBudget | None = None,
    ) -> None:
        self.layers = {n: m for n, m in model.named_modules() if isinstance(m, SVDLinear)}
        if not self.layers:
            raise ValueError("model: expected SVDLinear layers, found none")
        if ties not in TIES:
            raise ValueError(f"ties: expected one of {TIES}, got {ties!r}")
        ranks = [layer.r for layer in self.layers.values()]
        budgets: tuple[float, float] = sum(ranks), int(number("target_r", target_r) * len(ranks))
        self.limits: RankLimits | None = None
        if budget is not None and not budget.is_plain:
            self.limits = budget.limits(self._triplets(), target_r, model)
            budgets = self.limits.init_budget, self.limits.target_budget
        self.schedule = BudgetSchedule(*budgets, total_step, tinit, tfinal, deltaT)
        self.beta1, self.beta2, self.ties = beta1, beta2, ties
        check_readable(_named(self._triplets()), "RankAllocator", model)
        self.importance: Importance | None = Importance(self._triplets(), beta1, beta2)
        self.mask: Tensor | None = None  # the last one drawn, over all layers in turn
        self._drawn_from: Tensor | None = None  # its scores

    def _triplets(self) -> dict[str, Triplets]:
        own = ((n, m._parameters) for n, m in self.layers.items())  # ten times as fast as a dot
        return {n: (p["lora_E"], p["lora_A"], p["lora_B"]) for n, p in own}

    def update_and_allocate(self, step: int) -> tuple[float, Tensor | None]:
        """Take in the gradients of a step and prune to its budget.

        Call it once per step, counting from 1, between backward() and zero_grad(): after the
        optimizer's step as the official code does, or before it. At `schedule.last_step` the mask
        becomes final; from then on it is applied again at every step and gradients are not read.

        Returns: the budget, and the mask if there is one at this step, bool [sum of r].
        Raises: ValueError if no parameter has a gradient, or DeepSpeed has the optimizer's step,
            and naming the layer on a non-finite one
            (on a CPU; elsewhere it would have to wait: see `Importance.check_finite`).
        """
        step = integer("step", step)
        layers = self._triplets()
        plain = are_plain(flat(layers.values()))
        if not plain:
            check_readable(_named(layers), "RankAllocator")
            for name, (E, _, _) in layers.items():
                check_unheld(f"{name}.lora_E", E, "and leaves RankAllocator no gradients to read")
        lora_E = [E for E, _, _ in layers.values()]
        budget, draw = self.schedule(step)
        if step > self.schedule.last_step:
            if self.mask is None:
                raise ValueError(f"step: {step} comes after the last mask, but none was drawn")
            apply_mask_(lora_E, self.mask)
            return budget, self.mask
        if step < self.schedule.last_step:
            self.importance.update_(layers if plain else whole_layers(layers))
        elif self.importance is None or self.importance.scores is None:
            raise ValueError(f"step: {step} draws the last mask, but nothing was scored before")
        if not draw and step < self.schedule.last_step:
            return budget, None
        limits = {} if self.limits is None else self.limits.of(list(layers))
        self._drawn_from = self.importance.scores
        gathered = lora_E if plain else [with_gradient(E) for E in lora_E]
        self.mask = adalora_allocate_(self._drawn_from, gathered, budget, ties=self.ties, **limits)
        if not plain and any(map(is_sharded, lora_E)):
            apply_mask_(lora_E, self.mask)
        if step == self.schedule.last_step:
            self.importance = None
        return budget, self.mask

    def rank_pattern(self) -> dict[str, list[bool]]:
        """Return the triplets of each layer that are alive, by the last mask."""
        ranks = [layer.r for layer in self.layers.values()]
        mask = torch.ones(sum(ranks), dtype=torch.bool) if self.mask is None else self.mask
        parts = mask.cpu().split(ranks)
        return {name: part.tolist() for name, part in zip(self.layers, parts, strict=True)}

    def layer_importance(self) -> dict[str, float]:
        """Return the mean score of each layer's triplets when the last mask was drawn, or {}.

        On a GPU it waits, so ask for it where a mask was drawn.
        """
        if self._drawn_from is None:
            return {}
        return mean_scores(
            self.layers, [layer.r for layer in self.layers.values()], self._drawn_from
        )

    def orthogonality_loss(self, *, squared: bool = False) -> Tensor:
        """Compute `functional.adalora.orthogonality_loss`; PEFT weighs it with 0.5."""
        triplets = self._triplets().values()
        factors = ([whole(t[i]) for t in triplets] for i in (1, 2))
        return orthogonality_loss(*factors, squared=squared)

    def compact_(self, optimizer: torch.optim.Optimizer | None = None) -> dict[str, int]:
        """Drop the triplets that the last mask has pruned; they can no longer revive.

        The parameters keep their identity and shrink, as do their gradients and what the optimizer
        holds for them. Training goes on as it would have, except that the orthogonality loss and a
        clipped gradient norm no longer count what was dropped. Do it before wrapping in DDP.

        Returns: the rank of every layer now.
        Raises: ValueError naming a state of the optimizer that no triplet can leave, or a parameter
            that FSDP2 has sharded; nothing has changed then.
        """
        layers = self._triplets()
        for name, parameter in _named(layers):
            if is_sharded(parameter):
                raise ValueError(f"{name}: FSDP2 has sharded it; compact_ before fully_shard")
        check_states(optimizer, layers.values())
        pattern = self.rank_pattern()
        keep = [torch.tensor(kept, device=layers[n][0].device) for n, kept in pattern.items()]
        if self.importance is not None:
            self.importance.compact_(layers, keep)
        for (E, A, B), kept in zip(layers.values(), keep, strict=True):
            shrink_triplets_(E, A, B, kept, optimizer)
        if self.mask is not None:
            self.mask = self.mask[self.mask]
        self._drawn_from = None
        return {name: layer.r for name, layer in self.layers.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs to go on from here; tensors are not copied."""
        importance = self.importance
        return {
            "schedule": dataclasses.asdict(self.schedule),
            "options": {"beta1": self.beta1, "beta2": self.beta2, "ties": self.ties},
            "shapes": {n: [list(p.shape) for p in t] for n, t in self._triplets().items()},
            "limits": None if self.limits is None else self.limits.state_dict(),
            "mask": self.mask,
            "importance": None
            if importance is None
            else {
                "exp_avg_ipt": importance.exp_avg_ipt,
                "exp_avg_unc": importance.exp_avg_unc,
                "scores": importance.scores,
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; load the model's own state first.

        Raises: ValueError naming the layers if names or shapes differ.
        """
        layers = self._triplets()
        shapes = {n: [list(p.shape) for p in t] for n, t in layers.items()}
        if shapes != state["shapes"]:
            names = {*shapes, *state["shapes"]}
            differing = sorted(n for n in names if shapes.get(n) != state["shapes"].get(n))
            raise ValueError(f"state: other layers or shapes in {', '.join(differing)}")
        limits = state.get("limits")
        self.limits = None if limits is None else RankLimits.from_state(limits, list(layers))
        self.schedule = BudgetSchedule(**state["schedule"])
        self.beta1, self.beta2 = state["options"]["beta1"], state["options"]["beta2"]
        self.ties = state["options"]["ties"]
        device = next(iter(layers.values()))[0].device
        mask = state["mask"]
        self.mask = None if mask is None else mask.to(device, copy=True)
        self.importance = self._drawn_from = None
        if state["importance"] is not None:
            self.importance = Importance(layers, self.beta1, self.beta2)
            for name, value in state["importance"].items():
                value = None if value is None else value.to(device, copy=True)
                setattr(self.importance, name, value)


def mean_scores(layers: Iterable[str], ranks: Sequence[int], scores: Tensor) -> dict[str, float]:
    """Return the mean of the scores of each layer's triplets; a layer without any has 0."""
    owner = torch.arange(len(ranks)).repeat_interleave(torch.tensor(ranks))
    sums = torch.zeros(len(ranks), dtype=torch.float64).index_add_(0, owner, scores.cpu().double())
    means = sums / torch.tensor(ranks, dtype=torch.float64).clamp(min=1)
    return dict(zip(layers, means.tolist(), strict=True))


def apply_mask_(lora_E: Sequence[Tensor], mask: Tensor) -> None:
    """Zero in every lora_E [r, 1], NaN included, what `mask` [sum of r] does not keep."""
    parts = (~mask).split([E.shape[0] for E in lora_E])
    with torch.no_grad():
        for E, pruned in zip(lora_E, parts, strict=True):
            if is_sharded(E):  # in the rows that are here
                E, pruned = E.detach().to_local(), part_of(pruned, E).to_local()
            E.masked_fill_(pruned.view(E.shape), 0.0)


def _named(layers: Mapping[str, Triplets]) -> Iterator[tuple[str, nn.Parameter]]:
    for name, triplet in layers.items():
        parameters = zip(("lora_E", "lora_A", "lora_B"), triplet, strict=True)
        yield from ((f"{name}.{attribute}", parameter) for attribute, parameter in parameters)


def whole_layers(layers: Mapping[str, Triplets]) -> dict[str, Triplets]:
    """Return triplets with their gradients, of which FSDP2 may hold shards."""
    return {name: tuple(map(with_gradient, triplet)) for name, triplet in layers.items()}


def flat(triplets: Iterable[Triplets]) -> list[nn.Parameter]:
    """Return lora_E, lora_A, lora_B of the first layer, then of the next."""
    return [parameter for triplet in triplets for parameter in triplet]
