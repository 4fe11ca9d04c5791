"""Adapters of mlx-lm: what its layers compute of our files, and what its files become."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from adapters import CASES, CLOSE, CONFIG, EXPERTS, INNER, MODEL, base_of, deltas, refused, save
from checkpoint_folders import configure, save_moe
from safetensors.torch import load_file, save_file

from peftkern.tools.adapters import read_adapter
from peftkern.tools.adapters.convert.run import convert_adapter

pytestmark = pytest.mark.filterwarnings("ignore")
FILE = "adapters.safetensors"
HELD = ("linear", "power of two", "rslora", "patterns", "dora", "embedding", "experts", "adalora")


def fused(folder: Path) -> dict:
    """Compute the updates as mlx-lm's fuse() does, by its modules' names."""
    state, config = load_file(folder / FILE), json.loads((folder / CONFIG).read_text())
    scale, found = config["lora_parameters"]["scale"], {}
    for name in (key.removesuffix(".lora_a") for key in state if key.endswith(".lora_a")):
        a, b = state[f"{name}.lora_a"], state[f"{name}.lora_b"]
        if a.ndim == 3:
            found[name] = (scale * b) @ a
        elif name.endswith("embed_tokens"):
            found[name] = (scale * a) @ b
        else:
            found[name] = (scale * b.T) @ a.T
    return found


@pytest.mark.parametrize("case", HELD)
def test_mlx_computes_the_same_updates_and_back(case, tmp_path):
    wanted = {k: d for k, d in deltas(save(case, tmp_path / "a")).items() if d.any()}
    convert_adapter(tmp_path / "a", tmp_path / "p", "peft")
    convert_adapter(tmp_path / "p", tmp_path / "b", "mlx", base=base_of(tmp_path / "base"))
    found = fused(tmp_path / "b")
    for key, theirs in wanted.items():
        if key in found:
            torch.testing.assert_close(found.pop(key), theirs, **CLOSE)
        elif key.endswith("down_proj"):
            mine = found.pop(key.replace("experts", "switch_mlp"))
            torch.testing.assert_close(mine, theirs, **CLOSE)
        else:
            holder = key.replace("experts.gate_up_proj", "switch_mlp")
            halves = [found.pop(f"{holder}.{half}_proj") for half in ("gate", "up")]
            torch.testing.assert_close(torch.cat(halves, dim=1), theirs, **CLOSE)
    assert not found
    convert_adapter(tmp_path / "b", tmp_path / "back", "peft")
    mine, theirs = (load_file(tmp_path / name / MODEL) for name in ("back", "p"))
    assert {k for k in theirs if "lora_" not in k} <= {"base_model.model.embed_tokens.weight"}
    for name, tensor in theirs.items():
        assert torch.equal(mine[name], tensor) and mine[name].dtype == tensor.dtype, name


def test_keys_are_those_within_a_layer(tmp_path):
    save("experts and attention", tmp_path / "a")
    convert_adapter(tmp_path / "a", tmp_path / "b", "mlx", base=base_of(tmp_path / "base"))
    config = json.loads((tmp_path / "b" / CONFIG).read_text())
    names = ["q_proj", *(f"switch_mlp.{name}_proj" for name in ("down", "gate", "up"))]
    assert sorted(config["lora_parameters"]["keys"]) == names
    assert config["num_layers"] == -1 and config["fine_tune_type"] == "lora"
    assert config["lora_parameters"]["rank"] == 3 and config["lora_parameters"]["scale"] == 1


def write(folder: Path, change: dict, **fields) -> Path:
    state = {"layers.0.q_proj.lora_a": torch.ones(6, 2), "layers.0.q_proj.lora_b": torch.ones(2, 4)}
    folder.mkdir()
    state = {name: one for name, one in (state | change).items() if one is not None}
    save_file(state, folder / FILE)
    config = {
        "fine_tune_type": "lora",
        "num_layers": 4,
        "lora_parameters": {"scale": 20.0},
    } | fields
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def test_the_scale_is_of_all_modules(tmp_path):
    torch.manual_seed(0)
    gate = {f"layers.1.mlp.switch_mlp.gate_proj.lora_{x}": torch.randn(s)
            for x, s in (("a", (EXPERTS, 2, 6)), ("b", (EXPERTS, INNER, 2)))}  # fmt: skip
    up = {name.replace("gate", "up"): torch.randn_like(one) for name, one in gate.items()}
    folder = write(tmp_path / "a", gate | up, model="somebody/model")
    adapter = read_adapter(folder)
    assert {update.scaling for update in adapter.updates.values()} == {20}
    wanted = fused(folder)
    convert_adapter(folder, tmp_path / "b", "peft")
    written = read_adapter(tmp_path / "b")
    assert written.config["base_model_name_or_path"] == "somebody/model"
    update = written.updates["layers.1.mlp.experts.gate_up_proj"]
    assert list(update.lora_A.shape) == [EXPERTS, 4, 6]  # two projections of rank 2
    name = "layers.1.mlp.switch_mlp.{}_proj"
    both = torch.cat([wanted[name.format(half)] for half in ("gate", "up")], dim=1)
    torch.testing.assert_close(update.lora_B @ update.lora_A, both, rtol=1e-5, atol=1e-5)


Q = "layers.0.q_proj"
WRONG = {
    "no partner": ({f"{Q}.lora_b": None}, {}, (f"{Q}.lora_b",)),
    "another rank": ({f"{Q}.lora_b": torch.ones(3, 4)}, {}, (Q, "[3, 4]")),
    "dimensions": ({f"{Q}.lora_b": torch.ones(1, 2, 4)}, {}, (Q, "[1, 2, 4]")),
    "integers": ({f"{Q}.lora_b": torch.ones(2, 4).int()}, {}, (f"{Q}.lora_b", "int32")),
    "a stranger": ({"layers.0.norm.weight": torch.ones(4)}, {}, ("layers.0.norm.weight",)),
    "4-bit factors": ({}, {"adapter_quantization": {"bits": 4}}, (FILE, "4-bit")),
    "all weights": ({}, {"fine_tune_type": "full"}, ("fine_tune_type 'full'",)),
    "no scale": ({}, {"lora_parameters": {}}, ("lora_parameters.scale", "None")),
    "a scale of NaN": ({}, {"lora_parameters": {"scale": float("nan")}}, ("scale", "nan")),
    "no parameters": ({}, {"lora_parameters": [1]}, ("lora_parameters.scale",)),
}


@pytest.mark.parametrize("case", WRONG)
def test_files_with_a_defect(case, tmp_path):
    change, fields, words = WRONG[case]
    refused(write(tmp_path / "a", change, **fields), "peft", FILE, *words)


def test_dora_of_embeddings_has_other_norms(tmp_path, monkeypatch):
    monkeypatch.setitem(CASES, "here", {**CASES["embedding"], "use_dora": True})
    save("here", tmp_path / "p")
    refused(tmp_path / "p", "mlx", "embed_tokens", "norm of each token")
    table = "model.embed_tokens"
    state = {f"{table}.lora_a": torch.ones(9, 2), f"{table}.lora_b": torch.ones(2, 8)}
    folder = write(tmp_path / "t", state | {f"{table}.m": torch.ones(9)}, fine_tune_type="dora")
    refused(folder, "peft", FILE, f"{table}.m", "norm of each token")
    folder = write(tmp_path / "m", {f"{Q}.m": torch.ones(5)}, fine_tune_type="dora")
    refused(folder, "peft", FILE, f"{Q}.m", "expected [4]", "[5]")


def test_a_file_without_its_config(tmp_path):
    folder = write(tmp_path / "a", {})
    (folder / CONFIG).unlink()
    refused(folder, "peft", FILE, CONFIG)


def test_what_mlx_cannot_hold(tmp_path, monkeypatch):
    for case, word in {
        "lora_bias": "lora_B.bias",
        "convolutions": "conv",
        "modules_to_save": "updates alone",
        "biases": "bias",
    }.items():
        save(case, tmp_path / case)
        refused(tmp_path / case, "mlx", str(tmp_path / case), word)
    save("experts", tmp_path / "experts")
    save("parameter called weight", tmp_path / "parameter")
    configure(tmp_path / "parameter", CONFIG, target_parameters=["q_proj.scale"])
    refused(tmp_path / "parameter", "mlx", "q_proj.scale", "modules alone")
    monkeypatch.setitem(CASES, "pissa", {**CASES["linear"], "init_lora_weights": "pissa"})
    save("pissa", tmp_path / "pissa")
    for to, component in (("mlx", None), ("diffusers", "unet"), ("kohya", "unet")):
        said = "pissa changed the base", "--initial"
        refused(tmp_path / "pissa", to, *said, component=component)
    refused(tmp_path / "experts", "mlx", "component: PEFT to mlx", "'unet'", component="unet")


def test_experts_of_mixtral_have_its_names(tmp_path):
    save_moe(tmp_path / "base", "mixtral")
    name = "model.layers.0.block_sparse_moe.switch_mlp.{}_proj.lora_{}"
    sizes = {"gate": (8, 5), "up": (8, 5), "down": (5, 8)}
    state = {}
    for half, (n, m) in sizes.items():
        state |= {name.format(half, "a"): torch.randn(3, 2, n)}
        state |= {name.format(half, "b"): torch.randn(3, m, 2)}
    scale = {"lora_parameters": {"scale": 1.0}}
    convert_adapter(write(tmp_path / "a", state, **scale), tmp_path / "p", "peft")
    parameters = read_adapter(tmp_path / "p").config["target_parameters"]
    holder = "model.layers.0.mlp.experts"
    assert sorted(parameters) == [f"{holder}.down_proj", f"{holder}.gate_up_proj"]
    convert_adapter(tmp_path / "p", tmp_path / "b", "mlx", base=tmp_path / "base")
    back = load_file(tmp_path / "b" / FILE)
    assert all(torch.equal(back[key], one) for key, one in state.items())
