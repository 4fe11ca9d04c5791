"""AdaLoRA in loops and under the Trainer, and what every step leaves behind."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import trainers
from adalora_models import adalora_llama
from peft import PeftModel
from peft_models import text_batch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

STEPS, LAST_MASK = 28, 20
SCHEDULE = {"total_step": STEPS, "tinit": 2, "tfinal": STEPS - LAST_MASK, "deltaT": 3}
# With `BestAt`.
BEST = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
BEST |= {"metric_for_best_model": "made", "greater_is_better": False}
SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": STEPS, "logging_steps": 50}


class PlainAllocation(TrainerCallback):
    """PEFT's own update_and_allocate, called as its documentation says."""

    def on_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        model.base_model.update_and_allocate(state.global_step + 1)


class Digests(TrainerCallback):
    """A hash of parameters, masks and moving averages after every step."""

    def __init__(self) -> None:
        self.by_step: dict[int, str] = {}

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        self.by_step[state.global_step] = digest(model)


class BestAt(TrainerCallback):
    """Metrics that make the checkpoint of a step the best; its state is kept.

    Before callbacks that read metrics, as early stopping does. keep: what is kept of the model.
    """

    def __init__(self, step: int, keep: Callable[[PeftModel], Any] | None = None) -> None:
        self.step, self.digest, self._keep = step, None, keep or digest

    def on_evaluate(self, args, state, control, model=None, metrics=None, **kwargs) -> None:
        metrics["eval_made"] = abs(state.global_step - self.step)
        if state.global_step == self.step:
            self.digest = self._keep(model)


def digest(model: PeftModel) -> str:
    """All that decides how AdaLoRA goes on, in one word."""
    found = hashlib.sha256()
    allocator = model.base_model.rankallocator
    named = model.named_parameters()
    trained = {name: p for name, p in named if p.requires_grad or "lora_" in name}
    for tensors in (trained, allocator.exp_avg_ipt, allocator.exp_avg_unc):
        for name in sorted(tensors):
            value: Tensor = tensors[name].detach()
            found.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            found.update(value.contiguous().float().numpy().tobytes())
    found.update(json.dumps(mask(model), sort_keys=True).encode())
    return found.hexdigest()


def mask(model: PeftModel) -> dict[str, list[bool]]:
    """The rank pattern; saving takes the adapter's name out of its keys."""
    pattern = model.peft_config["default"].rank_pattern or {}
    return {name.removesuffix(".default"): kept for name, kept in pattern.items()}


def take_steps(
    model: PeftModel, optimizer: torch.optim.Optimizer, steps: range, allocation: bool = False
) -> list[str]:
    """A loop with clipping; `allocation` as PEFT documents it. The state after each step."""
    found = []
    for step in steps:
        model(**text_batch(seed=step)).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        if allocation:
            model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        found.append(digest(model))
    return found


def run(
    folder: Path,
    callbacks: list[TrainerCallback],
    *,
    resume: Path | None = None,
    config: dict | None = None,
    **options,
) -> Trainer:
    """Train a fresh model, or go on from a checkpoint."""
    model = adalora_llama(**{**SCHEDULE, **(config or {})})
    trainer = trainers.trainer(model, folder, callbacks, **{**SAVING, **options})
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer
