"""Experts in NF4 checkpoints, one by one or fused: bytes, names, and what is left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.nn.parametrize import replace_parameter_4bit
from checkpoint_folders import MOE_FAMILIES, load_tensors, save_moe
from processes import run_code
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen3VLMoeConfig, Qwen3VLMoeModel

import peftkern
from peftkern.formats.nf4 import STATE_KEY, NF4Weight
from peftkern.tools.quantize.checkpoint import CheckpointError, read_checkpoint
from peftkern.tools.quantize.linear_weights import find_weights
from peftkern.tools.quantize.nf4_checkpoint import Options, Summary, quantize_checkpoint

ONE_BY_ONE = [family for family, (*_, fused) in MOE_FAMILIES.items() if not fused]
FUSED = [family for family, (*_, fused) in MOE_FAMILIES.items() if fused]


def convert(source: Path, destination: Path, skip: tuple[str, ...] = (), **how: Any) -> Summary:
    checkpoint, options = read_checkpoint(source), Options(**how)
    blocks = {"blocksize": options.blocksize, "double_quant": options.double_quant}
    weights, config = find_weights(checkpoint, skip=skip, **blocks)
    return quantize_checkpoint(checkpoint, destination, weights, config, options)


def stacks(model: nn.Module) -> dict[str, Tensor]:
    found = {n: p for n, p in model.state_dict().items() if "experts" in n and p.dim() == 3}
    assert found
    return found


def read_weight(tensors: dict[str, Tensor], name: str) -> NF4Weight:
    keys = [key for key in tensors if key == name or key.startswith(f"{name}.")]
    return NF4Weight.from_state_dict({f"weight{k[len(name) :]}": tensors[k] for k in keys})


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("family", ONE_BY_ONE)
def test_experts_of_their_own_tensors_have_bitsandbytes_keys(tmp_path, family, double_quant):
    """They are all 4-bit, and with a plain absmax they are the bytes of the model's stack."""
    model = save_moe(tmp_path / "src", family)
    source = load_tensors(tmp_path / "src")
    summary = convert(tmp_path / "src", tmp_path / "out", double_quant=double_quant)
    got = load_tensors(tmp_path / "out")
    names = [name for name in source if ".experts." in name]
    parts = {}
    for name in names:
        w = parts[name] = read_weight(got, name)
        expected = peftkern.quantize_nf4(source[name], double_quant=double_quant)
        assert w.nested == double_quant and w.shape == tuple(source[name].shape)
        assert torch.equal(w.packed, expected.packed) and torch.equal(w.absmax, expected.absmax)
    assert summary.plan.experts.tensors == len(names) and not summary.plan.kept_experts.tensors
    assert summary.plan.experts.parameters == sum(t.numel() for t in stacks(model).values())
    if double_quant:
        return
    for name, stack in stacks(model).items():
        whole = peftkern.quantize_nf4(stack, double_quant=False)
        layer, kind = name.rsplit(".experts.")
        layer = layer.rpartition(".")[0]
        ours = {n: w for n, w in parts.items() if n.startswith(f"{layer}.")}
        downs = ("w2.weight", "down_proj.weight")
        if kind == "down_proj":
            order = sorted(n for n in ours if n.endswith(downs))
        else:  # gate of an expert, its up, and the next one's
            order = sorted(n for n in ours if not n.endswith(downs))
        for field in ("packed", "absmax"):
            joined = torch.cat([getattr(ours[n], field) for n in order])
            assert torch.equal(joined, getattr(whole, field))


@pytest.mark.parametrize("family", FUSED)
def test_a_stack_has_the_bytes_and_the_keys_of_a_quantized_parameter(tmp_path, family):
    """Those of bitsandbytes.nn.parametrize, whether or not other layers have a nested absmax."""
    model = save_moe(tmp_path / "src", family)
    for double_quant in (True, False):
        out = tmp_path / str(double_quant)
        summary = convert(tmp_path / "src", out, double_quant=double_quant)
        got = load_tensors(out)
        for name, stack in stacks(model).items():
            holder = nn.Module()
            holder.stack = nn.Parameter(stack.clone())
            replace_parameter_4bit(holder, "stack", quant_type="nf4", blocksize=64)
            expected = holder.state_dict()
            keys = {k.replace(name, "stack") for k in got if k == name or f"{name}." in k}
            assert keys == expected.keys()
            for key, value in expected.items():
                mine = got[key.replace("stack", name, 1)]
                if key.endswith(STATE_KEY):
                    mine, theirs = (json.loads(bytes(x.tolist())) for x in (mine, value))
                    assert mine == theirs
                else:
                    assert mine.dtype is value.dtype and torch.equal(mine, value), key
        assert summary.plan.experts.tensors == len(stacks(model))
        biases = [name for name in got if name.endswith("_bias")]
        assert len(biases) == (4 if family == "gpt_oss" else 0)
        assert summary.plan.kept_experts.tensors == len(biases)
        total = sum(tensor.nbytes for tensor in got.values())
        assert summary.plan.total.bytes_after == total


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_transformers_alone_does_not_load_them_wrongly(tmp_path, family):
    save_moe(tmp_path / "src", family)
    convert(tmp_path / "src", tmp_path / "out")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


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
        assert (f"{key}.absmax" in got) != kept(key)
    assert summary.plan.kept_experts.tensors > 0
    if name == "experts":
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert stacks(loaded).keys() == stacks(model).keys()
        assert any(isinstance(module, bnb.nn.Linear4bit) for module in loaded.modules())


def test_stacks_that_are_turned_on_loading_are_left(tmp_path):
    """Qwen3-VL's file holds [E, K, 2I], its model [E, 2I, K]."""
    text = {
        **{"vocab_size": 48, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4},
        **{"num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 64},
        **{"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2},
        "rope_parameters": {"rope_type": "default", "mrope_section": [4, 2, 2]},
    }
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2}
    vision |= {"out_hidden_size": 64, "deepstack_visual_indexes": [0]}
    config = Qwen3VLMoeConfig(text_config=text, vision_config=vision)
    Qwen3VLMoeModel(config).save_pretrained(tmp_path / "src")
    summary = convert(tmp_path / "src", tmp_path / "out")
    assert summary.plan.kept_experts.tensors == 2 and not summary.plan.experts.tensors
    Qwen3VLMoeModel.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_experts_that_are_no_whole_blocks_are_refused(tmp_path, family):
    sizes = {"intermediate_size": 33, "moe_intermediate_size": 33}
    save_moe(tmp_path / "src", family, **sizes)
    with pytest.raises(CheckpointError, match=r"blocksize: .*no whole blocks of 128; a"):
        convert(tmp_path / "src", tmp_path / "out", blocksize=128)
    convert(tmp_path / "src", tmp_path / "out", blocksize=64)


def test_shapes_that_do_not_fit_the_config(tmp_path):
    save_moe(tmp_path / "src", "mixtral")
    path = tmp_path / "src" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "intermediate_size": 64}))
    with pytest.raises(CheckpointError, match=r"experts.0.w\d.weight: shape .* does not fit"):
        convert(tmp_path / "src", tmp_path / "out")


MEASURE = """
import sys
import torch
from safetensors.torch import save_file
from peftkern.tools.quantize.checkpoint import read_checkpoint
from peftkern.tools.quantize.nf4_checkpoint import Options, quantize_checkpoint

def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))

def run(source, destination):
    checkpoint = read_checkpoint(source)
    quantize_checkpoint(checkpoint, destination, {"m.experts.w": False}, {}, Options())

run(sys.argv[1], sys.argv[2] + "-warm")
before = peak()
run(sys.argv[3], sys.argv[2])
print(peak() - before)
"""


def test_memory_of_a_stack_is_that_of_an_expert(tmp_path):
    """Peak RSS over that after a small run: the stack in 4 bits twice, when its experts are put
    together, and a few experts; dense it is twice as large as that."""
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
