"""`peftkern adapter resize | combine`: files in, files out, what was lost in a table or in JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path

import adapters as cases
import pytest
import torch
from checkpoint_folders import save_llama
from command_line import refused, told, told_json
from peft import PeftModel
from tolerances import SVD_RECONSTRUCTION
from torch import Tensor
from transformers import LlamaForCausalLM

from peftkern.methods.low_rank_algebra import Loss
from peftkern.tools.adapters import losses


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where "one", "two" and "dora" are, two adapters of one base and one that has no sum."""
    monkeypatch.chdir(tmp_path)
    cases.save("patterns", tmp_path / "one")
    cases.save("rslora", tmp_path / "two", seed=1)
    cases.save("dora", tmp_path / "dora")
    return tmp_path


def loaded(path: Path) -> dict[str, Tensor]:
    return cases.deltas(cases.load(path))


def total() -> dict[str, Tensor]:
    one, two = loaded(Path("one")), loaded(Path("two"))
    return {name: 0.7 * one[name].double() - two[name].double() for name in one}


def assert_near(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    for name, delta in got.items():
        assert (delta - want[name]).norm() <= SVD_RECONSTRUCTION * want[name].norm()


def held(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


APART = "expected a folder apart from the source"


@pytest.mark.parametrize("force", [(), ("--force",)])
@pytest.mark.parametrize(
    "words",
    [
        ("resize", "one", "one", "--rank=2"),
        ("resize", "one", ".", "--rank=2"),
        ("resize", "one", "two/../one/", "--rank=2"),
        ("resize", "one", "link", "--rank=2"),
        ("resize", "link", "one", "--rank=2"),
        ("resize", "one/adapter_model.safetensors", "one", "--rank=2"),
        ("combine", "two", "one:0.5", "one"),
        ("combine", "two:0.5", "one", "two"),
        ("convert", "one", "one", "--to=mlx"),
        ("convert", "one", "two", "--to=lora", "--initial=two"),
        ("extract", "one", "two", "two"),
    ],
)
def test_no_adapter_is_written_over_a_source(folder, capfd, words, force):
    (folder / "link").symlink_to("one")
    before = held(folder)
    refused(capfd, APART, "adapter", *words, *force)
    assert held(folder) == before


def test_an_adapter_is_written_within_a_source(folder, capsys):
    before = held(folder / "one")
    told(capsys, "adapter", "resize", "one", "one/small", "--rank=2")
    assert before.items() < held(folder / "one").items()
    assert loaded(folder / "one" / "small")


def test_resize(folder, capsys):
    out = told(capsys, "adapter", "resize", "one", "small", "--energy", 0.7, "--rank", 2)
    assert "small: written" in out and max(map(len, out.splitlines())) <= 80
    record = told_json(capsys, "adapter", "resize", "one", "again", "--energy", 0.7)
    before, after = loaded(folder / "one"), loaded(folder / "again")
    for name, delta in before.items():
        sigma = torch.linalg.svdvals(delta.double()).square()
        kept = int((sigma.cumsum(0) / sigma.sum() < 0.7).sum()) + 1
        lost = record["updates"][name]
        assert lost["kept"] == kept == torch.linalg.matrix_rank(after[name])
        assert (after[name] - delta).norm() / delta.norm() == pytest.approx(lost["error"], abs=1e-5)
    squares = [(before[n] - after[n]).square().sum() for n in before]
    whole = sum(delta.square().sum() for delta in before.values())
    assert record["total"]["lost_energy"] == pytest.approx((sum(squares) / whole).item(), rel=1e-4)


def test_what_a_table_leaves_out_of_dora_is_said(folder, capsys):
    said = "DoRA: the table is of scaling * B A alone"
    out = told(capsys, "adapter", "resize", "dora", "small", "--rank", 2)
    assert out.count(said) == 1 and max(map(len, out.splitlines())) <= 80
    assert said not in told(capsys, "adapter", "resize", "one", "other", "--rank", 2)
    told_json(capsys, "adapter", "resize", "dora", "again", "--rank", 2)


def test_every_rule_and_dtype(folder, capsys):
    rules = {"rank": 1, "ratio": 3, "sum": 0.5, "fro": 0.9, "budget-bytes": "1KB",
             "average-rank": 2}  # fmt: skip
    for number, (rule, value) in enumerate(rules.items()):
        told(capsys, "adapter", "resize", "one", number, f"--{rule}", value, "--dtype", "bf16")
        size = sum(t.numel() for t in loaded(folder / str(number)).values())
        assert size and (folder / str(number) / "adapter_model.safetensors").exists()


def test_combine(folder, capsys):
    out = told(capsys, "adapter", "combine", "one:0.7", "two:-1", "both", "--cat", "--per-layer")
    assert "layers.1.q_proj" in out and max(map(len, out.splitlines())) <= 80
    assert_near(loaded(folder / "both"), total())
    record = told_json(capsys, "adapter", "combine", "one:0.7", "two:-1", "svd", "--rank", 2)
    after = loaded(folder / "svd")
    for name, delta in total().items():
        error = ((after[name] - delta).norm() / delta.norm()).item()
        assert record["updates"][name]["error"] == pytest.approx(error, abs=1e-5)
    for number, options in enumerate([
        ("--ties", 0.5), ("--dare", 0.5, "--seed", 4), ("--prune", 1.0, "--rank", 12),
        ("--ties", 0.5, "--dare", 0.5),
    ]):  # fmt: skip
        told(capsys, "adapter", "combine", "one:0.7", "two:-1", number, *options)
    assert_near(loaded(folder / "2"), total())  # all elements and all ranks: the sum itself


def test_energy_that_no_number_holds_is_null():
    record = losses.as_dict({"a": Loss(4, 2, math.inf, 1.0, 1.0, None)})
    assert record["updates"]["a"]["energy"] is None
    json.dumps(record, allow_nan=False)


def test_a_colon_in_a_name(folder, capsys):
    (folder / "one").rename(folder / "a:2")
    told(capsys, "adapter", "combine", "a:2", "a:2:0.5", "out", "--cat")
    assert_near(loaded(folder / "out"), {n: 1.5 * d for n, d in loaded(folder / "a:2").items()})


def test_extract(folder, capsys):
    save_llama(folder / "base", torch.float32)
    model = LlamaForCausalLM.from_pretrained(folder / "base")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight += 0.1 * torch.randn(96, 3) @ torch.randn(3, 64)
            layer.input_layernorm.weight += 1
    model.save_pretrained(folder / "tuned")
    out = told(capsys, "adapter", "extract", "base", "tuned", "found")
    assert "carried whole: 2 other tensors" in out and max(map(len, out.splitlines())) <= 80
    record = told_json(capsys, "adapter", "extract", "base", "tuned", "less", "--rank", 2)
    for name, lost in record["updates"].items():
        assert name.endswith("up_proj") and lost["kept"] == 2 and lost["change"] > 0.01
    assert len(record["carried"]) == 2
    base = LlamaForCausalLM.from_pretrained(folder / "base")
    merged = PeftModel.from_pretrained(base, folder / "found").merge_and_unload()
    for name, want in model.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("resize", "one", "out"), "expected --rank, or one of --energy"),
        (("resize", "one", "out", "--sum", 0.5, "--fro", 0.5), "expected --rank, or one of"),
        (("resize", "one", "out", "--rank", 0), "--rank: expected a number of at least 1, got 0"),
        (("resize", "one", "out", "--energy", 2), "--energy: expected a number in (0, 1], got 2"),
        (("resize", "one", "out", "--budget-bytes", "9"), "--budget-bytes: expected a size like"),
        (("resize", "one", "out", "--rank", 2, "--dtype", "fp64"), "--dtype: expected one of fp32"),
        (("resize", "one", "two", "--rank", 2), "two: expected a new or empty folder"),
        (("resize", "no", "out", "--rank", 2), "no"),
        (("combine", "one"), "expected adapters, each with :WEIGHT or without, then a folder"),
        (("combine", "one:x", "out"), "one:x: expected ADAPTER or ADAPTER:WEIGHT"),
        (
            ("combine", "one:inf", "out"),
            "one:inf: expected ADAPTER or ADAPTER:WEIGHT, with a finite",
        ),
        (("combine", "one", "out", "--ties", 2), "--ties: expected a number in (0, 1], got 2"),
        (("combine", "one", "out", "--cat", "--rank", 2), "expected one of --rank, --cat"),
        (("combine", "one", "out", "--ties", 0.5, "--prune", 0.5), "expected one of --rank"),
        (("combine", "one", "out", "--ties", 0.5, "--dare", 0.4), "expected one of --rank"),
        (("combine", "one", "out", "--rank", 0), "--rank: expected at least 1, got 0"),
        (("extract", "one", "two", "out"), "one: expected model.safetensors"),
        (("extract", "one", "two", "out", "--rank", 0), "--rank: expected at least 1, got 0"),
        (("extract", "one", "two", "out", "--energy", 0), "--energy: expected a number in (0, 1]"),
        (("extract", "one", "two", "out", "--energy", 1, "--noise"), "one of --energy and --noise"),
        (("combine", "one", "dora", "out"), "o_proj: DoRA's magnitude divides by the norm"),
    ],
)
def test_bad_input_writes_nothing(folder, capfd, arguments, complaint):
    before = sorted(path.name for path in folder.iterdir())
    refused(capfd, complaint, "adapter", *arguments)
    assert sorted(path.name for path in folder.iterdir()) == before
