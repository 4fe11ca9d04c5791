"""`peftkern adapter convert` as a user meets it: what it prints, what it leaves."""

from __future__ import annotations

import pytest
import torch
from adapters import CONFIG, MODEL, base_of, make, save
from checkpoint_folders import configure
from command_line import refused, told, told_json
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.filterwarnings("ignore")
CONVERT = ("adapter", "convert")


def test_an_adapter_is_converted_and_described(tmp_path, capfd):
    save("experts", tmp_path / "a")
    lines = told(capfd, *CONVERT, tmp_path / "a", tmp_path / "b", "--to", "grouped").splitlines()
    assert lines[0] == "4 updates, from PEFT's names to grouped"
    assert lines[1].startswith("experts in layout peft: ")
    assert lines[2:] == [
        "4 lora_B rounded once by their scaling, no power of two",
        f"{tmp_path / 'b'}: written",
    ]
    assert len(load_file(tmp_path / "b" / MODEL)) == 8


def test_the_same_as_json(tmp_path, capfd):
    save("power of two", tmp_path / "a")
    found = told_json(capfd, *CONVERT, tmp_path / "a", tmp_path / "b", "--to", "mlx")
    assert found["layout"] == "PEFT" and found["to"] == "mlx" and found["modules"] == 4
    assert found["rounded"] == [] and found["losses"] == {} and found["lost"] == 0


def test_what_dora_loses_is_told(tmp_path, capfd):
    save("dora", tmp_path / "a")
    state = make("dora").unload().state_dict()
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    save_file(state, tmp_path / "base" / "model.safetensors")
    options = ["--to", "lora", "--base", tmp_path / "base", "--rank", 2]
    lines = told(capfd, *CONVERT, tmp_path / "a", tmp_path / "b", *options).splitlines()
    assert lines[0] == "4 updates, from PEFT's names to lora"
    losses = [line for line in lines if ": the best update of rank 2 leaves " in line]
    assert len(losses) == 4 and lines[-1] == f"{tmp_path / 'b'}: written"
    found = told_json(capfd, *CONVERT, tmp_path / "a", tmp_path / "c", *options)
    shares = [loss["relative"] for loss in found["losses"].values()]
    assert max(shares) < 1 and min(shares) <= found["lost"] <= max(shares)


def test_unusable_requests_are_one_line_and_leave_nothing(tmp_path, capfd):
    save("linear", tmp_path / "a")
    asked = *CONVERT, tmp_path / "a", tmp_path / "b", "--to"
    refused(capfd, "--to: expected one of peft, peft-old-moe", *asked, "gguf")
    refused(capfd, "has no experts", *asked, "per-expert")
    refused(capfd, "--component: expected what", *asked, "kohya")
    refused(capfd, "--rank: expected an integer above 0", *asked, "lora", "--rank", 0)
    refused(capfd, "--rank: of plain LoRA from DoRA, and mlx", *asked, "mlx", "--rank", 4)
    refused(capfd, f"{tmp_path / 'a' / MODEL} has none", *asked, "lora", "--rank", 4)
    refused(capfd, "--initial: makes plain LoRA", *asked, "peft", "--initial", tmp_path)
    data = (tmp_path / "a" / MODEL).read_bytes()
    for length in (0, 7, 100, len(data) - 1):
        (tmp_path / "a" / MODEL).write_bytes(data[:length])
        refused(capfd, f"{tmp_path / 'a' / MODEL}: ", *asked, "mlx")
    assert not (tmp_path / "b").exists()


def test_an_adapter_that_is_there_is_replaced_on_demand(tmp_path, capfd):
    save("experts", tmp_path / "a")
    base = base_of(tmp_path / "base")
    told(capfd, *CONVERT, tmp_path / "a", tmp_path / "b", "--to", "mlx", "--base", base)
    again = tmp_path / "a", tmp_path / "b", "--to", "peft"
    refused(capfd, "expected a new or empty folder", *CONVERT, *again)
    (tmp_path / "b" / "README.md").write_text("mine")
    told(capfd, *CONVERT, *again, "--force")
    names = ["README.md", CONFIG, MODEL]
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == names
    assert all(
        tensor.dtype == torch.float32 for tensor in load_file(tmp_path / "b" / MODEL).values()
    )


def test_a_layout_that_nothing_tells_is_asked_for(tmp_path, capfd):
    save("experts", tmp_path / "a")
    configure(tmp_path / "a", CONFIG, base_model_name_or_path="unsloth/some-model")
    asked = tmp_path / "a", tmp_path / "b", "--to", "grouped"
    refused(capfd, "layout peft or unsloth", *CONVERT, *asked)
    told(capfd, *CONVERT, *asked, "--from-layout", "unsloth")
    told(capfd, *CONVERT, *asked[:1], tmp_path / "c", *asked[2:], "--layout", "peft")
    one, other = (load_file(tmp_path / name / MODEL) for name in "bc")
    assert {k for k in one if not torch.equal(one[k], other[k])} == {
        f"base_model.model.layers.{layer}.experts.{name}_proj.lora_B.weight"
        for layer in (0, 1)
        for name in ("gate_up", "down")
    }
