"""Patched models under DistributedDataParallel: two and four gloo processes train as one does that
is not patched, every layer is served in every rank, and ranks save the same adapters."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from engine_runs import (
    ROWS,
    adamw_of,
    assert_equal_adapters,
    batch_of,
    curve_alone,
    mean_over_ranks,
    model_of,
    named,
    products_of,
    products_served,
    share_of,
)
from engines import CURVE, STEPS, in_ranks
from peft_models import take_small_layers
from rows import DDP_ROWS, Row
from tolerances import BF16_LOSS_RTOL
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import peftkern
from peftkern.backends import trust
from peftkern.integrations.peft.adalora_steps import AdaLoraSteps

FEW = 8  # steps of what changes a step, not where the training goes
MISSING = 5  # batches of the rank that runs out of them


class Case(NamedTuple):
    """A training under DDP, and by it the one in one process that it must equal."""

    method: str = "LoRA"
    options: tuple[str, ...] = ()  # of DDP that are True
    batches: int = 1  # that add up to a step
    checkpointing: str = ""  # "reentrant" or "not reentrant"
    autocast: bool = False
    hook: bool = False
    uneven: str = ""  # "rows": a rank has fewer, "batches": a rank has fewer
    steps: int = FEW

    @property
    def alone(self) -> tuple:
        """What the training in one process depends on: most cases share it."""
        return self.method, self.uneven, self.autocast

    def rows(self, rank: int, world: int) -> list[slice]:
        if self.uneven == "rows":
            return [slice(0, 5) if rank == 0 else slice(5, 8)]
        return list(share_of(rank, world, self.batches))

    def parts(self, step: int) -> list[tuple[float, slice]]:
        if self.uneven == "rows":
            return [(0.5, rows) for rank in range(2) for rows in self.rows(rank, 2)]
        if self.uneven == "batches" and step > self.steps - MISSING:
            return [(0.5, slice(0, ROWS // 2))]  # DDP divides by all ranks to the end
        return [(1.0, slice(None))]

    def cast(self) -> contextlib.AbstractContextManager:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.autocast)


CASES = {
    "DDP": Case(options=("gradient_as_bucket_view",)),
    "DDP, static_graph": Case(options=("static_graph",)),
    "DDP, find_unused_parameters": Case(options=("find_unused_parameters",)),
    "DDP, gradient accumulation under no_sync": Case(batches=2),
    "DDP, a rank has fewer batches (join)": Case(uneven="batches"),
    "DDP, a rank has fewer rows": Case(uneven="rows"),
    "DDP, reentrant checkpointing (static_graph)": Case(
        options=("static_graph",), checkpointing="reentrant"
    ),
    "DDP, checkpointing": Case(checkpointing="not reentrant"),
    "DDP, autocast to bfloat16": Case(autocast=True),
    "DDP, communication hook": Case(hook=True),
}


def case_of(row: Row, long: bool) -> Case:
    """What the row trains: all steps where masks change on the way, and once under DDP alone."""
    steps = STEPS if long or row.method == "AdaLoRA" or row == DDP_ROWS[0] else FEW
    return CASES[row.engine]._replace(method=row.method, steps=steps)


def wrapped(case: Case, model: nn.Module) -> DistributedDataParallel:
    if case.checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": case.checkpointing == "reentrant"})
    engine = DistributedDataParallel(model, **dict.fromkeys(case.options, True))
    if case.hook:
        engine.register_comm_hook(None, allreduce_hook)
    return engine


def losses_of(case: Case, model: nn.Module, rank: int) -> list[Tensor]:
    """Train a rank; what it lost at each step."""
    optimizer = adamw_of(model)
    if case.method == "AdaLoRA":
        AdaLoraSteps(model, optimizer, STEPS, compact=None)
    engine = wrapped(case, model)
    runs_out = case.uneven == "batches"
    found = []
    with engine.join() if runs_out else contextlib.nullcontext():
        for step in range(1, 1 + case.steps - (MISSING if rank and runs_out else 0)):
            parts, losses = case.rows(rank, dist.get_world_size()), []
            for i, rows in enumerate(parts):
                last = i + 1 == len(parts)
                with contextlib.nullcontext() if last else engine.no_sync():
                    with case.cast():
                        losses.append(engine(**batch_of(step, rows)).loss / len(parts))
                    losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(sum(losses).detach())
    return found


def train(rank: int, case: Case, folder: Path) -> Tensor:
    take_small_layers()
    model = model_of(case.method)
    peftkern.patch(model)
    peftkern.reset_stats()
    losses = losses_of(case, model, rank)
    calls = len(losses) * case.batches * (2 if case.checkpointing else 1)
    assert products_served() == calls * products_of(model), peftkern.stats()
    assert_equal_adapters(model, folder)
    return mean_over_ranks(losses + [losses[0] * 0] * (case.steps - len(losses)))


def train_all(rank: int, rows: list[Row], long: bool, folder: Path) -> list[Tensor]:
    """Train by each row in turn: a fork of a process that has imported so much takes its time."""
    return [named(str(row), train, rank, case_of(row, long), folder) for row in rows]


def all_alone(rank: int, long: bool) -> dict[tuple, Tensor]:
    """Losses of one process without peftkern, by what they depend on."""
    cases = sorted((case_of(row, long) for row in DDP_ROWS), key=lambda case: case.steps)
    return {
        alone: curve_alone(model_of(case.method), case.parts, case.cast, case.steps)
        for alone, case in {case.alone: case for case in cases}.items()  # the longest of each
    }


@pytest.fixture(scope="module", params=["few", pytest.param("all", marks=pytest.mark.long)])
def long(request) -> bool:
    """Whether every row trains all steps."""
    return request.param == "all"


@pytest.fixture(scope="module")
def curves(tmp_path_factory, long) -> dict[tuple, Tensor]:
    return in_ranks(all_alone, 1, tmp_path_factory.mktemp("alone"), long)[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, long) -> dict[Row, list[Tensor]]:
    """What each rank lost by each row."""
    found = {}
    for count in sorted({row.processes for row in DDP_ROWS}):
        rows = [row for row in DDP_ROWS if row.processes == count]
        folder = tmp_path_factory.mktemp("ranks")
        ranks = in_ranks(train_all, count, folder / "store", rows, long, folder)
        found |= dict(zip(rows, zip(*ranks, strict=True), strict=True))
    return found


@pytest.mark.parametrize("row", DDP_ROWS, ids=lambda row: "-".join(map(str, row)))
def test_ranks_train_as_one_process(row, long, curves, trained):
    """Served in every layer, as `train` asserts in every rank."""
    case = case_of(row, long)
    assert row.outcome == "served"
    tolerance = {"rtol": BF16_LOSS_RTOL, "atol": 0} if case.autocast else CURVE
    for got in trained[row]:
        torch.testing.assert_close(got, curves[case.alone][: case.steps], **tolerance)


class PartsOfItsOwn(nn.Module):
    """A model of which each rank calls a layer that the other does not, with rows of its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, rank: int, step: int) -> Tensor:
        layers = self.model.base_model.model.model.layers
        generator = torch.Generator().manual_seed(step)
        x = layers[0].self_attn.q_proj(torch.randn(5 + 40 * rank, 64, generator=generator))
        only = layers[rank].mlp.up_proj if rank else layers[rank].self_attn.k_proj
        return only(x).square().mean()


def hold_trials(rank: int, folder: Path) -> dict:
    take_small_layers()
    model = model_of("LoRA")
    peftkern.patch(model)
    parts = PartsOfItsOwn(model)
    engine = DistributedDataParallel(parts, find_unused_parameters=True)
    optimizer = adamw_of(parts)
    with trust.use_mode("readonly"):
        for step in range(6):
            engine(rank, step).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_equal_adapters(model, folder)
    return trust.ledger(torch.device("cpu")).classes


def test_no_rank_waits_for_anothers_trial(tmp_path, monkeypatch):
    """Ranks that meet other shapes, or call other layers, each try their own; none is stuck."""
    monkeypatch.setenv("PEFTKERN_CACHE", str(tmp_path / "cache"))
    trust.reset()
    ours, theirs = in_ranks(hold_trials, 2, tmp_path / "ranks", tmp_path)
    assert len(ours) == 2 and len(theirs) == 2 and not set(ours) & set(theirs)
