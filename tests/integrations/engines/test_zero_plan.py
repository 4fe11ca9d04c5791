"""`peftkern plan --shard zero3` against DeepSpeed: every gather of two ranks, and the peaks of
torch's allocator."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from engines import in_ranks
from plan_steps import allocations
from sharded_steps import Collectives
from tiny_models import SIZES, make_model, tiny_config
from tolerances import PLAN_RTOL
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from peftkern.tools.plan.gathering import Limits
from peftkern.tools.plan.plan import Planner, Training

pytest.importorskip("deepspeed")

from zero import config_of, engine_of

HIDDEN = SIZES["hidden_size"]
BF16 = Training("lora", r=8, batch=1, sequence=48, device="cpu", devices=2, shard="zero3")
FP32 = replace(BF16, batch=2, sequence=96, dtype="fp32", base="fp32")
AUTO = Limits.of(HIDDEN)
WEIGHTS = ("embeddings", "lm_head", "linear layers", "adapters", "norms, biases")


class Case(NamedTuple):
    """A training, the settings of stage 3 and the model."""

    training: Training
    limits: Limits = AUTO
    kind: str = "llama"


CASES = {
    "bf16": Case(BF16),
    "bf16, no checkpointing": Case(replace(BF16, checkpointing=False)),
    "fp32": Case(FP32),
    "fp32, no checkpointing": Case(replace(FP32, checkpointing=False)),
    "PEFT alone": Case(replace(BF16, patched=False)),
    "few at once": Case(FP32, AUTO._replace(live=400_000, reuse=300_000)),
}


class Found(NamedTuple):
    """What a rank found: bytes of the gathers of each phase in order, of what is reduced, held."""

    gathers: dict[str, list[int]]
    reduced: int
    held: int


class Gathers(Collectives):
    """The bytes of all-gathers, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        before = self.bytes["all-gather"]
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if self.bytes["all-gather"] > before:
            self.sizes.append(self.bytes["all-gather"] - before)
        return out


class Steps:
    """Steps of a training by DeepSpeed, by phase; in the first it notes the order of modules."""

    def __init__(self, case: Case) -> None:
        training, limits = case.training, case.limits
        self.model = make_model(case.kind, training)
        config = config_of(
            3,
            bf16=training.dtype == "bf16",
            reduce_bucket_size=HIDDEN**2,
            stage3_prefetch_bucket_size=limits.ahead,
            stage3_param_persistence_threshold=limits.small,
            stage3_max_live_parameters=limits.live,
            stage3_max_reuse_distance=limits.reuse,
        )
        engine = engine_of(self.model, config)
        ids = torch.randint(SIZES["vocab_size"], (training.batch, training.sequence))
        losses: list[Tensor] = []
        self.phases = {
            "forward": lambda: losses.append(engine(input_ids=ids, labels=ids).loss),
            "backward": lambda: engine.backward(losses.pop()),
            "optimizer": engine.step,
        }
        for work in self.phases.values():
            work()


def communicated(rank: int) -> dict[str, Found]:
    found = {}
    for name, case in CASES.items():
        steps, gathers, reduced = Steps(case), {}, 0
        for phase, work in steps.phases.items():
            with Gathers() as counted:
                work()
            gathers[phase] = counted.sizes
            reduced += counted.bytes["reduce-scatter"]
        pieces = sum(p.ds_tensor.nbytes for p in steps.model.parameters())
        whole = sum(p.nbytes for p in steps.model.parameters())  # of those that stay so
        buffers = sum(b.nbytes for b in steps.model.buffers())
        found[name] = Found(gathers, reduced, pieces + whole + buffers)
    return found


def peaks(rank: int) -> dict[str, dict[str, int]]:
    """Peaks of the first of two devices: nothing is moved, as gloo would in memory of its own."""
    dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    found = {}
    for name, case in CASES.items():
        held = allocations(**Steps(case).phases)
        found[name] = {phase: max(totals) for phase, totals in held.items()}
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Found]]:
    """What both ranks found in all cases, which take long to make."""
    return in_ranks(communicated, 2, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict[str, dict[str, int]]:
    return in_ranks(peaks, 1, tmp_path_factory.mktemp("peaks"))[0]


@pytest.mark.parametrize("name", CASES)
def test_gathers_and_peaks_are_those_of_deepspeed(ranks, measured, name, monkeypatch):
    case = CASES[name]
    monkeypatch.setattr(Limits, "of", lambda hidden: case.limits)
    config, training = tiny_config(case.kind), case.training
    planner = Planner(config, training)
    plan = planner.plan()
    sizes = {name: one["bytes"] for name, one in plan.communication.items()}
    for found in (rank[name] for rank in ranks):
        for phase in ("forward", "backward"):
            gathers = [nbytes for one, nbytes in planner._steps.engine.gathers if one == phase]
            assert gathers == found.gathers[phase]
        assert sizes["all-gather, optimizer"] == sum(found.gathers["optimizer"])
        assert sizes["reduce-scatter, backward"] == found.reduced
        assert sum(plan.fixed.get(part, 0) for part in WEIGHTS) == found.held
    for phase, peak in measured[name].items():
        assert sum(plan.phases[phase].values()) == pytest.approx(peak, rel=PLAN_RTOL)
