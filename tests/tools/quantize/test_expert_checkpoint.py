"""Experts in NF4 checkpoints, one by one or fused: bytes, names, and what is left out."""

from __future__ import annotations

import json

import bitsandbytes as bnb
import pytest
import torch
from checkpoint_folders import (
    MOE_FAMILIES,
    changing,
    configure,
    load_tensors,
    save_moe,
)
from processes import run_code
from quantized_folders import convert
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen3VLMoeConfig, Qwen3VLMoeModel

import peftkern
from peftkern.formats.nf4 import STATE_KEY, NF4Weight
from peftkern.integrations.transformers import NF4ExpertsConfig  # noqa: F401  registers itself
from peftkern.layers.nf4_stack import NF4Stack
from peftkern.tools.adapters import extract_experts
from peftkern.tools.checkpoints.checkpoint import CheckpointError

ONE_BY_ONE = [family for family, (*_, fused) in MOE_FAMILIES.items() if not fused]


def stacks(model: nn.Module) -> dict[str, Tensor]:
    found = {n: p for n, p in model.named_parameters() if "experts" in n and p.dim() == 3}
    assert found
    return found


@pytest.mark.parametrize("shard_bytes", [6000, 10**9], ids=["shards", "one file"])
@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_peftkern_loads_what_quantize_makes_of_the_model(tmp_path, family, shard_bytes):
    """The same layers and stacks, bit for bit, from experts one by one or fused, and no more."""
    model = save_moe(tmp_path / "src", family)
    summary = convert(tmp_path / "src", tmp_path / "out", shard_bytes=shard_bytes)
    assert (len(summary.plan.files) > 4) == (shard_bytes == 6000)
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    found, expected = stacks(got), stacks(model)
    assert found.keys() == expected.keys()
    errors = []
    for name, stack in found.items():
        right = NF4Stack.from_dense(expected[name])
        assert isinstance(stack, NF4Stack) and stack.dtype is torch.bfloat16
        assert torch.equal(stack.nf4.packed, right.nf4.packed)
        assert torch.equal(stack.nf4.absmax, right.nf4.absmax)
        difference = (right.dequantize() - expected[name]).detach().double().flatten(1)
        norms = expected[name].detach().double().flatten(1).norm(dim=1)
        errors.append((difference.norm(dim=1) / norms).max().item())
    assert summary.largest_error >= max(errors) * 0.999
    linear = [m for m in got.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(linear) == summary.plan.quantized.tensors - summary.plan.experts.tensors > 0
    plain = {n: p for n, p in got.state_dict().items() if p.dtype is not torch.uint8}
    for name, parameter in model.state_dict().items():
        if name in plain and "experts" not in name:
            assert torch.equal(plain[name], parameter)
    ids = torch.arange(16).view(2, 8)
    assert got(ids).logits.isfinite().all()
    total = sum(tensor.nbytes for tensor in load_tensors(tmp_path / "out").values())
    assert summary.plan.total.bytes_after == total
    count = sum(p.numel() for p in expected.values())
    assert summary.plan.experts.parameters == count


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_keys_are_those_of_the_model_s_own_state(tmp_path, family):
    """And so is the config: loaded and saved again, the checkpoint is the same."""
    save_moe(tmp_path / "src", family)
    convert(tmp_path / "src", tmp_path / "out", blocksize=32)
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    got.save_pretrained(tmp_path / "again")
    one, two = load_tensors(tmp_path / "out"), load_tensors(tmp_path / "again")
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        if name.endswith(STATE_KEY):
            texts = [json.loads(bytes(t.tolist())) for t in (tensor, two[name])]
            assert texts[0].keys() == texts[1].keys()
        else:
            assert torch.equal(tensor, two[name]), name
    configs = [
        json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]
        for name in ("out", "again")
    ]
    assert configs[0] == configs[1]
    assert configs[0]["experts_blocksize"] == 32


@pytest.mark.parametrize("family", ONE_BY_ONE)
def test_experts_can_have_the_keys_of_linear_layers(tmp_path, family):
    save_moe(tmp_path / "src", family)
    source = load_tensors(tmp_path / "src")
    summary = convert(tmp_path / "src", tmp_path / "out", stack=False)
    got = load_tensors(tmp_path / "out")
    names = [name for name in source if ".experts." in name]
    for name in names:
        w = NF4Weight.from_state_dict(got, name.removesuffix("weight"))
        expected = peftkern.quantize_nf4(source[name])
        assert w.shape == tuple(source[name].shape) and w.nested
        assert torch.equal(w.packed, expected.packed) and torch.equal(w.absmax, expected.absmax)
    assert summary.plan.experts.tensors == len(names) and not summary.plan.kept_experts.tensors
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "bitsandbytes" and config["load_in_4bit"]
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


LOAD = """
import sys
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1])
"""


def test_transformers_alone_does_not_load_stacks_wrongly(tmp_path):
    save_moe(tmp_path / "src", "mixtral")
    convert(tmp_path / "src", tmp_path / "out")
    with pytest.raises(AssertionError, match="ignore_mismatched_sizes"):
        run_code(LOAD, tmp_path / "out")


@pytest.mark.parametrize("name", ["experts", "gate_up_proj", "model.layers.1.mlp"])
def test_skipped_experts_stay_as_they_are(tmp_path, name):
    model = save_moe(tmp_path / "src", "mixtral")
    summary = convert(tmp_path / "src", tmp_path / "out", skip=(name,))
    got, source = load_tensors(tmp_path / "out"), load_tensors(tmp_path / "src")
    kept = {
        **{"experts": lambda n: ".experts." in n, "gate_up_proj": lambda n: ".w2." not in n},
        "model.layers.1.mlp": lambda n: ".1.block_sparse_moe.experts." in n,
    }[name]
    for key in (key for key in source if ".experts." in key):
        assert (key in got) == kept(key)
    assert summary.plan.kept_experts.tensors > 0
    loaded = stacks(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert loaded.keys() == stacks(model).keys()
    assert any(isinstance(stack, NF4Stack) for stack in loaded.values()) == (name != "experts")
    for key, stack in loaded.items():
        if not isinstance(stack, NF4Stack):
            assert torch.equal(stack, model.get_parameter(key))


@pytest.mark.parametrize("known", [True, False])
def test_stacks_that_are_turned_on_loading(tmp_path, monkeypatch, known):
    """Qwen3-VL's file holds [E, K, 2I], its model [E, 2I, K]; other rearrangements leave it so."""
    text = {
        **{"vocab_size": 48, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4},
        **{"num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 64},
        **{"moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2},
        "rope_parameters": {"rope_type": "default", "mrope_section": [4, 2, 2]},
    }
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2}
    vision |= {"out_hidden_size": 64, "deepstack_visual_indexes": [0]}
    config = Qwen3VLMoeConfig(text_config=text, vision_config=vision)
    model = Qwen3VLMoeModel(config).bfloat16()
    model.save_pretrained(tmp_path / "src")
    if not known:
        monkeypatch.setattr(extract_experts, "transposes_experts", lambda converter: False)
    summary = convert(tmp_path / "src", tmp_path / "out")
    plan = summary.plan
    assert (plan.experts.tensors, plan.kept_experts.tensors) == ((2, 0) if known else (0, 2))
    loaded = [Qwen3VLMoeModel.from_pretrained(tmp_path / "out")]
    if known:  # as it is saved again
        loaded[0].save_pretrained(tmp_path / "again")
        loaded.append(Qwen3VLMoeModel.from_pretrained(tmp_path / "again"))
    for found in loaded:
        for name, stack in stacks(found).items():
            weight = model.get_parameter(name)
            right = NF4Stack.from_dense(weight).dequantize() if known else weight
            assert isinstance(stack, NF4Stack) == known
            assert torch.equal(stack.dequantize() if known else stack, right), name


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_experts_that_are_no_whole_blocks_are_refused(tmp_path, family):
    sizes = {"intermediate_size": 33, "moe_intermediate_size": 33}
    save_moe(tmp_path / "src", family, **sizes)
    with pytest.raises(CheckpointError, match="expected experts of a multiple of 128 values"):
        convert(tmp_path / "src", tmp_path / "out", blocksize=128)
    convert(tmp_path / "src", tmp_path / "out", blocksize=64)


def test_shapes_that_do_not_fit_the_config(tmp_path):
    save_moe(tmp_path / "src", "mixtral")
    configure(tmp_path / "src", intermediate_size=64)
    with pytest.raises(CheckpointError, match=r"experts.0.w\d.weight: shape .* does not fit"):
        convert(tmp_path / "src", tmp_path / "out")


def test_experts_that_are_missing(tmp_path):
    save_moe(tmp_path / "src", "mixtral")
    with changing(tmp_path / "src" / "model.safetensors") as tensors:
        del tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    with pytest.raises(CheckpointError, match="of each of 4 experts, numbered from 0, got 7"):
        convert(tmp_path / "src", tmp_path / "out")
    with changing(tmp_path / "src" / "model.safetensors") as tensors:
        tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight"] = torch.ones(96, 64)
    with pytest.raises(CheckpointError, match="expected tensors of one dtype"):
        convert(tmp_path / "src", tmp_path / "out")


MEASURE = """
import sys
import torch
from safetensors.torch import save_file
from peftkern.tools.checkpoints.checkpoint import read_checkpoint
from peftkern.tools.quantize.file_plan import Choice, Options, Stack
from peftkern.tools.quantize.quantized_checkpoint import quantize_checkpoint

def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))

def run(source, destination):
    checkpoint = read_checkpoint(source)
    (name, info), = checkpoint.tensors.items()
    choice = Choice({}, {name: Stack(info.shape, (name,))})
    quantize_checkpoint(checkpoint, destination, choice, {}, Options())

run(sys.argv[1], sys.argv[2] + "-warm")
before = peak()
run(sys.argv[3], sys.argv[2])
print(peak() - before)
"""


def test_memory_of_a_stack_is_that_of_an_expert(tmp_path):
    """Peak RSS over that after a small run: the stack in 4 bits, and a few experts."""
    shapes = {"warm": (2, 64, 64), "large": (48, 1024, 1024)}
    for name, shape in shapes.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        torch.manual_seed(0)
        tensors = {"m.experts.w": torch.randn(shape).bfloat16()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    back = {"MALLOC_MMAP_THRESHOLD_": "1000000"}
    folders = (tmp_path / "warm", tmp_path / "out", tmp_path / "large")
    grown = int(run_code(MEASURE, *folders, **back))
    dense = 2 * 48 * 1024 * 1024
    assert dense / 4 < grown < 0.75 * dense
