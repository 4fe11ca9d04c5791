"""Outputs in every 4-bit format, experts among them: what `peftkern quantize` makes of the sums."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_folders import config_of, load_tensors
from merged_folders import (
    MIXTURES,
    STACKS,
    WIDE_MODELS,
    assert_quantized_sums,
    assert_same_tensors,
    load,
    make_mixture,
    make_model,
    merge,
    merged_by_peft,
    mixture,
    refused,
    save_base,
    save_both,
    save_wide,
)
from quantized_folders import convert
from torch import Tensor

import peftkern
from peftkern.integrations.transformers import BlockLinearConfig  # noqa: F401  registers itself
from peftkern.layers import NF4Linear
from peftkern.layers.expert_stack import stacks_of
from peftkern.tools.adapters import read_adapter
from peftkern.tools.checkpoints.checkpoint import CheckpointError
from peftkern.tools.models import linear_layers

QUANTIZE: dict[str, Callable[[Tensor], Any]] = {
    "nf4": lambda weight: peftkern.quantize_nf4(weight, double_quant=False),
    "fp4": lambda weight: peftkern.quantize_fp4(weight, double_quant=False),
    "mxfp4": peftkern.quantize_mxfp4,
    "nvfp4": peftkern.quantize_nvfp4,
    "int4": peftkern.quantize_int4,
}
ODD = {"hidden_size": 72, "intermediate_size": 33}  # an expert of 4752 values


def as_linear(kind: str, weight: Tensor) -> Tensor:
    """The weight [N, K] of a layer of this model, and back."""
    return weight.T.contiguous() if kind == "gpt2" else weight


def survival(weight: Tensor, total: Tensor, alone: Any, stored: Any) -> float:
    """The share of an update that is in what is stored, of the weight without and with it."""
    update = total.double() - weight.double()
    kept = peftkern.dequantize(stored).double() - peftkern.dequantize(alone).double()
    return ((kept * update).sum() / update.square().sum()).item()


@pytest.mark.parametrize("out", [name for name in QUANTIZE if name != "nf4"])
@pytest.mark.parametrize("kind", WIDE_MODELS)
def test_output_is_that_of_quantizing_the_merged_checkpoint(tmp_path, kind, out) -> None:
    _, base, adapter = save_wide(tmp_path, kind)
    summary = assert_quantized_sums(tmp_path, base, adapter, out=out)
    loaded = load(tmp_path / "out")
    before, sums = load_tensors(base), load_tensors(tmp_path / "dense")
    for module in read_adapter(adapter).updates:
        name, change = f"{module}.weight", summary.changes[f"{module}.weight"]
        weight, total = (as_linear(kind, tensors[name]) for tensors in (before, sums))
        alone, w = (getattr(peftkern, f"quantize_{out}")(one) for one in (weight, total))
        assert change.survival == pytest.approx(survival(weight, total, alone, w), rel=1e-2)
        error = (peftkern.dequantize(w).double() - total.double()).norm() / total.double().norm()
        assert change.relative_error == pytest.approx(error.item(), rel=1e-2)
        if out != "fp4":
            assert torch.equal(loaded.get_submodule(module).quantized_weight.packed, w.packed)


@pytest.mark.parametrize("trained", QUANTIZE)
@pytest.mark.parametrize("kind", WIDE_MODELS)
def test_adapter_trained_on_the_base_in_4_bits(tmp_path: Path, kind: str, trained: str) -> None:
    """PEFT merges it into the values that the base had then."""
    model, base, adapter = save_wide(tmp_path, kind)
    merge(base, adapter, to=tmp_path / "out", as_trained=trained)
    for layer in linear_layers(model).values():
        rounded = peftkern.dequantize(QUANTIZE[trained](as_linear(kind, layer.weight.detach())))
        layer.weight.data = as_linear(kind, rounded)
    save_base(tmp_path / "trained", model)
    expected = merged_by_peft(tmp_path / "trained", adapter, tmp_path / "expected")
    assert_same_tensors(load_tensors(tmp_path / "out"), expected)


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_in_nf4(tmp_path: Path, family: str) -> None:
    """One by one or fused in the base: each as `quantize_` would."""
    summary = assert_quantized_sums(tmp_path, *mixture(tmp_path, family), out="nf4")
    stacks = {f"model.layers.0.{name}" for name in STACKS}
    assert stacks <= summary.changes.keys()
    assert all(0.5 < summary.changes[name].survival < 1.5 for name in stacks)


def test_gpt_oss_in_mxfp4(tmp_path: Path) -> None:
    """As OpenAI ships it: experts alone, whose rows lie along the inputs."""
    base, adapter = mixture(tmp_path, "GptOss")
    summary = assert_quantized_sums(tmp_path, base, adapter, out="mxfp4")
    before, sums = load_tensors(base), load_tensors(tmp_path / "dense")
    for name in (f"model.layers.0.{name}" for name in STACKS):
        weight, total = (tensors[name].mT.contiguous() for tensors in (before, sums))
        alone, w = map(peftkern.quantize_mxfp4, (weight, total))
        expected = survival(weight, total, alone, w)
        assert summary.changes[name].survival == pytest.approx(expected, rel=1e-2)
    experts = load(tmp_path / "out").model.layers[0].mlp.experts  # in bf16, without their kernels
    assert torch.equal(experts.down_proj.mT, peftkern.dequantize(w))


def test_trained_on_gpt_oss_in_mxfp4(tmp_path: Path) -> None:
    base, adapter = mixture(tmp_path, "GptOss")
    model = load(base)
    for parameter in (f"model.layers.0.{name}" for name in STACKS):
        weight = model.get_parameter(parameter).data
        w = peftkern.quantize_mxfp4(weight.mT.contiguous())
        weight.copy_(peftkern.dequantize(w).mT)
    save_base(tmp_path / "trained", model)
    expected = merged_by_peft(tmp_path / "trained", adapter, tmp_path / "peft")
    merge(base, adapter, to=tmp_path / "out", as_trained="mxfp4")
    assert_same_tensors(load_tensors(tmp_path / "out"), expected)
    merge(base, adapter, to=tmp_path / "again", as_trained="mxfp4", out="mxfp4")
    convert(tmp_path / "peft", tmp_path / "quantized", format="mxfp4")
    assert_same_tensors(load_tensors(tmp_path / "again"), load_tensors(tmp_path / "quantized"))


def test_model_with_experts_in_nf4_loads(tmp_path: Path) -> None:
    """From shards, of which one holds experts that begin in another one."""
    config = {"target_parameters": STACKS, "target_modules": []}
    base, adapter = save_both(tmp_path, make_mixture("Qwen3Moe"), shards="20KB", **config)
    merge(base, adapter, to=tmp_path / "out", out="nf4")
    merged = load(tmp_path / "out").model.layers[0].mlp.experts
    expected = merged_by_peft(base, adapter, tmp_path / "peft")
    for name, stack in stacks_of(merged).items():
        parts = ("gate_proj", "up_proj") if name == "gate_up_proj" else ("down_proj",)
        for e, weight in enumerate(stack.dequantize()):
            rows = [expected[f"model.layers.0.mlp.experts.{e}.{part}.weight"] for part in parts]
            nf4 = peftkern.quantize_nf4(torch.cat(rows), double_quant=False)
            assert torch.equal(weight, peftkern.dequantize(nf4))


@pytest.mark.parametrize(
    ("family", "sizes", "options", "words"),
    [
        ("Qwen3Moe", {"hidden_size": 128}, {"out": "int4"}, "experts cannot be written in int4"),
        ("Olmoe", {}, {"out": "mxfp4"}, "experts cannot be written in mxfp4"),
        ("Mixtral", ODD, {"out": "nf4"}, "a multiple of 64 values"),
        ("Qwen3Moe", {}, {"out": "nf4", "residual": 4}, "is a stack of experts"),
    ],
)
def test_experts_that_cannot_be_written(tmp_path: Path, family, sizes, options, words) -> None:
    refused(words, *mixture(tmp_path, family, **sizes), **options)


@pytest.mark.parametrize("stored", ["dense", "nf4"])
def test_layers_whose_rows_are_no_whole_blocks_are_dense(tmp_path: Path, stored: str) -> None:
    """As they are in the base, or decoded."""
    model = make_model(num_hidden_layers=1, intermediate_size=72)
    base, adapter = save_both(tmp_path, model, target_modules=["q_proj", "down_proj"])
    if stored == "nf4":
        convert(base, tmp_path / "stored")
        base = tmp_path / "stored"
    summary = assert_quantized_sums(tmp_path, base, adapter, out="mxfp4")
    assert summary.plan.unfit == ("model.layers.0.mlp.down_proj",)


@pytest.mark.parametrize(
    ("kind", "stored"),
    [("gpt2", "fp4"), ("llama", "mxfp4"), ("gpt2", "nvfp4"), ("gpt2", "int4")],
)
def test_base_in_4_bits(tmp_path: Path, kind: str, stored: str) -> None:
    """Dense, the sums with what is decoded; else quantized again, in the format of the base."""
    model, base, adapter = save_wide(tmp_path, kind)
    convert(base, tmp_path / "stored", format=stored, double_quant=False)
    for layer in linear_layers(model).values():
        rounded = peftkern.dequantize(QUANTIZE[stored](as_linear(kind, layer.weight.detach())))
        layer.weight.data = as_linear(kind, rounded)
    decoded = save_base(tmp_path / "decoded", model)
    expected = merged_by_peft(decoded, adapter, tmp_path / "peft")
    merge(tmp_path / "stored", adapter, to=tmp_path / "dense", out="bf16")
    assert_same_tensors(load_tensors(tmp_path / "dense"), expected)
    assert "quantization_config" not in config_of(tmp_path / "dense")

    summary = merge(tmp_path / "stored", adapter, to=tmp_path / "out")
    got, before = load_tensors(tmp_path / "out"), load_tensors(tmp_path / "stored")
    assert got.keys() == before.keys()
    assert config_of(tmp_path / "out") == config_of(tmp_path / "stored")
    changed = {f"{module}.weight" for module in read_adapter(adapter).updates}
    assert summary.changes.keys() == changed
    for name in changed:
        w = QUANTIZE[stored](as_linear(kind, expected[name]))
        for key, value in w.state_dict(name.removesuffix("weight")).items():
            assert "quant_state" in key or torch.equal(got[key], value), key
        change, weight = summary.changes[name], as_linear(kind, load_tensors(decoded)[name])
        update = as_linear(kind, expected[name]).double() - weight.double()
        kept = ((peftkern.dequantize(w).double() - weight.double()) * update).sum()
        assert change.survival == pytest.approx((kept / update.square().sum()).item(), rel=1e-2)
    same = [name for name in before if not name.startswith(tuple(changed))]
    assert same and all(torch.equal(got[name], before[name]) for name in same)
    load(tmp_path / "out")


def test_blocks_of_another_size(tmp_path: Path) -> None:
    base, adapter = save_both(tmp_path, make_model(num_hidden_layers=1), target_modules=["q_proj"])
    assert_quantized_sums(tmp_path, base, adapter, out="int4", blocksize=32)
    for options, words in (
        ({"out": "int4", "blocksize": 48}, "^blocksize: expected one of"),
        ({"out": "bf16", "blocksize": 64}, "^blocksize: has no effect on an output that is bf16"),
        (
            {"as_trained": "fp4", "trained_experts": True},
            "^trained_experts: has no effect on a base not",
        ),
    ):
        with pytest.raises(CheckpointError, match=words):
            merge(base, adapter, to=tmp_path / "none", **options)


@pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss"])
def test_experts_that_were_in_nf4_in_training(tmp_path: Path, family: str) -> None:
    base, adapter = mixture(tmp_path, family)
    model = load(base)
    peftkern.quantize_(model, double_quant=False)
    values = {n: p.dequantize() for n, p in model.named_parameters() if n.endswith(tuple(STACKS))}
    for name, module in model.named_modules():
        if isinstance(module, NF4Linear):
            values[f"{name}.weight"] = peftkern.dequantize(module.quantized_weight)
    assert len(values) == 2 + 4
    trained = load(base)
    trained.load_state_dict(values, strict=False)
    save_base(tmp_path / "trained", trained)
    expected = merged_by_peft(tmp_path / "trained", adapter, tmp_path / "peft")
    options = {"as_trained": "nf4", "trained_experts": True}
    merge(base, adapter, to=tmp_path / "out", **options)
    assert_same_tensors(load_tensors(tmp_path / "out"), expected)
    convert(tmp_path / "peft", tmp_path / "quantized")
    merge(base, adapter, to=tmp_path / "again", out="nf4", **options)
    assert_same_tensors(load_tensors(tmp_path / "again"), load_tensors(tmp_path / "quantized"))


def test_residual_adapter_of_another_format(tmp_path: Path) -> None:
    model = make_model(num_hidden_layers=1)
    base, adapter = save_both(tmp_path, model, target_modules=["q_proj"])
    merge(base, adapter, to=tmp_path / "out", out="mxfp4", residual=4)
    merge(base, adapter, to=tmp_path / "dense")
    sums = load_tensors(tmp_path / "dense")
    updates = read_adapter(tmp_path / "out" / "residual_adapter").updates
    assert updates.keys() == linear_layers(model).keys()
    for module, update in updates.items():
        total = sums[f"{module}.weight"]
        lost = total.double() - peftkern.dequantize(peftkern.quantize_mxfp4(total)).double()
        left = (lost - update.lora_B.double() @ update.lora_A.double()).norm()
        assert left == pytest.approx(torch.linalg.svdvals(lost)[4:].norm().item(), rel=1e-3)
