"""`peftkern plan` over bases in each 4-bit format, against models that are quantized."""

from __future__ import annotations

from dataclasses import replace

import peft
import pytest
import torch
from plan_steps import DTYPES, check, nbytes, tables
from tiny_models import tiny_config
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import peftkern
from peftkern.layers import BlockLinear
from peftkern.layers.expert_stack import set_stack
from peftkern.layers.mxfp4_stack import MXFP4Stack
from peftkern.layers.quantize import expert_parameters
from peftkern.tools import models
from peftkern.tools.plan import plan as planning
from peftkern.tools.plan.plan import Training
from peftkern.tools.plan.presets import PRESETS

pytestmark = pytest.mark.usefixtures("small_layers")
CPU = Training("qlora", r=8, batch=2, sequence=160, device="cpu")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def quantized_model(kind: str, training: Training) -> nn.Module:
    """A model with adapters over what peftkern's own quantizers make, patched."""
    torch.manual_seed(0)
    config = tiny_config(kind)
    config.use_cache = False
    dtype = DTYPES[training.dtype]
    model = models.auto_class(config).from_config(config, dtype=dtype).requires_grad_(False)
    targets, experts = models.adapter_targets(model, ",".join(training.targets))
    for module in list(model.modules()):
        for name in expert_parameters(module):
            weight, turned = module._parameters[name].detach(), bool(module.is_transposed)
            set_stack(module, name, MXFP4Stack.from_dense(weight, turned=turned))
    if not experts and kind == "llama":
        how = {"format": training.base, "blocksize": training.blocksize}
        layers = models.linear_layers(model)
        made = {name: BlockLinear.from_linear(layer, **how) for name, layer in layers.items()}
        for name, layer in made.items():
            model.set_submodule(name, layer)
    if training.checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    config = peft.LoraConfig(
        r=training.r, target_modules=targets, target_parameters=experts or None
    )
    model = peft.get_peft_model(model, config)
    peftkern.patch(model)
    return model.train()


@pytest.mark.parametrize(
    ("kind", "training"),
    [
        ("llama", replace(CPU, base="mxfp4")),
        ("llama", replace(CPU, base="nvfp4", dtype="fp32", checkpointing=False)),
        ("llama", replace(CPU, base="int4", blocksize=64)),
        ("llama", replace(CPU, base="int4", blocksize=32, checkpointing=False)),
        ("gpt_oss", replace(CPU, base="mxfp4")),
        ("gpt_oss", replace(CPU, base="mxfp4", targets=ATTENTION, checkpointing=False)),
    ],
    ids=["mxfp4", "nvfp4", "int4-64", "int4-32", "gpt-oss", "gpt-oss-attention"],
)
def test_weights_and_step_are_those_of_a_quantized_model(kind, training):
    model = quantized_model(kind, training)
    found = {"linear layers": 0, "experts": 0}
    for module in model.modules():
        stacks = [p for p in module._parameters.values() if isinstance(p, MXFP4Stack)]
        found["experts"] += nbytes(part for stack in stacks for part in stack.parts)
        if stacks:
            found["experts"] += nbytes(p for n, p in module.named_parameters() if "bias" in n)
        if isinstance(module, BlockLinear):
            found["linear layers"] += module.quantized_weight.nbytes
    fixed = planning.plan(tiny_config(kind), training).fixed
    assert {name: fixed.get(name, 0) for name in found if found[name]} == {
        name: size for name, size in found.items() if size
    }
    check(model, tiny_config(kind), training)


def test_fp4_is_that_of_bitsandbytes(tmp_path):
    config = tiny_config("llama")
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    how = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=False
    )
    options = {"dtype": torch.bfloat16, "device_map": "cpu", "quantization_config": how}
    model = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    found = nbytes(t for n, p in model.named_parameters() if "_proj" in n for t in (p, *tables(p)))
    training = replace(CPU, base="fp4", double_quant=False, sequence=8)
    assert planning.plan(config, training).fixed["linear layers"] == found


@pytest.mark.parametrize(("name", "size"), [("gpt-oss-20b", 12.8), ("gpt-oss-120b", 60.8)])
def test_gpt_oss_has_the_size_of_its_checkpoint(name, size):
    """In GiB, as its model card has it."""
    training = Training("qlora", base="mxfp4", targets=ATTENTION, sequence=16)
    fixed = planning.plan(PRESETS[name], training).fixed
    beside = ("adapters", "optimizer states")
    weights = sum(held for part, held in fixed.items() if part not in beside)
    assert weights / 2**30 == pytest.approx(size, abs=0.05)
