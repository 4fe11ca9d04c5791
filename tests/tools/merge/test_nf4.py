"""Bases and outputs in NF4: what is decoded, what is left as stored, what survives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_folders import config_of, load_tensors
from merged_folders import (
    assert_same_tensors,
    load,
    make_mixture,
    make_model,
    merge,
    merged_by_peft,
    refused,
    save_base,
    save_both,
)
from peft import PeftModel
from quantized_folders import convert
from torch import Tensor

import peftkern
from peftkern.formats.nf4 import NF4Weight
from peftkern.tools.adapters import read_adapter
from peftkern.tools.checkpoints.checkpoint import CheckpointError

GPT2 = {"family": "GPT2", "head": "LMHeadModel", "num_hidden_layers": 1}
C = ["c_attn", "c_proj", "c_fc"]
Q = "model.layers.0.self_attn.q_proj"
NORM = "model.norm.weight"


def decoded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every weight of a checkpoint as a dense tensor."""
    dense = {}
    for name, tensor in tensors.items():
        if f"{name}.absmax" in tensors:
            nf4 = NF4Weight.from_state_dict(tensors, name.removesuffix("weight"))
            dense[name] = peftkern.dequantize_nf4(nf4)
        elif ".weight." not in name:
            dense[name] = tensor
    return dense


def folders(tmp_path: Path, **config: Any) -> tuple[Path, Path, Path]:
    """A base, the same in NF4, and an adapter of either."""
    sizes = {key: config.pop(key) for key in ("attention_bias",) if key in config}
    double_quant = config.pop("double_quant", True)
    config = {"target_modules": ["q_proj", "down_proj"], **config}
    base, adapter = save_both(tmp_path, make_model(**sizes), **config)
    convert(base, tmp_path / "nf4", double_quant=double_quant)
    return base, tmp_path / "nf4", adapter


def expected_sums(dense: dict[str, Tensor], adapter: Path) -> dict[str, Tensor]:
    """bf16(float(decoded) + s B A), and biases plus s times theirs."""
    merged = dict(dense)
    for module, update in read_adapter(adapter).updates.items():
        delta = update.lora_B @ update.lora_A * update.scaling
        weight = dense[f"{module}.weight"]
        merged[f"{module}.weight"] = (weight.float() + delta).to(weight.dtype)
        if update.bias is not None:
            bias = dense[f"{module}.bias"]
            merged[f"{module}.bias"] = (bias.float() + update.bias * update.scaling).to(bias.dtype)
    return merged


@pytest.mark.parametrize("double_quant", [True, False])
def test_base_in_nf4_becomes_dense(tmp_path: Path, double_quant: bool) -> None:
    """Into its own 4 bits an adapter would be lost: the sums with what is decoded are kept."""
    _, nf4, adapter = folders(tmp_path, double_quant=double_quant)
    summary = merge(nf4, adapter, to=tmp_path / "out", out="bf16")
    got = load_tensors(tmp_path / "out")
    assert_same_tensors(got, expected_sums(decoded(load_tensors(nf4)), adapter))
    assert "quantization_config" not in config_of(tmp_path / "out")
    assert summary.total.survival == pytest.approx(1, abs=0.02)
    assert torch.equal(load(tmp_path / "out").get_parameter(f"{Q}.weight"), got[f"{Q}.weight"])


def test_bias_of_an_update_is_scaled_over_nf4(tmp_path: Path) -> None:
    """PEFT 0.21 forgets the scaling there."""
    config = {"attention_bias": True, "target_modules": ["q_proj"], "lora_bias": True}
    _, nf4, adapter = folders(tmp_path, **config, lora_alpha=16)
    merge(nf4, adapter, to=tmp_path / "out", out="bf16")
    expected = expected_sums(decoded(load_tensors(nf4)), adapter)
    assert_same_tensors(load_tensors(tmp_path / "out"), expected)


def test_untouched_layers_stay_as_they_are_stored(tmp_path: Path) -> None:
    """Nested absmax is not idempotent; merged layers are quantized again, and that is told."""
    _, nf4, adapter = folders(tmp_path, lora_alpha=1)
    summary = merge(nf4, adapter, to=tmp_path / "out")
    before, got = load_tensors(nf4), load_tensors(tmp_path / "out")
    updated = {f"{module}.weight" for module in read_adapter(adapter).updates}
    assert summary.changes.keys() == updated
    for name, tensor in before.items():
        if not name.startswith(tuple(updated)):
            assert torch.equal(got[name], tensor), name
    sums = expected_sums(decoded(before), adapter)
    for name in updated:
        again = peftkern.quantize_nf4(sums[name]).state_dict(name.removesuffix("weight"))
        assert torch.equal(got[name], again[name])
        assert torch.equal(got[f"{name}.absmax"], again[f"{name}.absmax"])
        change, base = summary.changes[name], decoded(before)[name].double()
        update = sums[name].double() - base
        kept = ((decoded(got)[name].double() - base) * update).sum() / update.square().sum()
        assert change.survival == pytest.approx(kept.item(), rel=1e-4)
        error = (decoded(got)[name].double() - sums[name].double()).norm()
        assert change.error_of_update == pytest.approx((error / update.norm()).item(), rel=1e-4)
        assert change.relative_error == pytest.approx(
            (error / sums[name].double().norm()).item(), rel=1e-4
        )
    assert config_of(tmp_path / "out")["quantization_config"]["load_in_4bit"]
    assert load(tmp_path / "out").get_parameter(NORM) is not None


@pytest.mark.parametrize("config", [{}, {"use_dora": True}])
def test_output_in_nf4_is_that_of_quantizing_the_merged_checkpoint(tmp_path, config) -> None:
    base, _, adapter = folders(tmp_path, **config)
    summary = merge(base, adapter, to=tmp_path / "out", out="nf4")
    merge(base, adapter, to=tmp_path / "dense")
    convert(tmp_path / "dense", tmp_path / "expected")
    assert_same_tensors(load_tensors(tmp_path / "out"), load_tensors(tmp_path / "expected"))
    assert config_of(tmp_path / "out") == config_of(tmp_path / "expected")
    assert 0.5 < summary.total.survival < 1.5
    load(tmp_path / "out")


def test_adapter_trained_on_the_base_in_nf4(tmp_path: Path) -> None:
    """All layers that were in 4 bits are what they were in training."""
    base, _, adapter = folders(tmp_path)
    merge(base, adapter, to=tmp_path / "out", as_trained="nf4")
    convert(base, tmp_path / "trained", double_quant=False)
    expected = expected_sums(decoded(load_tensors(tmp_path / "trained")), adapter)
    assert_same_tensors(load_tensors(tmp_path / "out"), expected)


@pytest.mark.parametrize(
    ("given", "options", "config"),
    [
        ("nf4", {"out": "bf16"}, {"target_modules": ["attn.c_proj"]}),
        ("nf4", {"out": "bf16"}, {"target_modules": C, "use_dora": True}),
        ("nf4", {"out": "keep"}, {"target_modules": C}),
        ("nf4", {"out": "nf4"}, {"target_modules": C}),
        ("base", {"out": "nf4"}, {"target_modules": C}),
        ("base", {"as_trained": "nf4"}, {"target_modules": C}),
        ("base", {"as_trained": "nf4", "out": "nf4"}, {"target_modules": C}),
    ],
)
def test_conv1d_is_stored_the_other_way_round(tmp_path: Path, given, options, config) -> None:
    """In NF4, which no shape tells of the square c_proj. PEFT merges into what was trained on."""
    model = make_model(**GPT2, n_inner=96)
    base, adapter = save_both(tmp_path, model, **config)
    trained = base
    if given == "nf4" or "as_trained" in options:
        convert(base, tmp_path / "nf4", double_quant=given == "nf4")
        stored = load_tensors(tmp_path / "nf4")
        dense = decoded(stored)
        turned = {k: v.T if f"{k}.absmax" in stored else v for k, v in dense.items()}
        assert len(stored) - len(turned) >= 4 * 3  # layers, and parts beside the packed codes
        model.load_state_dict(turned, strict=False)
        trained = save_base(tmp_path / "trained", model)
    expected = merged_by_peft(trained, adapter, tmp_path / "expected")
    if options.get("out", "keep") != "bf16" and "nf4" in (given, options.get("out")):
        convert(tmp_path / "expected", tmp_path / "expected in nf4")
        expected = load_tensors(tmp_path / "expected in nf4")
    merge(tmp_path / given, adapter, to=tmp_path / "out", **options)
    assert_same_tensors(load_tensors(tmp_path / "out"), expected)


def test_residual_adapter_brings_back_most_of_what_is_lost(tmp_path: Path) -> None:
    """Its factors are the best of their rank; PEFT loads it over the output."""
    base, _, adapter = folders(tmp_path)
    merge(base, adapter, to=tmp_path / "out", out="nf4", residual=8)
    merge(base, adapter, to=tmp_path / "dense")
    dense, quantized = load_tensors(tmp_path / "dense"), decoded(load_tensors(tmp_path / "out"))
    residual = read_adapter(tmp_path / "out" / "residual_adapter")
    assert len(residual.updates) == 14
    for module, update in residual.updates.items():
        assert update.scaling == 1 and update.rank == 8
        lost = dense[f"{module}.weight"].double() - quantized[f"{module}.weight"].double()
        left = lost - update.lora_B.double() @ update.lora_A.double()
        best = torch.linalg.svdvals(lost)[8:].norm()
        assert left.norm() == pytest.approx(best.item(), rel=1e-3)
    PeftModel.from_pretrained(load(tmp_path / "out"), tmp_path / "out" / "residual_adapter")


def test_force_removes_the_adapters_of_the_checkpoint_before(tmp_path: Path) -> None:
    """A link in the place of their folder is refused: nothing is written, or removed, beyond."""
    base, _, adapter = folders(tmp_path)
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    merge(base, adapter, to=out, out="nf4", residual=8)
    (out / "adapter").mkdir()
    merge(base, adapter, to=out, force=True)
    assert not (out / "residual_adapter").exists() and not (out / "adapter").exists()
    elsewhere.mkdir()
    (elsewhere / "adapter_config.json").write_text("{}")
    (out / "residual_adapter").symlink_to(elsewhere)
    with pytest.raises(CheckpointError, match="residual_adapter: expected a folder or nothing"):
        merge(base, adapter, to=out, out="nf4", residual=8, force=True)
    assert [path.name for path in elsewhere.iterdir()] == ["adapter_config.json"]


@pytest.mark.parametrize(
    ("options", "quantized", "words"),
    [
        ({"residual": 4}, False, "nothing is written in 4 bits"),
        ({"residual": 4, "out": "bf16"}, True, "nothing is written in 4 bits"),
        ({"as_trained": "nf4"}, True, "the base is in nf4 as it is"),
    ],
)
def test_options_that_do_not_fit(tmp_path: Path, options, quantized, words) -> None:
    base, nf4, adapter = folders(tmp_path)
    refused(words, nf4 if quantized else base, adapter, **options)


def test_residual_of_parts_of_parameters(tmp_path: Path) -> None:
    """A tensor for each expert is no layer that an adapter could update."""
    base, adapter = save_both(tmp_path, make_mixture("Qwen3Moe"), target_modules=["q_proj"])
    convert(base, tmp_path / "nf4", stack=False)
    words = r"experts.*is a part of model\.layers.*experts"
    refused(words, tmp_path / "nf4", adapter, residual=4)


@pytest.mark.parametrize(("out", "dtype"), [("fp32", torch.float32), ("fp16", torch.float16)])
def test_other_dtypes(tmp_path: Path, out: str, dtype: torch.dtype) -> None:
    """One rounding; a tensor that is kept in another dtype on purpose stays in it."""
    model = make_model()
    model.model.norm.float()
    base, adapter = save_both(tmp_path, model, target_modules=["q_proj", "embed_tokens"])
    merge(base, adapter, to=tmp_path / "out", out=out)
    got, before = load_tensors(tmp_path / "out"), load_tensors(base)
    updates = read_adapter(adapter).updates
    for name, tensor in before.items():
        module = name.removesuffix(".weight")
        expected = tensor.float()
        if module in updates:
            update = updates[module]
            delta = update.lora_B @ update.lora_A * update.scaling
            expected = expected + (delta.T if update.kind == "embedding" else delta)
        assert torch.equal(got[name], expected.to(tensor.dtype if name == NORM else dtype)), name
    assert config_of(tmp_path / "out")["dtype"] == str(dtype).removeprefix("torch.")
