"""Budgets of PEFT's AdaLoRA in other units than triplets, with floors and caps per layer."""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch
import torch.distributed as dist
from peft.tuners.adalora.model import AdaLoraModel

from peftkern.integrations.peft import zero
from peftkern.integrations.peft.adalora import PatchedRankAllocator
from peftkern.integrations.peft.adalora_layers import parameters_of
from peftkern.methods.processes import several
from peftkern.methods.rank_budget import RankBudget, RankLimits

__all__ = ["set_budget"]


def set_budget(tuner: AdaLoraModel, budget: RankBudget | None) -> None:
    """Give a patched AdaLoRA model a budget; None, or one that says nothing, leaves PEFT's masks.

    A checkpoint that was loaded before has one of its own, with which its training went on; that
    one stays, and another is a warning.
    Raises: ValueError as `RankBudget.limits`, or if the allocator is not patched.
    """
    if budget is None or budget.is_plain:
        return
    allocator = tuner.rankallocator
    if not isinstance(allocator, PatchedRankAllocator):
        raise ValueError(f"budget: expected a patched model, has a {type(allocator).__name__}")
    target_r = tuner.peft_config[tuner.trainable_adapter_name].target_r
    layers, rows = allocator.triplets(tuner.model), allocator.rows
    if allocator.limits_loaded and rows is not None:  # floors were those of all triplets
        layers = {n: (E.new_empty(len(rows[n]), 1), A, B) for n, (E, A, B) in layers.items()}
    with zero.whole(parameters_of(tuner)):
        limits = budget.limits(layers, target_r, tuner.model)
    adopt_limits(allocator, _of_first_process(limits, tuner), loaded=False)


def adopt_limits(allocator: PatchedRankAllocator, limits: RankLimits, *, loaded: bool) -> None:
    """Set the limits of an allocator; those of a checkpoint (`loaded`) win over others."""
    held, kept = allocator.limits, allocator.limits_loaded
    other = held is not None and held != limits
    if other and (loaded or kept):
        warnings.warn(
            "AdaLoRA goes on with the budget of the checkpoint, not with the one that was given "
            "now: costs, floors or caps differ",
            stacklevel=3,
        )
    if loaded or held is None or not kept:
        allocator.limits = limits
        allocator.limits_loaded = loaded


def _of_first_process(limits: RankLimits, tuner: AdaLoraModel) -> RankLimits:
    """Return the limits of the first process: what was measured differs among them."""
    if not several():
        return limits
    device = next(p for n, p in tuner.named_parameters() if "lora_E" in n).device
    numbers = [*limits.cost.values(), limits.init_budget, limits.target_budget]
    shared = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.broadcast(shared, 0)
    *cost, first, target = shared.tolist()
    cost = dict(zip(limits.cost, cost, strict=True))
    return replace(limits, cost=cost, init_budget=first, target_budget=target)
