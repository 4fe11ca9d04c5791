"""Adapters as PEFT saves and loads them: what is read of a file or a model, what is written."""

from __future__ import annotations

import copy
import json
import re
import warnings

import pytest
import torch
from adapters import CASES, CLOSE, assert_updates, deltas, load, make, reload, save
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from peftkern.tools.adapters import from_model, read_adapter, write_adapter

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's, about models that are not transformers'


@pytest.mark.parametrize("case", CASES)
def test_updates_are_pefts(case, tmp_path):
    model = save(case, tmp_path / "a")
    adapter = read_adapter(tmp_path / "a")
    assert_updates(adapter, deltas(model))
    assert adapter.config == json.loads((tmp_path / "a" / "adapter_config.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_a_live_model_is_read_like_its_file(case, tmp_path):
    model = save(case, tmp_path / "a")
    for layer in model.modules():  # a scaling that a call changed
        if isinstance(layer, LoraLayer) and case == "rslora":
            layer.set_scale("default", 3.0)
    live, file = from_model(model), read_adapter(tmp_path / "a")
    assert live.updates.keys() == file.updates.keys() and live.extras.keys() == file.extras.keys()
    for key, update in live.updates.items():
        other = file.updates[key]
        assert (update.kind, update.parameter) == (other.kind, other.parameter)
        if case != "rslora":
            assert update.scaling == pytest.approx(other.scaling, rel=1e-6)
        else:
            assert update.scaling == pytest.approx(3 * other.scaling)
        for (name, ours), (_, theirs) in zip(update.tensors(), other.tensors(), strict=True):
            assert torch.equal(ours.reshape(-1), theirs.reshape(-1)), name
    for key, tensor in live.extras.items():
        assert torch.equal(tensor, file.extras[key])


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_loads_in_peft_with_a_scaling_of_one(case, tmp_path):
    model = save(case, tmp_path / "a")
    adapter = read_adapter(tmp_path / "a")
    write_adapter(adapter, tmp_path / "b")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        loaded = load(tmp_path / "b")
    said = [str(one.message) for one in told]
    assert not [one for one in said if re.search("missing|[Uu]nexpected", one)]
    kept = {key: one for key, one in deltas(model).items() if adapter.updates[key].rank}
    torch.testing.assert_close(deltas(loaded), kept, **CLOSE)
    for name, layer in loaded.named_modules():
        if isinstance(layer, LoraLayer):
            assert set(layer.scaling.values()) == {1.0}, name
    written = load_file(tmp_path / "b" / "adapter_model.safetensors")
    first = load_file(tmp_path / "a" / "adapter_model.safetensors")
    for key in first.keys() & written.keys():
        if "lora_B" not in key and "embedding_B" not in key:
            assert torch.equal(first[key], written[key]), key
    if case != "adalora":
        assert first.keys() == written.keys()
    state = {name: tensor for name, tensor in loaded.state_dict().items() if "lora_" not in name}
    for name, tensor in model.state_dict().items():  # modules_to_save, biases, token rows
        if name in state and ("default" in name or "bias" in name) and case != "adalora":
            assert torch.equal(tensor, state[name]), name


def test_triplets_that_revived_since_the_mask_are_read_of_a_live_model(tmp_path):
    model = make("adalora")
    config, layers = model.peft_config["default"], model.base_model.model.layers
    masks = {f"{name}.default": kept for name, kept in config.rank_pattern.items()}
    config.rank_pattern = copy.deepcopy(masks)  # with the names of a training
    with torch.no_grad():
        for layer in layers:
            layer.q_proj.lora_E["default"][1] = 0.5
    adapter = from_model(model)
    assert config.rank_pattern == masks
    assert [one.rank for one in adapter.updates.values()] == [4, 1]
    assert_updates(adapter, deltas(model))
    torch.testing.assert_close(deltas(reload(adapter, tmp_path / "b")), deltas(model), **CLOSE)
