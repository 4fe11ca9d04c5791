"""Checkpoints in 4 bits that read as dense ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoint_folders import configure
from decoded_folders import KINDS, decode, dense_values, large_experts
from merged_folders import load, make_mixture, make_model, save_base
from peak_memory import growth
from quantized_folders import convert

from peftkern.tools.checkpoints.checkpoint import CheckpointError, read_checkpoint
from peftkern.tools.checkpoints.decoded import decoded


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_those_that_transformers_loads(tmp_path: Path, kind: str) -> None:
    """Whole, and item by item; what its config says is a dense model."""
    format, make = KINDS[kind]
    base = save_base(tmp_path / "base", make())
    convert(base, tmp_path / "stored", format=format)
    found = decoded(read_checkpoint(tmp_path / "stored", quantized=True))
    expected = dense_values(load(decode(tmp_path / "stored", base, tmp_path / "decoded")))
    assert "quantization_config" not in found.config
    infos = [info for name, info in found.tensors.items() if name in expected]
    assert len(infos) == len(found.tensors)
    stacks = {info.name for info in infos if len(info.shape) == 3}
    for names in (set(), stacks):
        for info in infos:
            got = torch.stack(list(info.items())) if info.name in names else info.read()
            assert got.dtype is torch.bfloat16 and tuple(got.shape) == info.shape
            assert info.nbytes == got.nbytes and torch.equal(got, expected[info.name]), info.name
    dense = read_checkpoint(base)
    assert decoded(dense) is dense


def test_a_file_that_is_cut_off_while_it_is_read_is_named(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", make_mixture("Qwen3Moe"))
    convert(base, tmp_path / "stored")
    found = decoded(read_checkpoint(tmp_path / "stored", quantized=True))
    path = tmp_path / "stored" / "model.safetensors"
    names = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj", "self_attn.q_proj.weight")
    infos = [found.tensors[f"model.layers.0.{name}"] for name in names]
    path.write_bytes(path.read_bytes()[:2000])
    for info in infos:
        for read in (info.read, lambda info=info: list(info.items())):
            with pytest.raises(CheckpointError, match=r"model\.safetensors: changed while it was"):
                read()


@pytest.mark.parametrize(("family", "format"), [("Qwen3Moe", "nf4"), ("GptOss", "mxfp4")])
def test_experts_are_read_one_at_a_time(tmp_path: Path, family: str, format: str) -> None:
    """Of 128, whose stack is 75 MB."""
    count = 128
    folder = large_experts(tmp_path / "large", family, format, count) / "base"
    found = decoded(read_checkpoint(folder, quantized=True))
    info = next(info for name, info in found.tensors.items() if name.endswith("gate_up_proj"))

    def read() -> None:
        assert sum(1 for _ in info.items()) == count

    read()
    # An expert is 0.6 MB; 3 to 5 MB are pages that the heap gave back before and takes again.
    assert growth(read) < info.nbytes / 8
    whole = growth(info.read)
    assert whole < info.nbytes * 1.3


def test_what_is_quantized_otherwise_is_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", make_model(num_hidden_layers=1))
    configure(base, quantization_config={"quant_method": "gptq"})
    with pytest.raises(CheckpointError, match="got quant_method 'gptq'"):
        decoded(read_checkpoint(base, quantized=True))
