"""`peftkern plan` of several devices: collectives of real ranks, and torch's own allocator."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sharded_steps
import torch
import torch.distributed as dist
from engines import in_ranks
from peft import LoraConfig, get_peft_model
from plan_steps import nbytes, tables
from sharded_steps import collectives, peaks
from tiny_models import tiny_config
from tolerances import PLAN_RTOL
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import peftkern
from peftkern.tools.plan import plan as planning
from peftkern.tools.plan import sharding, step
from peftkern.tools.plan.plan import Plan, Training
from peftkern.tools.plan.presets import PRESETS

pytestmark = pytest.mark.usefixtures("small_layers")
LORA = Training(
    "lora", r=6, batch=2, sequence=96, dtype="fp32", device="cpu", devices=2, shard="fsdp2"
)
FULL = replace(LORA, method="full", dtype="bf16", base="bf16", checkpointing=False)
WEIGHTS = ("embeddings", "lm_head", "linear layers", "adapters", "norms, biases")


def counted(plan: Plan, what: str) -> dict[str, int]:
    """Numbers of a plan by collective, over the phases."""
    found: dict[str, int] = {}
    for name, one in plan.communication.items():
        collective = name.partition(",")[0]
        found[collective] = found.get(collective, 0) + one.get(what, 0)
    return {name: number for name, number in found.items() if number}


@pytest.mark.parametrize(
    "training",
    [
        LORA,
        replace(LORA, devices=4, param_dtype="bf16", reduce_dtype="fp32"),
        replace(LORA, reshard=False, checkpointing=False),
        replace(LORA, shard="ddp"),
        replace(FULL, devices=4),
    ],
    ids=["fsdp2", "fsdp2-4-mixed", "fsdp2-whole", "ddp", "fsdp2-4-full"],
)
def test_collectives_are_those_of_real_ranks(training, tmp_path):
    """To the byte, in every rank, padding included: r = 6 comes out even on none but two."""
    ranks = in_ranks(collectives, training.devices, tmp_path, "llama", training)
    plan = planning.plan(tiny_config("llama"), training)
    for calls, sizes in ranks:
        assert counted(plan, "bytes") == sizes
        assert training.shard == "ddp" or counted(plan, "calls") == calls


@pytest.fixture
def group(request):
    """A process group of so many devices of which this process is the first: nothing is moved."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=request.param)
    yield request.param
    dist.destroy_process_group()


def test_peaks_of_ddp_are_those_of_the_allocator(tmp_path):
    """Of one process: what DDP holds does not depend on how many there are."""
    store = f"file://{tmp_path / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        training = replace(LORA, shard="ddp")
        found = peaks("llama", training)
    finally:
        dist.destroy_process_group()
    plan = planning.plan(tiny_config("llama"), training)
    assert plan.fixed["buckets of DDP"] == plan.phases["optimizer"]["gradients"]
    for phase in planning.PHASES:
        assert sum(plan.phases[phase].values()) == pytest.approx(found[phase], rel=PLAN_RTOL)


@pytest.mark.parametrize(
    ("group", "training"),
    [
        (2, LORA),
        (4, replace(LORA, patched=False, checkpointing=False)),
        (5, replace(LORA, dtype="bf16", base="bf16")),
        (2, replace(LORA, param_dtype="bf16", reduce_dtype="fp32")),
        (3, replace(LORA, reshard=False, checkpointing=False)),
        (3, FULL),
        (2, replace(FULL, dtype="fp32", base="fp32", param_dtype="bf16")),
    ],
    indirect=["group"],
    ids=["lora", "peft", "uneven", "mixed", "whole", "full", "full-mixed"],
)
def test_peaks_are_those_of_the_allocator(group, training):
    training = replace(training, devices=group)
    config = tiny_config("qwen2" if group == 5 else "llama")
    torch.manual_seed(0)
    found = peaks(config.model_type, training)
    plan = planning.plan(config, training)
    assert plan.phases["optimizer"]["gradients"] == found["gradients"]
    assert plan.fixed["optimizer states"] == found["states"]
    assert sum(plan.fixed.get(part, 0) for part in WEIGHTS) == found["held"]
    for phase in planning.PHASES:
        assert sum(plan.phases[phase].values()) == pytest.approx(found[phase], rel=PLAN_RTOL)


def quantized_by_bitsandbytes(folder: str, training: Training) -> nn.Module:
    """The model as in the recipe of FSDP and QLoRA: 4-bit weights stored in bf16."""
    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=torch.bfloat16,
    )
    options = {"dtype": torch.bfloat16, "device_map": "cpu", "quantization_config": how}
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    model.config.use_cache = False
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model = get_peft_model(model, LoraConfig(r=training.r, target_modules="all-linear"))
    peftkern.patch(model)
    return model.train()


@pytest.mark.parametrize("group", [4], indirect=True)
def test_shards_of_4_bit_weights_are_those_of_bitsandbytes(group, tmp_path, monkeypatch):
    """The scales of its blocks are whole on every device."""
    config = tiny_config("llama")
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    training = replace(LORA, method="qlora", base="nf4", dtype="bf16", devices=group)
    model = quantized_by_bitsandbytes(str(tmp_path), training)
    scales = nbytes(t for p in model.parameters() for t in tables(p))
    monkeypatch.setattr(sharded_steps, "make_model", lambda kind, training: model)
    found = peaks("llama", training)
    plan = planning.plan(config, training)
    assert sum(plan.fixed.get(part, 0) for part in WEIGHTS) == found["held"] + scales
    for phase in planning.PHASES:
        assert sum(plan.phases[phase].values()) == pytest.approx(found[phase], rel=PLAN_RTOL)


@pytest.mark.parametrize("shard", ["fsdp2", "zero3"])
def test_layers_that_were_not_run_are_counted_as_if_they_were(shard, monkeypatch):
    config = tiny_config("gemma3_text")
    config.num_hidden_layers, config.layer_types = 5, (config.layer_types * 5)[:5]
    training = Training(r=4, sequence=48, devices=3, shard=shard, device="cpu")
    extended = planning.plan(config, training).as_dict()
    monkeypatch.setattr(step, "_RUN", 5)
    assert planning.plan(config, training).as_dict() == extended


def test_a_large_model_in_shards():
    """Llama 3 70B, LoRA, on 64 devices: two gathers of all layers and one of the rest, 64 of each
    row of lora_A where there are 16."""
    training = Training("lora", sequence=64, devices=64, shard="fsdp2")
    plan = planning.plan(PRESETS["llama3-70b"], training)
    alone = planning.plan(PRESETS["llama3-70b"], Training("lora", sequence=64))
    assert plan.trainable == alone.trainable
    assert plan.fixed["linear layers"] * 64 == alone.fixed["linear layers"]
    assert plan.fixed["adapters"] * 64 > 1.5 * alone.fixed["adapters"]
    gathered = plan.communication["all-gather, forward"]
    layers = plan.communication["all-gather, backward"]
    rest = 2 * 128256 * 8192 * 2 + 64 * 128 * 2
    assert gathered["bytes"] - layers["bytes"] == rest
    assert gathered["calls"] == 81 and layers["calls"] == 80
    assert layers["bytes"] == 64 * (
        plan.fixed["linear layers"] + plan.fixed["adapters"] + 80 * 2 * 128 * 2
    )


def test_a_ring_sends_a_share_of_what_there_is():
    assert sharding.sent("all-gather", 1000, 4) == sharding.sent("reduce-scatter", 1000, 4) == 750
    assert sharding.sent("all-reduce", 1000, 4) == 1500
    assert sharding.sent("broadcast", 1000, 4) == 1000
