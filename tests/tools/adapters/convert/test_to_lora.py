"""Plain LoRA of AdaLoRA, of initializations that changed the base, and, nearly, of DoRA."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from adapters import (
    CASES,
    CLOSE,
    CONFIG,
    MODEL,
    Tiny,
    assert_updates,
    deltas,
    load,
    make,
    refused,
    save,
    weights,
)
from checkpoint_folders import changing, configure
from merged_folders import make_model, save_adapter, save_base
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from peftkern.tools.adapters import read_adapter
from peftkern.tools.adapters.convert.run import convert_adapter

pytestmark = pytest.mark.filterwarnings("ignore")
LOSS = {"rtol": 1e-4, "atol": 0.0}  # |D|^2 less the kept squares, in float32's sums
# Differences of products that cancel: A of an initialization is near the trained one.
CANCELS = {"rtol": 1e-5, "atol": 5e-6}


def test_adalora_becomes_lora_of_the_ranks_that_are_left(tmp_path):
    model = save("adalora", tmp_path / "a")
    done = convert_adapter(tmp_path / "a", tmp_path / "b", "lora")
    assert done.losses == {}
    config = json.loads((tmp_path / "b" / CONFIG).read_text())
    assert config["peft_type"] == "LORA" and "init_r" not in config
    wanted = {key: one for key, one in deltas(model).items() if one.any()}
    torch.testing.assert_close(deltas(load(tmp_path / "b")), wanted, **CLOSE)


INITIAL = {
    "pissa": {},
    "olora": {"lora_alpha": 4},
    "pissa_niter_4": {"use_rslora": True},
    "loftq": {"init_lora_weights": "pissa"},  # as far as the file goes: PEFT needs a GPU for it
}


def train(name: str, folder: Path) -> dict:
    """Save an adapter before and after training; return what its model added to the weights."""
    torch.manual_seed(0)
    base = Tiny()
    before = {key: one.clone() for key, one in weights(base).items()}
    fields = {**CASES["linear"], "init_lora_weights": name, **INITIAL[name]}
    model = get_peft_model(base, LoraConfig(**fields))
    config = model.peft_config["default"]
    config.init_lora_weights = True
    model.save_pretrained(folder / "initial")
    config.init_lora_weights = name
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder / "a")
    changed, residual = deltas(model), weights(model)
    return {key: residual[key] + one - before[key] for key, one in changed.items()}


@pytest.mark.parametrize("name", INITIAL)
def test_what_training_added_is_an_adapter_of_the_original_base(name, tmp_path):
    added = train(name, tmp_path)
    convert_adapter(tmp_path / "a", tmp_path / "b", "lora", initial=tmp_path / "initial")
    torch.testing.assert_close(deltas(load(tmp_path / "b")), added, **CANCELS)
    config = json.loads((tmp_path / "b" / CONFIG).read_text())
    assert config["init_lora_weights"] is True and config["r"] == 8


def test_the_factors_are_those_of_peft(tmp_path):
    train("pissa", tmp_path)
    torch.manual_seed(0)
    model = get_peft_model(Tiny(), LoraConfig(**CASES["linear"], init_lora_weights="pissa"))
    state = load_file(tmp_path / "a" / MODEL)
    model.load_state_dict(
        {key.replace(".weight", ".default.weight"): one for key, one in state.items()}, strict=False
    )
    start = tmp_path / "initial"
    model.save_pretrained(tmp_path / "theirs", path_initial_model_for_weight_conversion=str(start))
    convert_adapter(tmp_path / "a", tmp_path / "ours", "lora", initial=start)
    ours, theirs = (read_adapter(tmp_path / name) for name in ("ours", "theirs"))
    for key, update in ours.updates.items():
        other = theirs.updates[key]
        assert torch.equal(update.lora_A, other.lora_A)
        assert torch.equal(update.lora_B, (other.lora_B.double() * other.scaling).float())


def test_what_a_request_lacks_is_named(tmp_path):
    train("pissa", tmp_path)
    refused(tmp_path / "a", "lora", "pissa changed the base", "--initial")
    save("dora", tmp_path / "dora")
    refused(tmp_path / "dora", "lora", "layers.0.o_proj", "DoRA", "--base")
    refused(tmp_path / "dora", "lora", "layers.0.o_proj", "--initial", initial=tmp_path / "initial")
    state = load_file(tmp_path / "initial" / MODEL)
    key = "base_model.model.layers.1.q_proj.lora_A.weight"
    save_file(state | {key: torch.ones(4, 9)}, tmp_path / "initial" / MODEL)
    refused(tmp_path / "a", "lora", "layers.1.q_proj", "[12, 9]", initial=tmp_path / "initial")
    left = {name: one for name, one in state.items() if "layers.1.q_proj" not in name}
    save_file(left, tmp_path / "initial" / MODEL)
    refused(tmp_path / "a", "lora", "initial", "layers.1.q_proj", initial=tmp_path / "initial")


def test_tables_of_the_base_are_of_the_changed_one(tmp_path):
    train("pissa", tmp_path)
    table = "base_model.model.layers.1.q_proj.base_layer.weight"
    with changing(tmp_path / "a" / MODEL) as state:
        state[table] = torch.ones(12, 8)
    refused(tmp_path / "a", "lora", table, "changed base", initial=tmp_path / "initial")


def test_the_layout_is_of_the_initial_adapter_too(tmp_path, monkeypatch):
    monkeypatch.setitem(CASES, "here", {**CASES["one parameter"], "init_lora_weights": True})
    save("here", tmp_path / "a"), save("here", tmp_path / "initial", seed=1)
    for name in ("a", "initial"):
        configure(tmp_path / name, CONFIG, base_model_name_or_path="unsloth/some-model")
    how = {"from_layout": "unsloth", "initial": tmp_path / "initial"}
    convert_adapter(tmp_path / "a", tmp_path / "b", "lora", **how)
    found = read_adapter(tmp_path / "b").updates
    for key, update in found.items():
        one, start = (
            read_adapter(tmp_path / name, expert_layout="unsloth").updates[key]
            for name in ("a", "initial")
        )
        wanted = one.scaling * one.lora_B @ one.lora_A - start.scaling * start.lora_B @ start.lora_A
        torch.testing.assert_close(update.lora_B @ update.lora_A, wanted, **CANCELS)


def test_options_in_vain_are_refused(tmp_path):
    save("linear", tmp_path / "a")
    refused(tmp_path / "a", "grouped", "initial", "grouped", initial=tmp_path / "a")
    refused(tmp_path / "a", "lora", "rank", "got 0", rank=0)


@pytest.fixture
def dora(tmp_path):
    """An adapter of every kind of layer, its base's folder, and what it adds to each weight."""
    case = "dora, all kinds"
    model = save(case, tmp_path / "a")
    base = make(case).unload()
    (tmp_path / "base").mkdir()
    save_file(base.state_dict(), tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text('{"model_type": "none"}')
    before = {key: one.clone() for key, one in weights(base).items()}
    names = list(deltas(model))
    after = weights(model.merge_and_unload())
    return tmp_path, {name: after[name] - before[name] for name in names}


def matrix(update, added):
    """Return what was added to a weight as the matrix that its update is."""
    added = added.flatten(1) if update.kind == "conv" else added
    return added.double() if tuple(added.shape) == update.size else added.double().T


@pytest.mark.parametrize("rank", [None, 2])
def test_dora_becomes_the_best_lora_of_a_rank(rank, dora):
    folder, added = dora
    done = convert_adapter(folder / "a", folder / "b", "lora", base=folder / "base", rank=rank)
    before, after = (read_adapter(folder / name).updates for name in "ab")
    assert done.losses.keys() == after.keys() == added.keys()
    for key, update in after.items():
        assert update.magnitude is None and update.rank == min(rank or 4, *update.size)
        D = matrix(before[key], added[key])
        S = torch.linalg.svdvals(D)
        least = S[update.rank :].square().sum().sqrt()
        lost = torch.linalg.norm(D - update.lora_B.double() @ update.lora_A.double())
        torch.testing.assert_close(lost, least, rtol=1e-4, atol=1e-5)
        loss = done.losses[key]
        assert loss.rank == update.rank
        torch.testing.assert_close(loss.norm, torch.linalg.norm(D).item(), **LOSS)
        torch.testing.assert_close(loss.relative, (least / S.norm()).item(), rtol=1e-3, atol=1e-4)
    assert_updates(read_adapter(folder / "b"), deltas(load(folder / "b")))


def test_a_table_that_the_adapter_holds_is_its_base(dora):
    folder, added = dora
    name = "layers.0.q_proj"
    kept, base = load_file(folder / "a" / MODEL), load_file(folder / "base" / "model.safetensors")
    kept[f"base_model.model.{name}.base_layer.weight"] = base.pop(f"{name}.weight")
    save_file(kept, folder / "a" / MODEL)
    save_file(base, folder / "base" / "model.safetensors")
    done = convert_adapter(folder / "a", folder / "b", "lora", base=folder / "base")
    torch.testing.assert_close(done.losses[name].norm, added[name].norm().item(), **LOSS)


def test_a_base_that_is_another(dora):
    folder, _ = dora
    file = folder / "base" / "model.safetensors"
    state = load_file(file)
    name = "layers.0.q_proj.weight"
    refused(folder / "a", "lora", str(folder / "none"), base=folder / "none")
    for tensor, word in ((torch.ones(3, 3), "[3, 3]"), (torch.ones(12, 8).int(), "int32")):
        save_file(state | {name: tensor}, file)
        refused(folder / "a", "lora", name, word, base=folder / "base")
    save_file({key: one for key, one in state.items() if key != name}, file)
    refused(folder / "a", "lora", name, "expected it in the base", base=folder / "base")


def test_square_weights_of_conv1d_are_turned_whatever_the_config_says(tmp_path):
    """An adapter of the model in 4 bits has no fan_in_fan_out: its layers are not Conv1D there."""
    model = make_model(family="GPT2", head="LMHeadModel", dtype=torch.float32, num_hidden_layers=1)
    save_base(tmp_path / "base", model)
    save_adapter(tmp_path / "a", model, target_modules=["attn.c_proj"], use_dora=True)
    assert json.loads((tmp_path / "a" / CONFIG).read_text())["fan_in_fan_out"] is True
    converted = []
    for turned in (True, False):
        configure(tmp_path / "a", CONFIG, fan_in_fan_out=turned)
        convert_adapter(tmp_path / "a", tmp_path / f"{turned}", "lora", base=tmp_path / "base")
        (update,) = read_adapter(tmp_path / f"{turned}").updates.values()
        converted.append(update.lora_B @ update.lora_A * update.scaling)
    torch.testing.assert_close(*converted)
