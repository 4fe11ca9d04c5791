"""`peftkern adapter` as a user meets it."""

from __future__ import annotations

from pathlib import Path

import pytest
from adapters import CONFIG, EXPERTS, MODEL, save
from checkpoint_folders import changing, configure
from command_line import refused, run, told, told_json

from peftkern.tools.adapters import read_adapter, write_adapter

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    save("experts and attention", tmp_path / "a")
    return tmp_path / "a"


def inspected(capfd, *arguments: str) -> list[str]:
    lines = told(capfd, "adapter", "inspect", "a", *arguments).splitlines()
    assert all(len(line) <= 80 for line in lines), lines
    return lines


def test_inspect_shows_modules_layers_and_experts(folder, capfd):
    said = inspected(capfd)
    assert said[0].startswith("LoRA, rank-stabilized of PEFT ") and "float32" in said[0]
    assert said[1] == "base: not named" and said[2].startswith("6 updates, |D| ")
    head = "module       updates size rank true scaling   |D| energy stable effective"
    assert said[4] == head
    assert [line.split()[:4] for line in said[5:8]] == [
        ["down_proj", str(2 * EXPERTS), "8x5", "3"],
        ["gate_up_proj", str(2 * EXPERTS), "10x8", "2"],
        ["q_proj", "2", "12x8", "2"],
    ]
    assert said[8].startswith("experts in layout peft: layers.0.experts.gate_up_proj is 10 x 8")
    said = inspected(capfd, "--per-layer")
    assert said[4].startswith("layers. ") and said[5].startswith("0.experts.down_proj ")
    said = "\n".join(inspected(capfd, "--experts"))
    assert f"0.experts.down_proj {EXPERTS - 1} " in said


def test_inspect_writes_a_page_and_json(folder, capfd):
    record = told_json(capfd, "adapter", "inspect", "a", "--html", "a.html")
    assert record["method"] == "LoRA, rank-stabilized"
    assert len(record["updates"]) == 2 + 4 * EXPERTS
    assert {"key", "expert", "sigma", "true_rank", "scaling"} < record["updates"][0].keys()
    assert "<svg" in (folder.parent / "a.html").read_text()
    refused(capfd, "--html", "adapter", "inspect", "a", "--html", "no/such.html")


def test_verify_tells_what_passed_and_ends_with_its_verdict(folder, capfd):
    write_adapter(read_adapter(folder), "b")
    said = told(capfd, "adapter", "verify", "a", "--against", "b").splitlines()
    assert said[0] == "ok: keys: 6 updates in 12 tensors fit the config"
    assert [line.split(":")[1] for line in said] == [" keys", " finite", " modules", " products"]
    with changing(folder.parent / "b" / MODEL) as state:
        state["base_model.model.layers.0.q_proj.lora_B.weight"] *= 2
    said = told(capfd, "adapter", "verify", "a", "--against", "b", status=1).splitlines()
    assert said[-1] == "FAILED: products: beyond 1e-06: layers.0.q_proj 1.00e+00"
    checks = told_json(capfd, "adapter", "verify", "a", "--against", "b", "--tol", "1.1")
    assert all(check["passed"] for check in checks)


def test_what_cannot_be_read_is_one_line(folder, capfd):
    for command in ("inspect", "verify"):
        refused(capfd, "none: expected an adapter", "adapter", command, "none")
        refused(
            capfd, "--layout: expected one of peft, ", "adapter", command, "a", "--layout", "else"
        )
    Path("empty").mkdir()
    complaint = "empty: expected a folder with adapter_model.safetensors, got an empty one"
    refused(capfd, complaint, "adapter", "inspect", "empty")
    refused(capfd, "--tol", "adapter", "verify", "a", "--tol", "-1")
    name = "base_model.model.layers.0.q_proj.lora_B.weight"
    with changing(folder / MODEL) as state:
        state[name] = state[name][:, :1]
    refused(capfd, "layers.0.q_proj.lora_A.weight: expected one rank", "adapter", "inspect", "a")


def test_names_and_configs_cannot_steer_a_terminal(folder, capfd):
    save("linear", folder.parent / "b")
    hostile = {"base_model_name_or_path": "\x1b[2J", "modules_to_save": ["x\x1b"]}
    configure(folder.parent / "b", CONFIG, **hostile)
    with changing(folder.parent / "b" / MODEL) as state:
        for name in [name for name in state if "layers.1.q_proj" in name]:
            state[name.replace("layers.1.q_proj", "layers.1.[/b]q_proj")] = state.pop(name)
    out = told(capfd, "adapter", "inspect", "b", "--per-layer")
    assert "\x1b" not in out and "1.[/b]q_proj" in out


def test_the_group_has_help_of_its_own():
    done = run("adapter", "--help")
    assert done.returncode == 0 and "inspect" in done.stdout and "verify" in done.stdout
