"""`peftkern plan` of mixtures of experts against torch's own allocator, on a CPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from plan_steps import DTYPES, Measured, counted, nbytes
from tolerances import PLAN_RTOL
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig, OlmoeConfig, Qwen3MoeConfig

import peftkern
from peftkern.layers.nf4_stack import NF4Stack
from peftkern.tools.plan import plan as planning
from peftkern.tools.plan.plan import PRESETS, Architecture, Training, from_config

pytestmark = pytest.mark.usefixtures("small_layers")
SIZES = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 64}
SIZES |= {"num_key_value_heads": 2, "vocab_size": 1024}
SIZES |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
MANY = {"num_experts": 16, "num_experts_per_tok": 4}
CONFIGS = {
    "mixtral": MixtralConfig(num_local_experts=8, intermediate_size=192, **SIZES),
    "qwen3_moe": Qwen3MoeConfig(moe_intermediate_size=96, norm_topk_prob=True, **MANY, **SIZES),
    "olmoe": OlmoeConfig(intermediate_size=96, **MANY, **SIZES),
}
SHAPES = {kind: from_config(config.to_dict()) for kind, config in CONFIGS.items()}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
CPU = Training("lora", r=8, batch=2, sequence=160, device="cpu", targets=ATTENTION)


def make_model(kind: str, training: Training) -> nn.Module:
    """The model that `training` describes, as a user of transformers and PEFT makes it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind], dtype=DTYPES[training.dtype])
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02)
    model.config.use_cache = False
    if training.base == "nf4":
        peftkern.quantize_(model, double_quant=training.double_quant)
    if training.checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    stacks = [name for name in training.targets if name not in ATTENTION]
    config = LoraConfig(
        r=training.r,
        target_modules=[name for name in training.targets if name in ATTENTION],
        target_parameters=[f"experts.{name}" for name in stacks] or None,
        task_type="CAUSAL_LM",
    )
    wide = training.adapter_dtype == "fp32"
    model = get_peft_model(model, config, autocast_adapter_dtype=wide)
    if training.patched:
        report = peftkern.patch(model)
        assert (report.skipped, report.falling_back) == ({}, {})
    return model.train()


ALL = (*ATTENTION, "gate_up_proj", "down_proj")


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(
    "training",
    [
        replace(CPU, targets=ALL, dtype="fp32", base="fp32", checkpointing=False),
        replace(CPU, targets=ALL),
        replace(CPU, targets=("q_proj", "down_proj"), adapter_dtype="bf16"),
        replace(CPU, checkpointing=False, patched=False),
        replace(CPU, dtype="fp32", base="fp32", attention="sdpa"),
    ],
    ids=["all-fp32", "all-checkpointed", "down", "frozen-peft", "frozen-checkpointed"],
)
def test_step_agrees_with_the_allocator(kind, training):
    shape = SHAPES[kind]
    measured = vars(Measured(make_model(kind, training), shape, training))
    count = counted(shape, training)
    for name in ("gradients", "states"):
        assert count[name] == measured[name], name
    for name in ("forward", "held", "step", "optimizer"):
        assert count[name] == pytest.approx(measured[name], rel=PLAN_RTOL), name


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("base", ["bf16", "nf4"])
def test_weights_are_counted_to_the_byte(kind, base):
    training = replace(CPU, base=base, targets=ALL, patched=base == "bf16")
    model = make_model(kind, training)
    found = dict.fromkeys(("experts", "routers", "adapters", "norms, biases"), 0)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "lora_" in name:
            found["adapters"] += nbytes([tensor])
        elif isinstance(tensor, NF4Stack):
            found["experts"] += nbytes([tensor._packed, tensor._absmax])
        elif ".experts." in name:
            found["experts"] += nbytes([tensor])
        elif name.endswith("mlp.gate.weight"):
            found["routers"] += nbytes([tensor])
        elif "norm" in name or "inv_freq" in name:
            found["norms, biases"] += nbytes([tensor])
    fixed = planning.plan(SHAPES[kind], replace(training, patched=True)).fixed
    assert {name: fixed[name] for name in found} == found


def test_presets_are_what_transformers_has():
    assert from_config(MixtralConfig().to_dict()) == PRESETS["mixtral-8x7b"]
    assert from_config(OlmoeConfig(intermediate_size=1024).to_dict()) == PRESETS["olmoe-1b-7b"]


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("qwen3_moe", {"mlp_only_layers": [1]}, "mlp_only_layers: expected"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step: expected 1, got 2"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise: expected 0"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv: expected None"),
        ("mixtral", {"num_local_experts": 0}, "num_local_experts: expected an integer"),
        ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok: expected .* 1 to 8, got 9"),
        ("mixtral", {"model_type": "gpt_oss"}, "model_type: expected one of llama, .*qwen3_moe"),
    ],
)
def test_configs_that_are_refused(kind, change, words):
    with pytest.raises(ValueError, match=words):
        from_config({**CONFIGS[kind].to_dict(), **change})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"targets": ("gate_proj",)}, "targets: expected all-linear .*gate_up_proj, .*got gate"),
        ({"method": "dora"}, "method: expected lora or qlora for experts"),
        ({"targets": ALL, "patched": False}, "targets: experts with adapters are counted as"),
        ({"targets": ALL, "dropout": 0.1}, "targets: experts with adapters are counted as"),
        ({"base": "nf4"}, "targets: experts in nf4 without adapters are made dense"),
    ],
)
def test_trainings_that_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        planning.plan(SHAPES["mixtral"], replace(CPU, **change))
    dense: Architecture = PRESETS["llama3.2-1b"]
    with pytest.raises(ValueError, match="got gate_up_proj"):
        planning.plan(dense, replace(CPU, targets=("q_proj", "gate_up_proj")))


def test_all_parts_of_a_large_mixture():
    """Qwen3-30B-A3B, r=16 on everything: the factors of all experts, and their optimizer's states,
    outweigh the experts in NF4."""
    shape = PRESETS["qwen3-30b-a3b"]
    fixed: dict[str, Any] = planning.plan(shape, Training("qlora", targets=shape.targets())).fixed
    factors = 48 * 128 * 16 * (2048 + 1536 + 768 + 2048) * 4
    assert fixed["adapters"] > factors
    assert fixed["optimizer states"] > 2 * factors > fixed["experts"] * 0.25
    assert fixed["experts"] == 48 * 128 * 3 * 2048 * 768 * 9 // 16
