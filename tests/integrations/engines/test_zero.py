"""Patched models under DeepSpeed's ZeRO: two gloo processes train as one that is not patched does,
and every layer is served in each, also where stage 3 gathers a parameter for each module's call."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from adalora_models import adalora_llama, quantize_4bit_
from engine_methods import METHODS, losses_of
from engines import CURVE, LAYERS, STEPS, in_ranks, loss_curve, optimizer_of, outcome
from expert_models import add_experts_lora, tiny_moe
from expert_models import fallbacks as experts_fallbacks
from expert_models import served as experts_served
from paths import EXAMPLES, SUPPORT
from peft_models import add_lora, take_small_layers, text_batch, tiny_llama
from processes import run_python
from rows import PAGE, ZERO_METHOD_ROWS, ZERO_ROWS, Row
from safetensors.torch import load_file
from tolerances import BF16_LOSS_RTOL
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import peftkern
from peftkern.backends import trust
from peftkern.integrations.peft import trial
from peftkern.integrations.peft.adalora_state import load_state
from peftkern.integrations.peft.adalora_steps import AdaLoraSteps
from peftkern.integrations.transformers import AdaLoraCallback, PeftKernCallback
from peftkern.methods import RankBudget
from peftkern.methods.lora_fa import LoRAFAOptimizer
from peftkern.methods.lora_pro import LoRAProAdamW, lora_pro_hook

pytest.importorskip("deepspeed")

from zero import config_of, engine_of, zero_curve

SHORT = 6  # steps of what differs from LoRA in one thing
EXPERT_LAYERS = 2
CLIP = 5e-3  # the norm of AdaLoRA's gradients, which its importance counts after clipping
SCHEDULE = {"total_step": SHORT, "tinit": 1, "tfinal": 2, "deltaT": 2, "orth_reg_weight": 0.1}
BUDGET = RankBudget(cost="parameters", min_rank=1)


def _experts() -> nn.Module:
    return add_experts_lora(tiny_moe()).train()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "LoRA": lambda: add_lora(tiny_llama()),
    "LoRA in bfloat16": lambda: add_lora(tiny_llama(torch.bfloat16)),
    "AdaLoRA": lambda: adalora_llama(**SCHEDULE),
    "DoRA": lambda: add_lora(tiny_llama(), use_dora=True),
    "QLoRA (bitsandbytes)": lambda: add_lora(quantize_4bit_(tiny_llama())),
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
    if "," in row.engine:
        return SHORT // 2
    whole = row.method == "LoRA" and row.engine != "DeepSpeed ZeRO-1"  # of 2 it is a part
    return STEPS if whole else SHORT


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
    if row.method == "AdaLoRA":
        options["clip"] = CLIP
    return options | {"bf16": row.method == "LoRA in bfloat16"}


def allocating(model: nn.Module, optimizer: Any) -> AdaLoraSteps:
    return AdaLoraSteps(model, optimizer, SHORT, budget=BUDGET, compact=None)


def mask_of(model: nn.Module) -> dict[str, list[bool]]:
    return getattr(model.peft_config["default"], "rank_pattern", None) or {}


class Found(NamedTuple):
    """What a rank found of a row: the losses of all, how its layers were served, the last mask."""

    losses: Tensor
    said: str
    mask: dict[str, list[bool]]


def train(row: Row) -> Found:
    """Train a rank of a row."""
    case, model, steps = CASES[row.engine], model_of(row.method), steps_of(row)
    if case.checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    peftkern.patch(model)
    engine = engine_of(model, config_of(**options_of(row)))
    if row.method == "AdaLoRA":
        allocating(model, engine.optimizer)
    peftkern.reset_stats()
    losses = zero_curve(engine, range(steps))
    calls = steps * case.accumulate * (2 if case.checkpointing else 1)
    if row.method != "experts":
        return Found(losses, outcome(calls * LAYERS), mask_of(model))
    served, reasons = experts_served(), experts_fallbacks()
    whole = served == calls * EXPERT_LAYERS and not reasons
    return Found(losses, "served" if whole else f"{served} calls served, {reasons}", {})


def train_method(row: Row) -> Found:
    """Train a rank of a row of a method of layers; what it refuses is what is said."""
    method = METHODS[row.method]
    model = method.model()
    config = config_of(int(row.engine[-1]))
    engine = engine_of(model, config, method.optimizer(model))
    peftkern.reset_stats()
    try:
        losses = losses_of(method, engine, model, dist.get_rank(), 2, engine, engine.backward)
    except ValueError as error:
        return Found(torch.empty(0), str(error), {})
    return Found(losses, "served" if not peftkern.stats().fallbacks else str(peftkern.stats()), {})


def resume(rank: int, folder: Path) -> None:
    """AdaLoRA in stage 3 goes on from DeepSpeed's checkpoint as if it had never stopped."""
    half, config = SHORT // 2, config_of(3)
    model = MODELS["AdaLoRA"]()
    peftkern.patch(model)
    engine = engine_of(model, config)
    steps = allocating(model, engine.optimizer)
    zero_curve(engine, range(half))
    engine.save_checkpoint(str(folder))
    state, mask = steps.state_dict(), dict(mask_of(model))
    steps.save(folder, write=rank == 0)
    expected = zero_curve(engine, range(half, SHORT))
    twin = MODELS["AdaLoRA"]()
    peftkern.patch(twin)
    engine = engine_of(twin, config)
    steps = allocating(twin, engine.optimizer)
    engine.load_checkpoint(str(folder))
    steps.load_state_dict(state)
    assert steps.step == half and mask_of(twin) == mask
    steps.load(folder)
    assert torch.equal(zero_curve(engine, range(half, SHORT)), expected)
    assert mask_of(twin) == mask_of(model)
    steps.close()
    assert "step" not in vars(engine.optimizer)
    shapes = {tuple(t.shape) for t in load_file(folder / "adapter_model.safetensors").values()}
    assert all(len(shape) == 2 for shape in shapes), shapes  # one that is not gathered has one


def refuse(rank: int, folder: Path) -> None:
    """What DeepSpeed does not let AdaLoRA do says so."""
    model = MODELS["AdaLoRA"]()
    peftkern.patch(model)
    optimizer = optimizer_of(model)
    early = AdaLoraSteps(model, optimizer, SHORT)
    engine = engine_of(model, config_of(2), optimizer)
    with pytest.raises(ValueError, match=r"make AdaLoraSteps after deepspeed\.initialize"):
        zero_curve(engine, range(1))
    early.close()
    with pytest.raises(ValueError, match="grads: DeepSpeed holds them; make AdaLoraSteps"):
        model.base_model.update_and_allocate(1)
    with pytest.raises(ValueError, match="model: DeepSpeed holds its parameters: load before"):
        load_state(model, folder)
    with pytest.raises(ValueError, match=r"optimizer: DeepSpeed holds the .* got AdamW"):
        AdaLoraSteps(model, optimizer, SHORT)
    AdaLoraSteps(model, engine.optimizer, SHORT)
    with pytest.warns(UserWarning, match="AdaLoRA keeps .*: model: DeepSpeed holds the param"):
        zero_curve(engine, range(SHORT - SCHEDULE["tfinal"]))


def refuse_pairs(rank: int, folder: Path) -> None:
    """Methods of pairs of factors, which DeepSpeed's flat parts hide, are no plain AdamW."""
    for stage, make in enumerate((LoRAFAOptimizer, LoRAProAdamW, _hooked), 1):
        model = MODELS["LoRA"]()
        engine = engine_of(model, config_of(stage), make(model, lr=1e-2))
        with pytest.raises(ValueError, match="DeepSpeed's ZeRO steps on flat parts"):
            zero_curve(engine, range(1))
    with pytest.raises(ValueError, match="reads it whole; train under DistributedDataParallel, or"):
        LoRAFAOptimizer(model, lr=1e-2)


def _hooked(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr)
    optimizer.register_step_pre_hook(lora_pro_hook(model))
    return optimizer


def trust_it(rank: int, folder: Path) -> None:
    """A class of layers gets its verdict under the hooks of stage 3, in every rank."""
    with trust.use_mode("auto"):
        model = MODELS["LoRA"]()
        peftkern.patch(model)
        zero_curve(engine_of(model, config_of(3)), range(4))
        assert trial._classes and all(kind.decided for kind in trial._classes.values())


def trained_by_trainer(folder: Path, resumed: bool) -> tuple[list[float], dict[str, list[bool]]]:
    """Losses of a Trainer from the checkpoint in the middle on, and its last mask."""
    config = config_of(3, stage3_gather_16bit_weights_on_model_save=True)
    options = {"max_steps": SHORT, "save_steps": SHORT // 2, "logging_steps": 1, "report_to": []}
    options |= {"per_device_train_batch_size": 1, "disable_tqdm": True, "use_cpu": True}
    options["max_grad_norm"] = 0.0
    arguments = TrainingArguments(str(folder), deepspeed=config, learning_rate=1e-2, **options)
    model, callbacks = MODELS["AdaLoRA"](), [PeftKernCallback(), AdaLoraCallback(compact=None)]
    batch = text_batch(16)
    rows = [{name: values[i] for name, values in batch.items()} for i in range(16)]
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=callbacks)
    peftkern.reset_stats()
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3") if resumed else None)
    steps = SHORT // 2 if resumed else SHORT
    assert outcome(steps * LAYERS) == "served", peftkern.stats()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    return losses[SHORT // 2 : SHORT], mask_of(model)


def trainer(rank: int, folder: Path) -> None:
    """The Trainer with a config of stage 3 patches, allocates, saves all, and resumes."""
    losses, mask = trained_by_trainer(folder, resumed=False)
    assert len(losses) == SHORT // 2 and mask
    saved = load_file(folder / f"checkpoint-{SHORT}" / "adapter_model.safetensors")
    assert all(tensor.dim() == 2 for tensor in saved.values())
    assert trained_by_trainer(folder, resumed=True) == (losses, mask)
    again = load_file(folder / f"checkpoint-{SHORT}" / "adapter_model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in saved.items())


def train_all(rank: int, folder: Path) -> dict[Row, Found]:
    found = {row: train(row) for row in ZERO_ROWS}
    found |= {row: train_method(row) for row in ZERO_METHOD_ROWS}
    resume(rank, folder)
    refuse(rank, folder)
    refuse_pairs(rank, folder)
    trust_it(rank, folder)
    trainer(rank, folder / "trainer")
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict[Row, Found]]:
    """What each rank found: all rows in the same two processes, which take long to make."""
    with pytest.MonkeyPatch.context() as patch:
        take_small_layers(patch.setattr)
        patch.setenv("PEFTKERN_CACHE", str(tmp_path_factory.mktemp("cache")))
        folder = tmp_path_factory.mktemp("zero")
        return in_ranks(train_all, 2, folder, folder)


@pytest.fixture(scope="module")
def alone() -> dict[str, tuple[Tensor, dict]]:
    """Losses and the last mask of one process without DeepSpeed, by method."""
    return {}


def train_alone(method: str) -> tuple[Tensor, dict[str, list[bool]]]:
    """Train in one process, which is not patched but for AdaLoRA's masks of a budget."""
    model = model_of(method)
    optimizer = optimizer_of(model)
    if method == "AdaLoRA":
        trained = optimizer.param_groups[0]["params"]

        def clip(*_: Any) -> None:
            nn.utils.clip_grad_norm_(trained, CLIP)

        optimizer.register_step_pre_hook(clip)
        allocating(model, optimizer)
    longest = max(steps_of(row) for row in ZERO_ROWS if row.method == method)
    return loss_curve(model, optimizer, range(longest)).float(), mask_of(model)


@pytest.mark.parametrize("row", ZERO_ROWS, ids=lambda row: f"{row.engine}, {row.method}")
def test_ranks_train_as_one_process_and_are_served(found, alone, row):
    if row.method not in alone:
        alone[row.method] = train_alone(row.method)
    losses, mask = alone[row.method]
    bound = {"rtol": BF16_LOSS_RTOL, "atol": 0} if "bfloat16" in row.method else CURVE
    for rank in found:
        assert rank[row].said == row.outcome
        torch.testing.assert_close(rank[row].losses, losses[: steps_of(row)], **bound)
        assert rank[row].mask == mask
    assert (row.method == "AdaLoRA") == bool(mask)


@pytest.mark.parametrize("row", ZERO_METHOD_ROWS, ids=lambda row: f"{row.engine}, {row.method}")
def test_methods_of_layers_train_as_one_process_or_say_why_not(found, row):
    for rank in found:
        assert row.outcome.removeprefix("refused: ") in rank[row].said
        if row.outcome == "served":
            method = METHODS[row.method]
            model = method.model()
            torch.testing.assert_close(
                rank[row].losses, losses_of(method, model, model, 0, 1), **CURVE
            )


def test_adalora_resumes_and_is_refused_in_words_and_layers_are_tried(found):
    """The ranks have asserted it: `resume`, `refuse`, `refuse_pairs`, `trust_it` and `trainer`."""
    assert len(found) == 2


def test_the_example_is_launched_as_the_page_says(tmp_path):
    """In two processes, by the config that users copy; every layer is served, its losses fall."""
    for name in ("zero3_lora.json", "fsdp_qlora.yaml"):
        assert (EXAMPLES / name).read_text(encoding="utf-8") in PAGE.read_text(encoding="utf-8")
    start = tmp_path / "start.py"  # tests/support/zero.py leaves out what takes long to compile
    start.write_text(
        "import runpy, sys, zero\nsys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0])"
    )
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, start)
    path = os.pathsep.join([os.environ["PYTHONPATH"], str(SUPPORT)])
    options = {"PYTHONPATH": path, "PEFTKERN_TRUST": "always", "CUDA_VISIBLE_DEVICES": ""}
    done = run_python(*launch, EXAMPLES / "zero3_lora.py", **options)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [float(x) for x in re.findall(r"'loss': '?([0-9.]+)", done.stdout)]
    assert len(losses) == 10 and losses[-1] < losses[0] - 0.2, done.stdout
    assert re.search(r"lora_linear_backward +cpu +140$", done.stdout, re.MULTILINE), done.stdout
    assert "fell back" not in done.stdout
