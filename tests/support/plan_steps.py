"""Bytes of a training step: as torch's allocator counts them, and as `peftkern plan` does."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from peftkern.tools.plan import plan as planning
from peftkern.tools.plan.plan import Architecture, Training
from peftkern.tools.plan.training_step import Memory, Step

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


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


class Measured:
    """Bytes of a second training step."""

    def __init__(self, model: nn.Module, shape: Architecture, training: Training) -> None:
        ids = torch.randint(shape.vocabulary, (training.batch, training.sequence))
        trained = [p for p in model.parameters() if p.requires_grad]
        kinds = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
        optimizer = kinds[training.optimizer](trained, lr=1e-4)
        losses = []

        def forward() -> None:
            losses.append(model(input_ids=ids, labels=ids).loss)

        def backward() -> None:
            losses.pop().backward()

        forward()
        backward()
        optimizer.step()
        optimizer.zero_grad()
        held = allocations(forward=forward, backward=backward, optimizer=optimizer.step)
        optimizer.zero_grad()
        self.forward, self.held = max(held["forward"]), held["forward"][-1]
        self.step = max(held["forward"] + held["backward"])
        self.gradients = held["backward"][-1]
        self.optimizer = max(held["optimizer"], default=self.gradients) - self.gradients
        states = optimizer.state.values()
        self.states = nbytes(t for state in states for t in state.values() if t is not None)
        assert min(self.forward, self.held, self.gradients) > 0


def counted(shape: Architecture, training: Training) -> dict[str, int]:
    """The same figures as `Measured`, from the plan and the step that it is made of."""
    plan = planning.plan(shape, training)
    phases = {name: sum(parts.values()) for name, parts in plan.phases.items()}
    memory = Memory()
    step = Step(planning.step_shapes(shape, training), memory)
    loss = step.forward()
    held = memory.total
    del loss
    return {
        "forward": phases["forward"],
        "step": max(phases["forward"], phases["backward"]),
        "held": held,
        "gradients": plan.phases["optimizer"]["gradients"],
        "states": plan.fixed["optimizer states"],
        "optimizer": plan.phases["optimizer"]["temporaries"],
    }
