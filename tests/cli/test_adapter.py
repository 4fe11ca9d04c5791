"""`peftkern adapter` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from adapters import EXPERTS, save
from command_line import refused, run
from safetensors.torch import load_file, save_file

from peftkern.cli import main
from peftkern.tools.adapters import read_adapter, write_adapter

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    save("experts and attention", tmp_path / "a")
    return tmp_path / "a"


def lines(capfd) -> list[str]:
    out, error = capfd.readouterr()
    assert error == "" and all(len(line) <= 80 for line in out.splitlines()), out
    return out.splitlines()


def test_inspect_shows_modules_layers_and_experts(folder, capfd):
    capfd.readouterr()
    assert main(["adapter", "inspect", "a"]) == 0
    said = lines(capfd)
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
    assert main(["adapter", "inspect", "a", "--per-layer"]) == 0
    said = lines(capfd)
    assert said[4].startswith("layers. ") and said[5].startswith("0.experts.down_proj ")
    assert main(["adapter", "inspect", "a", "--experts"]) == 0
    said = "\n".join(lines(capfd))
    assert f"0.experts.down_proj {EXPERTS - 1} " in said


def test_inspect_writes_a_page_and_json(folder, capfd):
    capfd.readouterr()
    assert main(["adapter", "inspect", "a", "--html", "a.html", "--json"]) == 0
    record = json.loads(capfd.readouterr().out)
    assert record["method"] == "LoRA, rank-stabilized"
    assert len(record["updates"]) == 2 + 4 * EXPERTS
    assert {"key", "expert", "sigma", "true_rank", "scaling"} < record["updates"][0].keys()
    assert "<svg" in (folder.parent / "a.html").read_text()
    refused(capfd, "--html", "adapter", "inspect", "a", "--html", "no/such.html")


def test_verify_tells_what_passed_and_ends_with_its_verdict(folder, capfd):
    write_adapter(read_adapter(folder), "b")
    capfd.readouterr()
    assert main(["adapter", "verify", "a", "--against", "b"]) == 0
    said = capfd.readouterr().out.splitlines()
    assert said[0] == "ok: keys: 6 updates in 12 tensors fit the config"
    assert [line.split(":")[1] for line in said] == [" keys", " finite", " modules", " products"]
    state = load_file("b/adapter_model.safetensors")
    name = "base_model.model.layers.0.q_proj.lora_B.weight"
    save_file(state | {name: state[name] * 2}, "b/adapter_model.safetensors")
    assert main(["adapter", "verify", "a", "--against", "b"]) == 1
    said = capfd.readouterr().out.splitlines()
    assert said[-1] == "FAILED: products: beyond 1e-06: layers.0.q_proj 1.00e+00"
    assert main(["adapter", "verify", "a", "--against", "b", "--tol", "1.1", "--json"]) == 0
    assert all(one["passed"] for one in json.loads(capfd.readouterr().out))


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
    state = load_file("a/adapter_model.safetensors")
    name = "base_model.model.layers.0.q_proj.lora_B.weight"
    save_file(state | {name: state[name][:, :1].clone()}, "a/adapter_model.safetensors")
    refused(capfd, "layers.0.q_proj.lora_A.weight: expected one rank", "adapter", "inspect", "a")


def test_names_and_configs_cannot_steer_a_terminal(folder, capfd):
    save("linear", folder.parent / "b")
    path = folder.parent / "b" / "adapter_config.json"
    config = json.loads(path.read_text())
    config |= {"base_model_name_or_path": "\x1b[2J", "modules_to_save": ["x\x1b"]}
    path.write_text(json.dumps(config))
    state = load_file("b/adapter_model.safetensors")
    state = {name.replace("layers.1.q_proj", "layers.1.[/b]q_proj"): t for name, t in state.items()}
    save_file(state, "b/adapter_model.safetensors")
    capfd.readouterr()
    assert main(["adapter", "inspect", "b", "--per-layer"]) == 0
    out = capfd.readouterr().out
    assert "\x1b" not in out and "1.[/b]q_proj" in out


def test_the_group_has_help_of_its_own():
    done = run("adapter", "--help")
    assert done.returncode == 0 and "inspect" in done.stdout and "verify" in done.stdout
