"""`peftkern merge` as a user meets it: what it prints, what it leaves, its exit status."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from checkpoint_folders import load_tensors
from command_line import refused, told, told_json
from merged_folders import (
    assert_same_tensors,
    make_model,
    merge,
    save_adapter,
    save_base,
    save_both,
)
from quantized_folders import convert

from peftkern.cli import main


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    model = make_model(tie_word_embeddings=True)
    targets = ["q_proj", "embed_tokens"]
    base, adapter = save_both(tmp_path, model, shards="60KB", target_modules=targets)
    (base / "tokenizer.json").write_text("{}")
    (base / "pytorch_model.bin").write_text("the same weights")
    return base, adapter


def test_a_checkpoint_is_merged_and_described(tmp_path: Path, folders, capfd) -> None:
    out = tmp_path / "out"
    lines = told(capfd, "merge", *folders, out).splitlines()
    assert lines[0] == "3 weights merged, 18 tensors copied, in 3 files"
    assert lines[1] == "lm_head.weight: no longer tied to model.embed_tokens.weight, written apart"
    assert lines[2].startswith(("100.", "99."))
    assert "of the update survives rounding" in lines[2]
    assert lines[-3:] == [
        "2 other files copied",
        "left behind: pytorch_model.bin",
        f"{out}: written",
    ]
    merge(*folders, to=tmp_path / "expected")
    assert_same_tensors(load_tensors(out), load_tensors(tmp_path / "expected"))


def test_one_of_each_is_told_in_the_singular(tmp_path: Path, capfd) -> None:
    config = {"target_modules": ["q_proj"], "layers_to_transform": [0]}
    base, adapter = save_both(tmp_path, make_model(), **config)
    for other in base.glob("generation_config.json"):
        other.unlink()
    (base / "tokenizer.json").write_text("{}")
    lines = told(capfd, "merge", base, adapter, tmp_path / "out").splitlines()
    assert lines[0].startswith("1 weight merged, ") and lines[0].endswith(" in 1 file")
    assert "1 other file copied" in lines


def test_full_disk_says_how_to_go_on(tmp_path: Path, folders, capfd, monkeypatch) -> None:
    arguments = ("merge", *folders, tmp_path / "out")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "ftruncate", full)
        refused(capfd, "No space left on device; the same command goes on from there", *arguments)
    told(capfd, *arguments)


def test_weights_of_adapters_and_json(tmp_path: Path, capsys) -> None:
    model = make_model()
    base = save_base(tmp_path / "base", model)
    one = save_adapter(tmp_path / "one", model, target_modules=["q_proj"])
    two = save_adapter(tmp_path / "two:2", model, target_modules=["q_proj"])
    arguments = [base, f"{one}:0.5", f"{two}:-1e-1", two, tmp_path / "out"]
    said = told_json(capsys, "merge", *arguments)
    names = {f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)}
    assert said["survived"] and said["weights"].keys() == names
    assert said["files"].keys() == {"model.safetensors"} and said["untied"] == {}
    assert said["total"]["values_measured"] > 0
    merge(base, (one, 0.5), (two, -0.1), two, to=tmp_path / "expected")
    assert_same_tensors(load_tensors(tmp_path / "out"), load_tensors(tmp_path / "expected"))


def test_update_that_does_not_survive_nf4(tmp_path: Path, capfd) -> None:
    """The status is 1; dense it survives."""
    config = {"target_modules": ["q_proj"], "lora_alpha": 0.1}
    base, adapter = save_both(tmp_path, make_model(), **config)
    convert(base, tmp_path / "nf4")
    arguments = ["merge", str(tmp_path / "nf4"), str(adapter)]
    assert main([*arguments, str(tmp_path / "out")]) == 1
    error = capfd.readouterr().err
    assert "of the update survived, expected 50%: --out bf16 keeps it" in error
    told(capfd, *arguments, tmp_path / "any", "--min-survival", "0")
    told(capfd, *arguments, tmp_path / "dense", "--out", "fp32", "--min-survival", "0.99")
    assert load_tensors(tmp_path / "dense")["lm_head.weight"].dtype is torch.float32


def test_a_base_in_other_4_bits_is_told_what_that_loses(tmp_path: Path, capsys) -> None:
    base, adapter = save_both(tmp_path, make_model(), target_modules=["q_proj"])
    convert(base, tmp_path / "nf4")
    arguments = ["merge", tmp_path / "nf4", adapter]
    said = told(capsys, *arguments, tmp_path / "out", "--out", "mxfp4", "--min-survival", "0")
    (line,) = (line for line in said.splitlines() if "quantized anew" in line)
    assert line.startswith("12 other weights quantized anew, with an error of ")
    others = {"--out": "nf4", "--blocksize": "128", "--min-survival": "0"}
    words = [word for option in others.items() for word in option]
    record = told_json(capsys, *arguments, tmp_path / "json", *words)
    assert len(record["others"]) == 12 and not record["others"].keys() & record["weights"].keys()
    assert all(0.02 < error < 0.2 for error in record["others"].values())


def test_bad_input_is_one_line(tmp_path: Path, capfd, folders) -> None:
    base, adapter = folders
    out = tmp_path / "out"
    refused(capfd, "nothing: expected", "merge", base, tmp_path / "nothing", out)
    refused(
        capfd, "much: expected ADAPTER or ADAPTER:WEIGHT", "merge", base, f"{adapter}:much", out
    )
    refused(capfd, "--out: expected one of", "merge", base, adapter, out, "--out", "int8")
    refused(capfd, "--blocksize: has no effect", "merge", base, adapter, out, "--blocksize", "64")
    refused(capfd, "--residual: expected a rank", "merge", base, adapter, out, "--residual", "-1")
    refused(capfd, "--min-survival: expected", "merge", base, adapter, out, "--min-survival", "2")
    for there in (base / "in", adapter):
        refused(capfd, "apart from the source", "merge", base, adapter, there, "--force")
    refused(capfd, "expected a folder with config.json", "merge", tmp_path / "no", adapter, out)
    refused(capfd, "Missing argument", "merge", base, adapter)
    assert not out.exists()
