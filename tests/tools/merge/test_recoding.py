"""Bases in 4 bits that are written in other 4 bits: decoded, added to, and quantized anew."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoint_folders import load_tensors
from decoded_folders import decode, dense_values, mixture_in_4_bits
from merged_folders import (
    WIDE_MODELS,
    assert_quantized_sums,
    load,
    make_model,
    merge,
    merged_by_peft,
    mixture,
    refused,
    save_both,
)
from quantized_folders import convert
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from peftkern.tools.merge.merge import Summary


def loaded_values(folder: Path) -> dict[str, Tensor]:
    """The values of a checkpoint, of layers as [N, K]."""
    model = load(folder)
    values = {name: value.double() for name, value in dense_values(model).items()}
    for name, module in model.named_modules():
        if isinstance(module, Conv1D):
            values[f"{name}.weight"] = values[f"{name}.weight"].T
    return values


def assert_told(summary: Summary, decoded: Path, peft: Path, written: Path) -> None:
    """The report's numbers are those of what transformers loads: of sums and of other weights."""
    plain, sums, got = (loaded_values(folder) for folder in (decoded, peft, written))
    for name, change in summary.changes.items():
        error = (sums[name] - got[name]).norm() / sums[name].norm()
        if error or change.relative_error > 0.01:  # beside those that are dense
            assert change.relative_error == pytest.approx(error.item(), rel=2e-2)
    left = energy = 0.0
    for name in summary.others:
        left += (plain[name] - got[name]).square().sum().item()
        energy += plain[name].square().sum().item()
    expected = (left / energy) ** 0.5 if summary.others else 0.0
    assert summary.total_of_others.relative_error == pytest.approx(expected, rel=2e-2)


@pytest.mark.parametrize(
    ("kind", "stored", "options"),
    [
        ("llama", "nf4", {"out": "mxfp4"}),
        ("gpt2", "nf4", {"out": "int4"}),
        ("gpt2", "mxfp4", {"out": "nf4"}),
        ("llama", "nvfp4", {"out": "fp4"}),
        ("llama", "fp4", {"out": "nvfp4"}),
        ("llama", "int4", {"out": "int4", "blocksize": 32}),
        ("gpt2", "nf4", {"out": "nf4", "blocksize": 256}),
    ],
)
def test_layers_are_those_of_quantizing_the_dense_merge(tmp_path, kind, stored, options) -> None:
    sizes, targets = WIDE_MODELS[kind]
    base, adapter = save_both(tmp_path, make_model(**sizes), target_modules=targets[:2])
    convert(base, tmp_path / "stored", format=stored)
    summary = assert_quantized_sums(tmp_path, tmp_path / "stored", adapter, **options)
    assert summary.others  # layers without an adapter
    decoded = decode(tmp_path / "stored", base, tmp_path / "decoded")
    merged_by_peft(decoded, adapter, tmp_path / "peft")
    assert_told(summary, decoded, tmp_path / "peft", tmp_path / "out")


@pytest.mark.parametrize(
    ("family", "stored", "options"),
    [
        ("GptOss", "mxfp4", {"out": "nf4"}),
        ("GptOss", "nf4", {"out": "mxfp4"}),
        ("Qwen3Moe", "nf4", {"out": "nf4", "blocksize": 128}),
        ("Mixtral", "fp4", {"out": "nf4"}),
    ],
)
def test_stacks_are_those_of_quantizing_the_dense_merge(tmp_path, family, stored, options) -> None:
    """Of FP4 the layers alone, beside dense experts."""
    folder, decoded, adapter = mixture_in_4_bits(tmp_path, family, stored)
    summary = assert_quantized_sums(tmp_path, folder, adapter, **options)
    merged_by_peft(decoded, adapter, tmp_path / "peft")
    assert_told(summary, decoded, tmp_path / "peft", tmp_path / "out")


def test_a_residual_adapter_is_for_the_new_blocks(tmp_path: Path) -> None:
    base, adapter = save_both(tmp_path, make_model(num_hidden_layers=1), target_modules=["q_proj"])
    convert(base, tmp_path / "stored", format="mxfp4")
    summary = merge(tmp_path / "stored", adapter, to=tmp_path / "out", out="nf4", residual=8)
    merge(tmp_path / "stored", adapter, to=tmp_path / "dense", out="bf16")
    sums = dense_values(load(tmp_path / "dense"))
    assert summary.others
    merge(tmp_path / "out", tmp_path / "out" / "residual_adapter", to=tmp_path / "both", out="fp32")
    stored, both = dense_values(load(tmp_path / "out")), load_tensors(tmp_path / "both")
    for name in (*summary.changes, *summary.others):
        lost = (sums[name].float() - stored[name].float()).norm()
        assert (sums[name].float() - both[name].float()).norm() < 0.9 * lost


def test_the_same_blocks_stay_as_they_are(tmp_path: Path) -> None:
    """What no update changes is copied, whatever the absmax are in."""
    base, adapter = save_both(tmp_path, make_model(num_hidden_layers=1), target_modules=["q_proj"])
    convert(base, tmp_path / "stored", double_quant=False)
    summary = merge(tmp_path / "stored", adapter, to=tmp_path / "out", out="nf4", blocksize=64)
    before, got = load_tensors(tmp_path / "stored"), load_tensors(tmp_path / "out")
    assert not summary.others
    changed = {name for name in before if not before[name].equal(got[name])}
    assert changed and all("q_proj" in name for name in changed)


def test_experts_that_the_format_cannot_hold(tmp_path: Path) -> None:
    base, adapter = mixture(tmp_path, "Qwen3Moe")
    convert(base, tmp_path / "stored")
    refused("experts cannot be written in mxfp4", tmp_path / "stored", adapter, out="mxfp4")
