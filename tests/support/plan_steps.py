"""Bytes of a training step: as torch's allocator counts them, and as `peftkern plan` does."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from tolerances import PLAN_RTOL
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from peftkern.tools.plan import plan as planning
from peftkern.tools.plan.plan import Training

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
OPTIMIZERS = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


def allocations(**phases: Callable[[], None]) -> dict[str, list[int]]:
    """Bytes held, as torch's allocator counts them, after each of its calls in each phase."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for name, function in phases.items():
            with record_function(name):
                function()
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    ends = {e.name(): e.start_ns() + e.duration_ns() for e in events if e.name() in phases}
    held = {name: [] for name in phases}
    total = 0
    for event in events:
        if event.name() == "[memory]":
            total += event.nbytes()
            phase = next(name for name in phases if event.start_ns() <= ends[name])
            held[phase].append(total)
    return held


def nbytes(tensors: Iterable[Tensor]) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def tables(weight: Tensor) -> list[Tensor]:
    """What bitsandbytes keeps beside a quantized weight."""
    state = getattr(weight, "quant_state", None)
    if state is None:
        return []
    nested = [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
    return [state.absmax, state.code, *nested]


def measured(model: nn.Module, training: Training, first: bool = False) -> dict[str, int]:
    """Bytes of a second training step: the peak of each phase; gradients and states to the byte.

    first: of the first one, but for the optimizer, which makes its states there.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (training.batch, training.sequence))
    optimizer = OPTIMIZERS[training.optimizer](
        [p for p in model.parameters() if p.requires_grad], lr=1e-4
    )
    losses = []

    def forward() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=training.autocast):
            losses.append(model(input_ids=ids, labels=ids).loss)

    def backward() -> None:
        losses.pop().backward()

    if first:
        held = allocations(forward=forward, backward=backward)
        return {name: max(peaks) for name, peaks in held.items()}
    forward()
    backward()
    optimizer.step()
    optimizer.zero_grad()
    held = allocations(forward=forward, backward=backward, optimizer=optimizer.step)
    optimizer.zero_grad()
    states = optimizer.state.values()
    gradients = held["backward"][-1]
    assert min(gradients, *held["forward"]) > 0
    return {
        "forward": max(held["forward"]),
        "backward": max(held["backward"]),
        "optimizer": max(held["optimizer"], default=gradients),
        "gradients": gradients,
        "states": nbytes(t for state in states for t in state.values() if t is not None),
    }


def counted(config: Any, training: Training) -> dict[str, int]:
    """The same figures of the plan."""
    plan = planning.plan(config, training)
    return {
        **{name: sum(parts.values()) for name, parts in plan.phases.items()},
        "gradients": plan.phases["optimizer"]["gradients"],
        "states": plan.fixed["optimizer states"],
    }


def check(model: nn.Module, config: Any, training: Training) -> None:
    """Hold the plan to what the allocator counts of the model's step."""
    found, count = measured(model, training), counted(config, training)
    for name in ("gradients", "states"):
        assert count[name] == found[name], name
    for name in planning.PHASES:
        assert count[name] == pytest.approx(found[name], rel=PLAN_RTOL), name
