"""Patched models under DeepSpeed's ZeRO: two gloo processes train as one that is not patched does,
and every layer is served in each, also where stage 3 gathers a parameter for each module's call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from adalora_models import quantize_4bit_
from engines import CURVE, LAYERS, STEPS, in_ranks, loss_curve, outcome
from expert_models import add_experts_lora, tiny_moe
from expert_models import fallbacks as experts_fallbacks
from expert_models import served as experts_served
from peft_models import add_lora, take_small_layers, tiny_llama
from rows import ZERO_ROWS, Row
from tolerances import BF16_LOSS_RTOL
from torch import Tensor, nn

import peftkern

pytest.importorskip("deepspeed")

from zero import config_of, engine_of, zero_curve

SHORT = 8  # steps of what differs from LoRA in one thing
EXPERT_LAYERS = 2


def _qlora() -> nn.Module:
    base = tiny_llama()
    quantize_4bit_(base)
    return add_lora(base)


def _experts() -> nn.Module:
    return add_experts_lora(tiny_moe()).train()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "LoRA": lambda: add_lora(tiny_llama()),
    "LoRA in bfloat16": lambda: add_lora(tiny_llama(torch.bfloat16)),
    "DoRA": lambda: add_lora(tiny_llama(), use_dora=True),
    "QLoRA (bitsandbytes)": _qlora,
    "experts": _experts,
}


class Case(NamedTuple):
    """A training under an engine: the stage, and what of its options is not the default."""

    stage: int
    accumulate: int = 1
    checkpointing: bool = False
    offload: bool = False


CASES = {
    "DeepSpeed ZeRO-1": Case(1),
    "DeepSpeed ZeRO-2": Case(2),
    "DeepSpeed ZeRO-2, gradient accumulation": Case(2, accumulate=2),
    "DeepSpeed ZeRO-3": Case(3),
    "DeepSpeed ZeRO-3, gradient accumulation": Case(3, accumulate=2),
    "DeepSpeed ZeRO-3, checkpointing": Case(3, checkpointing=True),
    "DeepSpeed ZeRO-3, parameters and optimizer on the CPU": Case(3, offload=True),
}


def steps_of(row: Row) -> int:
    plain = row.method == "LoRA" and "," not in row.engine
    return STEPS if plain else SHORT


def model_of(method: str) -> nn.Module:
    model = MODELS[method]()
    if method == "experts":  # DeepSpeed holds what experts gather until an input has its gradient
        model.enable_input_require_grads()
    return model


def options_of(row: Row) -> dict[str, Any]:
    case = CASES[row.engine]
    options: dict[str, Any] = {"stage": case.stage, "accumulate": case.accumulate}
    if case.offload:
        options |= {name: {"device": "cpu"} for name in ("offload_param", "offload_optimizer")}
    return options | {"bf16": row.method == "LoRA in bfloat16"}


def train(row: Row) -> tuple[Tensor, str]:
    """Train a rank of a row; the losses of all, and how its layers were served."""
    case, model, steps = CASES[row.engine], model_of(row.method), steps_of(row)
    if case.checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    peftkern.patch(model)
    peftkern.reset_stats()
    losses = zero_curve(engine_of(model, config_of(**options_of(row))), range(steps))
    calls = steps * case.accumulate * (2 if case.checkpointing else 1)
    if row.method != "experts":
        return losses, outcome(calls * LAYERS)
    served, reasons = experts_served(), experts_fallbacks()
    whole = served == calls * EXPERT_LAYERS and not reasons
    return losses, "served" if whole else f"{served} calls served, {reasons}"


def train_all(rank: int) -> dict[Row, tuple[Tensor, str]]:
    return {row: train(row) for row in ZERO_ROWS}


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict[Row, tuple[Tensor, str]]]:
    """What each rank found: all rows in the same two processes, which take long to make."""
    with pytest.MonkeyPatch.context() as patch:
        take_small_layers(patch.setattr)
        return in_ranks(train_all, 2, tmp_path_factory.mktemp("zero"))


@pytest.fixture(scope="module")
def curves() -> dict[str, Tensor]:
    """Losses of one process that is not patched, by method."""
    return {}


@pytest.mark.parametrize("row", ZERO_ROWS, ids=lambda row: f"{row.engine}, {row.method}")
def test_ranks_train_as_one_process_and_are_served(found, curves, row):
    if row.method not in curves:
        longest = max(steps_of(other) for other in ZERO_ROWS if other.method == row.method)
        curves[row.method] = loss_curve(model_of(row.method), steps=range(longest))
    expected = curves[row.method][: steps_of(row)].float()
    bound = {"rtol": BF16_LOSS_RTOL, "atol": 0} if "bfloat16" in row.method else CURVE
    for losses, said in (rank[row] for rank in found):
        assert said == row.outcome
        torch.testing.assert_close(losses, expected, **bound)
