"""Checks of an adapter: what passes, what fails, and what is said of it."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
from adapters import CASES, make, save
from checkpoint_folders import changing, save_llama
from expert_models import tiny_moe
from merged_folders import load, save_adapter
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from peftkern.cli import main
from peftkern.tools.adapters import AdapterError, from_model, read_adapter, write_adapter
from peftkern.tools.adapters.verify import distances, verify

pytestmark = pytest.mark.filterwarnings("ignore")


def save_base(model, folder) -> None:
    """Write the weights of a model with an adapter as the checkpoint it was made for."""
    folder.mkdir()
    state = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if not any(part in name for part in ("lora_", "default"))
    }
    state = {name.replace(".original_module", ""): tensor for name, tensor in state.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "tiny"}))


def failed(checks) -> dict[str, str]:
    return {check.name: check.detail for check in checks if not check.passed}


@pytest.mark.parametrize("case", [case for case in CASES if case != "token rows"])
def test_every_kind_fits_its_base(case, tmp_path):
    model = save(case, tmp_path / "a")
    save_base(model, tmp_path / "base")
    checks = verify(read_adapter(tmp_path / "a"), base=tmp_path / "base")
    assert failed(checks) == {}
    assert [check.name for check in checks][:3] == ["keys", "finite", "base"]


def test_a_base_of_other_shapes_or_names_is_told(tmp_path):
    model = save("linear", tmp_path / "a")
    adapter = read_adapter(tmp_path / "a")
    layer = model.base_model.model.layers[0]
    layer.q_proj.base_layer.weight = torch.nn.Parameter(torch.zeros(12, 9))
    layer.o_proj = torch.nn.Identity()
    save_base(model, tmp_path / "base")
    said = failed(verify(adapter, base=tmp_path / "base"))["base"]
    assert "layers.0.q_proj.weight: [12, 9] in the base, the update is of [12, 8]" in said
    assert "layers.0.o_proj.weight: the base has none" in said
    with pytest.raises(AdapterError, match=r"config\.json|safetensors"):
        verify(adapter, base=tmp_path)


def test_a_base_in_nf4_has_the_shapes_of_its_weights(tmp_path):
    source = save_llama(tmp_path / "base")
    assert main(["quantize", str(source), str(tmp_path / "nf4")]) == 0
    save_adapter(tmp_path / "a", load(source), target_modules=["q_proj", "down_proj", "lm_head"])
    adapter = read_adapter(tmp_path / "a")
    assert failed(verify(adapter, base=tmp_path / "nf4")) == {}
    key = next(iter(adapter.updates))
    wrong = replace(adapter.updates[key], lora_A=torch.zeros(adapter.updates[key].rank, 3))
    adapter = replace(adapter, updates={**adapter.updates, key: wrong})
    assert failed(verify(adapter, base=tmp_path / "nf4")).keys() == {"base"}


def test_experts_fit_a_stack_and_a_checkpoint_of_single_experts(tmp_path):
    for family in ("Qwen3Moe", "Mixtral"):
        base = tiny_moe(family)
        base.save_pretrained(tmp_path / family)
        names = ["experts.gate_up_proj", "experts.down_proj"]
        config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=names)
        adapter = from_model(get_peft_model(base, config))
        assert failed(verify(adapter, base=tmp_path / family)) == {}
        key = next(key for key in adapter.updates if key.endswith("down_proj"))
        update = adapter.updates[key]
        wrong = replace(update, lora_A=update.lora_A[:-1], lora_B=update.lora_B[:-1])
        wrong = replace(adapter, updates={**adapter.updates, key: wrong})
        said = failed(verify(wrong, base=tmp_path / family))
        assert said.keys() == {"base"} and key in said["base"]
        with changing(tmp_path / family / "model.safetensors") as tensors:
            tensors.pop(next(name for name in tensors if re.search(r"\.5\.(up_proj|w3)\.", name)))
        said = failed(verify(adapter, base=tmp_path / family))
        assert said.keys() == {"base"} and "gate_up_proj: [5, " in said["base"]


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_is_equal(case, tmp_path):
    save(case, tmp_path / "a")
    first = read_adapter(tmp_path / "a")
    write_adapter(first, tmp_path / "b")
    other = read_adapter(tmp_path / "b")
    if case == "adalora":  # a module of rank 0 is left out
        first = first.with_updates(one for one in first.updates.values() if one.rank)
    assert failed(verify(first, against=other)) == {}
    exact = distances([(first.updates[key], other.updates[key]) for key in first.updates])
    assert max(exact) < 1e-7


def test_differences_are_measured_and_told():
    adapter = from_model(make("modules_to_save"))
    update = adapter.updates["layers.0.q_proj"]
    dense = update.scaling * update.lora_B.detach().double() @ update.lora_A.detach().double()
    B = update.lora_B.detach() + 1e-4 * torch.randn_like(update.lora_B)
    A = update.lora_A.detach() * 1.001
    for one in (replace(update, lora_B=B), replace(update, lora_A=A)):
        changed = one.scaling * one.lora_B.double() @ one.lora_A.double()
        expected = ((dense - changed).norm() / dense.norm()).item()
        assert distances([(update, one)]) == pytest.approx([expected], rel=1e-4)
        other = replace(adapter, updates={**adapter.updates, one.key: one})
        assert failed(verify(adapter, against=other, tol=expected * 1.01)) == {}
        said = failed(verify(adapter, against=other, tol=expected * 0.99))
        assert said.keys() == {"products"} and f"layers.0.q_proj {expected:.2e}" in said["products"]
    turned = replace(update, lora_A=-update.lora_A.detach(), lora_B=-update.lora_B.detach())
    assert distances([(update, turned)]) == pytest.approx([0], abs=1e-12)
    zero = replace(update, lora_B=torch.zeros_like(update.lora_B))
    assert distances([(zero, zero), (zero, update), (update, zero)]) == [
        0.0, float("inf"), pytest.approx(1.0),
    ]  # fmt: skip


def test_what_only_one_of_two_has_is_told():
    adapter = from_model(make("modules_to_save"))
    fewer = adapter.with_updates(list(adapter.updates.values())[1:])
    gone = next(iter(adapter.updates))
    assert failed(verify(adapter, against=fewer)) == {"modules": f"{gone} is in one only"}
    narrow = replace(adapter.updates[gone], lora_A=torch.zeros(4, 5))
    other = replace(adapter, updates={**adapter.updates, gone: narrow})
    assert failed(verify(adapter, against=other)) == {"modules": f"{gone} has another shape"}
    name = next(iter(adapter.extras))
    other = replace(adapter, extras={**adapter.extras, name: adapter.extras[name] + 1})
    assert failed(verify(adapter, against=other)) == {"other tensors": f"not equal: {name}"}
    other = replace(adapter, extras={})
    assert "other tensors" in failed(verify(adapter, against=other))


def test_what_is_not_finite_fails():
    adapter = from_model(make("linear"))
    update = adapter.updates["layers.0.q_proj"]
    update = replace(update, lora_A=update.lora_A / 0)
    found = verify(replace(adapter, updates={update.key: update}))
    assert failed(found) == {"finite": "NaN or infinity in layers.0.q_proj.lora_A"}
