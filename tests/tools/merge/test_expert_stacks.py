"""Bases whose experts are stacks in 4 bits: decoded, added to and encoded, expert by expert."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_folders import changing, config_of, load_tensors
from decoded_folders import decode, dense_values, large_experts, mixture_in_4_bits
from merged_folders import (
    STACKS,
    assert_same_tensors,
    load,
    make_mixture,
    merge,
    merged_by_peft,
    mixture,
    refused,
    save_both,
)
from peak_memory import growth
from quantized_folders import convert
from torch import Tensor

LAYER = "model.layers.0"
EXPERTS = [f"{LAYER}.{name}" for name in STACKS]


KINDS = [
    *(("Qwen3Moe", "nf4"), ("Mixtral", "nf4"), ("DeepseekV3", "nf4"), ("GptOss", "nf4")),
    ("GptOss", "mxfp4"),
]


@pytest.mark.parametrize(("family", "format"), KINDS)
def test_the_sums_are_those_of_peft_over_the_decoded_base(tmp_path, family, format) -> None:
    """Dense; and quantized again, as `peftkern quantize` does it, what no update changes copied."""
    stored, decoded, adapter = mixture_in_4_bits(tmp_path, family, format)
    merged_by_peft(decoded, adapter, tmp_path / "peft")
    merge(stored, adapter, to=tmp_path / "dense", out="bf16")
    assert "quantization_config" not in config_of(tmp_path / "dense")
    expected = load(tmp_path / "peft").state_dict()
    assert_same_tensors(load(tmp_path / "dense").state_dict(), expected)

    summary = merge(stored, adapter, to=tmp_path / "out")
    convert(tmp_path / "peft", tmp_path / "expected", format=format)
    before, got = load_tensors(stored), load_tensors(tmp_path / "out")
    again = load_tensors(tmp_path / "expected")
    assert got.keys() == before.keys() == again.keys()
    assert config_of(tmp_path / "out") == config_of(stored)
    changed = tuple(name.removesuffix("_proj") for name in summary.changes)
    assert set(EXPERTS) <= summary.changes.keys()
    for name, tensor in got.items():
        assert torch.equal(tensor, (again if name.startswith(changed) else before)[name]), name
    peft = load(tmp_path / "peft").state_dict()
    plain, written = load(decoded).state_dict(), dense_values(load(tmp_path / "out"))
    for name in EXPERTS:
        update = peft[name].double() - plain[name].double()
        kept = ((written[name].double() - plain[name].double()) * update).sum()
        survived = (kept / update.square().sum()).item()
        assert summary.changes[name].survival == pytest.approx(survived, rel=1e-2)


@pytest.mark.parametrize(("family", "format"), [("Qwen3Moe", "nf4"), ("GptOss", "mxfp4")])
def test_experts_that_no_adapter_changes(tmp_path: Path, family: str, format: str) -> None:
    """Stay as they are stored, or are decoded; their parts may lie in different files."""
    base, adapter = save_both(tmp_path, make_mixture(family), target_modules=["o_proj"])
    convert(base, tmp_path / "stored", format=format, shard_bytes=3000)
    summary = merge(tmp_path / "stored", adapter, to=tmp_path / "out")
    assert len(summary.plan.files) > 3
    before, got = load_tensors(tmp_path / "stored"), load_tensors(tmp_path / "out")
    assert before.keys() == got.keys()
    parts = [name for name in before if name.startswith(f"{LAYER}.mlp.experts.")]
    assert len(parts) >= 4 and all(torch.equal(before[name], got[name]) for name in parts)
    decoded = decode(tmp_path / "stored", base, tmp_path / "decoded")
    merged_by_peft(decoded, adapter, tmp_path / "peft")
    merge(tmp_path / "stored", adapter, to=tmp_path / "dense", out="bf16")
    expected = load(tmp_path / "peft").state_dict()
    assert_same_tensors(load(tmp_path / "dense").state_dict(), expected)


def test_base_without_its_head(tmp_path: Path) -> None:
    """An adapter of a model with a head fits it."""
    base, adapter = mixture(tmp_path, "Qwen3Moe")
    load(base).model.save_pretrained(tmp_path / "headless")
    for name in ("base", "headless"):
        convert(tmp_path / name, tmp_path / f"{name}-nf4")
        merge(tmp_path / f"{name}-nf4", adapter, to=tmp_path / f"{name}-out")
    got, expected = (load_tensors(tmp_path / f"{name}-out") for name in ("headless", "base"))
    expected = {name.removeprefix("model."): t for name, t in expected.items()}
    del expected["lm_head.weight"]
    assert_same_tensors(got, expected)


A, ABSMAX = EXPERTS[0], f"{LAYER}.mlp.experts.gate_up_absmax"
BROKEN: dict[str, tuple[str, str, Callable[[dict[str, Tensor]], Any], str]] = {
    "no absmax": (
        *("Qwen3Moe", "nf4"),
        lambda tensors: tensors.pop(ABSMAX),
        r"gate_up_proj: expected a part of experts in 4 bits, got U8 \[4, 2048\]",
    ),
    "no scales": (
        *("GptOss", "mxfp4"),
        lambda tensors: tensors.pop(f"{A}_scales"),
        r"gate_up_proj_blocks: expected a part of experts in 4 bits, got U8",
    ),
    "fewer experts": (
        *("Qwen3Moe", "nf4"),
        lambda tensors: tensors.update({A: tensors[A][:3].clone()}),
        r"gate_up_proj: no weight in 4 bits: shape: \[4, 64, 64\] does not fit packed",
    ),
    "no blocks": (
        *("Qwen3Moe", "nf4"),
        lambda tensors: tensors.update({ABSMAX: torch.zeros(4, 0)}),
        r"gate_up_proj: no weight in 4 bits: expected parts of \[.*\] bytes, got \[8192, 0\]",
    ),
    "a scale without dimensions": (
        *("Qwen3Moe", "nf4"),
        lambda tensors: tensors.update({ABSMAX: torch.zeros(())}),
        r"gate_up_proj: no weight in 4 bits: shape: .* does not fit .* absmax torch.float32 \[\]",
    ),
    "other blocks": (
        *("GptOss", "mxfp4"),
        lambda tensors: tensors.update(
            {f"{A}_{part}": tensors[f"{A}_{part}"][:, :64].clone() for part in ("blocks", "scales")}
        ),
        r"gate_up_proj: no weight in 4 bits: expected experts \[4, 64, 192\], got \[4, 64, 64\]",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_stacks_that_are_none(tmp_path: Path, case: str) -> None:
    family, format, change, words = BROKEN[case]
    base, adapter = mixture(tmp_path, family)
    stored = tmp_path / "stored"
    convert(base, stored, format=format)
    with changing(stored / "model.safetensors") as tensors:
        change(tensors)
    for out in ("keep", "bf16"):
        refused(words, stored, adapter, out=out)


@pytest.mark.parametrize(
    ("family", "format", "out"),
    [
        *(("Qwen3Moe", "nf4", "keep"), ("Qwen3Moe", "nf4", "bf16"), ("Qwen3Moe", "", "nf4")),
        *(("GptOss", "mxfp4", "keep"), ("GptOss", "mxfp4", "nf4")),
    ],
)
def test_peak_memory_is_that_of_a_few_experts(tmp_path, family: str, format: str, out: str) -> None:
    """Of 128, whose stack is 75 MB in 16 bits: each of two threads holds one, and what quantizing
    it takes, which is ten times an expert, and less than half of the stack."""
    dense = 128 * 768 * 384 * 2
    warm, large = (
        large_experts(tmp_path / name, family, format, count)
        for name, count in (("warm", 4), ("large", 128))
    )
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    merge(warm / "base", warm / "adapter", to=warm / "out", out=out)
    run = partial(merge, large / "base", large / "adapter", to=large / "out", out=out)
    grown = growth(run)
    torch.set_num_threads(before)
    assert grown < dense / 2
    written = sum(path.stat().st_size for path in (large / "out").glob("*.safetensors"))
    assert written > dense / 4
