"""Ranks by the weights of a checkpoint, a tensor at a time, by texts, or of a Python file."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peftkern.functional.arguments import mismatch
from peftkern.functional.panels import full_float32
from peftkern.functional.truncated_svd import Weight
from peftkern.integrations.peft.initialize import listed_batches
from peftkern.integrations.peft.rank_report import RankReport
from peftkern.integrations.peft.rank_stacks import names_of
from peftkern.integrations.peft.suggest_ranks import make_report, suggest_ranks
from peftkern.methods.rank_choice import LoraBudget, matrix_spectra
from peftkern.tools.adapters.extract_experts import Stack
from peftkern.tools.checkpoints.architecture import meta_model
from peftkern.tools.checkpoints.checkpoint import Checkpoint, CheckpointError
from peftkern.tools.initialize.from_text import load_model
from peftkern.tools.initialize.request import (
    Target,
    choose_modules,
    find_targets,
    keeps_transposed,
    target_config,
)
from peftkern.tools.initialize.texts import read_batches
from peftkern.tools.ranks.program import Program, run_program
from peftkern.tools.ranks.stacks import find_stacks, stack_names, stack_targets


@dataclass(frozen=True)
class Settings:
    """How ranks are chosen: `by`, `relative` and the options of `suggest_ranks`; the adapter's."""

    by: str
    budget: LoraBudget
    relative: bool | None = None
    alpha: float | None = None
    rslora: bool = False
    tol: float = 1e-3
    certify: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise mismatch("alpha", "a number above 0", self.alpha)

    @property
    def svd_options(self) -> dict[str, Any]:
        return {"tol": self.tol, "certify": self.certify, "seed": self.seed}

    def complete(self, config: LoraConfig) -> LoraConfig:
        """Return a config of LoRA with the budget's rank, which says the targets already."""
        found = copy(config)
        found.r, found.use_rslora = self.budget.rank, self.rslora
        found.lora_alpha = self.budget.rank if self.alpha is None else self.alpha
        return found


def from_weights(
    checkpoint: Checkpoint,
    settings: Settings,
    names: Sequence[str] = (),
    *,
    device: str = "cpu",
    progress: Callable[..., None] = lambda done, name: None,
) -> RankReport:
    """Choose ranks by the spectra of the weights, which are read one at a time.

    Args: checkpoint, dense, or `decoded`.
    Raises: CheckpointError for what the checkpoint or its architecture does not have, for a budget
        that is too small, and for weights that are not finite.
    """
    model = meta_model(checkpoint)
    targets, config = _checkpoint_targets(checkpoint, model, names)
    stacks = find_stacks(checkpoint, model, config.target_parameters or ())
    budget = settings.budget
    order = {name: place for place, name in enumerate(names_of(model))}
    try:
        with torch.no_grad(), full_float32():
            matrices = itertools.chain(
                _matrices(targets, checkpoint, device, progress),
                _experts(stacks, checkpoint, device, progress),
            )
            spectra = list(matrix_spectra(matrices, budget.count, **settings.svd_options))
        spectra.sort(key=lambda one: order[one.name])
        how = (settings.complete(config), budget, settings.relative, {}, stacks)
        return make_report("weights", spectra, *how)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _checkpoint_targets(
    checkpoint: Checkpoint, model: PreTrainedModel, names: Sequence[str]
) -> tuple[dict[str, Target], LoraConfig]:
    """Find the linear layers, and a config for them and the stacks of experts."""
    others = stack_names(model, names)
    targets, config = find_targets(checkpoint, names, model=model, others=others)
    config.target_parameters = stack_targets(model, others)
    config.fan_in_fan_out = keeps_transposed(checkpoint, targets)
    return targets, config


def _experts(
    stacks: Mapping[str, Stack], checkpoint: Checkpoint, device: str, progress: Callable[..., None]
) -> Iterator[tuple[str, Weight]]:
    for name, stack in stacks.items():
        for matrix in stack.read(checkpoint.tensors):
            yield name, matrix.to(device)
        progress(sum(checkpoint.tensors[one].nbytes for one in stack.names), name)


def _matrices(
    targets: Mapping[str, Target],
    checkpoint: Checkpoint,
    device: str,
    progress: Callable[..., None],
) -> Iterator[tuple[str, Weight]]:
    for name, target in targets.items():
        info = checkpoint.tensors[name]
        weight = info.read().to(device)
        yield target.module, weight.T if target.transposed else weight
        del weight  # before the next is read
        progress(info.nbytes, name)


def from_texts(
    checkpoint: Checkpoint,
    settings: Settings,
    data: Path,
    names: Sequence[str] = (),
    *,
    most: int = 64,
    length: int = 1024,
    statistics_bytes: int = 4 << 30,
    device: str = "cpu",
) -> RankReport:
    """Choose ranks by inputs or gradients of texts. Memory: the model, and statistics.

    Args: data, a file of texts as `read_batches` takes it, of which the first `most` are taken, and
        of each the first `length` tokens.
    Raises: CheckpointError for what cannot be done.
    """
    _, config = _checkpoint_targets(checkpoint, meta_model(checkpoint), names)
    loss = settings.by != "activations"
    batches = read_batches(checkpoint, data, most, length, loss=loss, seed=settings.seed)
    program = Program(load_model(checkpoint, device), batches, None)
    return _from_program(program, settings, config, statistics_bytes)


def from_file(
    path: Path,
    settings: Settings,
    names: Sequence[str] = (),
    *,
    most: int = 64,
    statistics_bytes: int = 4 << 30,
    device: str = "cpu",
) -> RankReport:
    """Choose ranks of the model of a Python file, by what its first `most` batches show.

    The model stays on its device, but for a `device` other than the CPU.

    Raises: CheckpointError for what cannot be done; what the file's own code raises.
    """
    if most < 1:
        raise CheckpointError(f"texts: expected at least 1, got {most}")
    program = run_program(path, learns=settings.by != "weights")
    if device != "cpu":
        program.model.to(device)
    others = stack_names(program.model, names)
    modules = choose_modules(program.model, _linear_layers(program.model), names, others)
    if not modules and not others:
        raise CheckpointError(f"{path}: model(): holds no linear layer")
    config = target_config(program.model, modules)
    config.target_parameters = stack_targets(program.model, others)
    return _from_program(program, settings, config, statistics_bytes, most)


def _linear_layers(model: nn.Module) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if name
        and isinstance(module, (nn.Linear, Conv1D))
        and not isinstance(module, NonDynamicallyQuantizableLinear)  # whose weight attention reads
    ]


def _from_program(
    program: Program,
    settings: Settings,
    config: LoraConfig,
    statistics_bytes: int,
    most: int | None = None,
) -> RankReport:
    budget, by, batches = settings.budget, settings.by, program.batches
    try:
        if by != "weights":
            batches = listed_batches(batches, needed=True, by=by, most=most)
        return suggest_ranks(
            program.model,
            settings.complete(config),
            by,
            budget=budget.total,
            cost=budget.cost,
            min_rank=budget.min_rank,
            max_rank=budget.max_rank,
            relative=settings.relative,
            batches=batches,
            loss=program.loss,
            statistics_bytes=statistics_bytes,
            **settings.svd_options,
        )
    except ValueError as error:
        raise CheckpointError(str(error)) from error
