"""Layouts of stacks of experts: what shapes and configs tell, what has to be asked for."""

from __future__ import annotations

import json

import pytest
import torch
from adapters import (
    CLOSE,
    CONFIG,
    EXPERTS,
    HIDDEN,
    INNER,
    MODEL,
    assert_updates,
    delta,
    deltas,
    save,
)
from checkpoint_folders import changing
from expert_models import add_experts_lora, fill_lora_B, tiny_moe
from peft import PeftModel

from peftkern.tools.adapters import AdapterError, experts, read_adapter, write_adapter

pytestmark = pytest.mark.filterwarnings("ignore")


def relabel(A, B, count: int, layout: str):
    """Return PEFT's matrices as another layout has them, entry by entry."""
    rank = A.shape[0] // count
    if layout.endswith("old-moe"):
        old_A, old_B = torch.empty(A.shape[0], B.shape[0]), torch.empty(A.shape[1], B.shape[1])
        for e in range(count):
            for k in range(rank):
                old_A[e * rank + k] = B[:, k * count + e]
                old_B[:, k * count + e] = A[e * rank + k]
        A, B = old_A, old_B
    if layout.startswith("unsloth"):
        packed = torch.empty_like(B)
        for e in range(count):
            for k in range(rank):
                packed[:, e * rank + k] = B[:, k * count + e]
        B = packed
    return A, B


def rewrite(folder, layout: str, **fields) -> None:
    """Turn what PEFT saved into another layout, and change fields of the config; None removes."""
    with changing(folder / MODEL) as state:
        for name in [n for n in state if "experts" in n and n.endswith("lora_A.weight")]:
            other = name.replace("lora_A", "lora_B")
            state[name], state[other] = relabel(state[name], state[other], EXPERTS, layout)
    config = json.loads((folder / CONFIG).read_text()) | fields
    config = {key: value for key, value in config.items() if value is not None}
    (folder / CONFIG).write_text(json.dumps(config))


@pytest.mark.parametrize("layout", experts.LAYOUTS)
@pytest.mark.parametrize("version", ["0.21.2", "0.18.0", None])
def test_two_parameters_tell_input_from_output(layout, version, tmp_path):
    model = save("experts", tmp_path / "a")
    marker = "grouped_by_expert" if layout.startswith("unsloth") else None
    rewrite(tmp_path / "a", layout, peft_version=version, lora_B_layout=marker)
    adapter = read_adapter(tmp_path / "a")
    assert_updates(adapter, deltas(model))
    assert adapter.notes[0].startswith(f"experts in layout {layout}: gate_up_proj ")
    write_adapter(adapter, tmp_path / "b")
    again = read_adapter(tmp_path / "b")
    assert_updates(again, deltas(model))
    assert again.notes[0].startswith("experts in layout peft: gate_up_proj ")
    marked = json.loads((tmp_path / "b" / CONFIG).read_text()).get("lora_B_layout")
    assert marked == ("rank_major" if marker else None)


@pytest.mark.parametrize("layout", experts.LAYOUTS)
def test_what_relabeling_does_it_undoes(layout):
    A, B = torch.randn(EXPERTS * 2, 7), torch.randn(5, EXPERTS * 2)
    filed = relabel(A, B, EXPERTS, layout)
    stacks = experts.regroup(*filed, EXPERTS, layout)
    assert [list(one.shape) for one in stacks] == [[EXPERTS, 2, 7], [EXPERTS, 5, 2]]
    for e in range(EXPERTS):
        assert torch.equal(stacks[0][e], A[2 * e : 2 * e + 2])
        assert torch.equal(stacks[1][e], B[:, e::EXPERTS])
    for one, other in zip(experts.ungroup(*stacks, layout), filed, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("layout", ["peft", "peft-old-moe"])
def test_the_attention_shows_the_hidden_size(layout, tmp_path):
    model = save("experts and attention", tmp_path / "a")
    with changing(tmp_path / "a" / MODEL) as state:
        for name in [name for name in state if "experts.base_layer" in name]:
            del state[name]
    names = {"target_parameters": ["experts.down_proj"], "peft_version": "0.18.0"}
    rewrite(tmp_path / "a", layout, **names)
    adapter = read_adapter(tmp_path / "a")
    assert f"beside a hidden size of {HIDDEN}" in adapter.notes[0]
    for key, theirs in deltas(model).items():
        if not key.endswith("gate_up_proj"):
            ours = delta(adapter.updates[key], theirs).float()
            torch.testing.assert_close(ours, theirs, **CLOSE)


def test_where_nothing_tells_a_layout_is_asked_for(tmp_path):
    model = save("one parameter", tmp_path / "a")
    assert_updates(
        read_adapter(tmp_path / "a"), deltas(model)
    )  # written by a PEFT that has one layout
    rewrite(tmp_path / "a", "peft-old-moe", peft_version="0.18.1")
    with pytest.raises(AdapterError, match="--layout peft or peft-old-moe") as caught:
        read_adapter(tmp_path / "a")
    assert "layers.0.experts.down_proj: A [6, 8] and B [5, 6]" in str(caught.value)
    assert_updates(read_adapter(tmp_path / "a", expert_layout="peft-old-moe"), deltas(model))
    with pytest.raises(AdapterError, match="expert_layout: expected one of peft, "):
        read_adapter(tmp_path / "a", expert_layout="else")
    write_adapter(read_adapter(tmp_path / "a", expert_layout="peft-old-moe"), tmp_path / "b")
    assert_updates(read_adapter(tmp_path / "b"), deltas(model))


@pytest.mark.parametrize("layout", ["peft", "unsloth"])
def test_adapters_of_unsloth_without_their_marker_are_asked_for(layout, tmp_path):
    model = save("experts", tmp_path / "a")
    rewrite(tmp_path / "a", layout, base_model_name_or_path="unsloth/Qwen3-30B-A3B")
    with pytest.raises(AdapterError, match="--layout peft or unsloth"):
        read_adapter(tmp_path / "a")
    adapter = read_adapter(tmp_path / "a", expert_layout=layout)
    assert_updates(adapter, deltas(model))
    write_adapter(adapter, tmp_path / "b")
    assert_updates(read_adapter(tmp_path / "b"), deltas(model))  # which is marked


def test_shapes_rule_out_a_layout_that_is_asked_for(tmp_path):
    save("experts", tmp_path / "a")
    with pytest.raises(AdapterError, match="not in layout peft-old-moe: gate_up_proj"):
        read_adapter(tmp_path / "a", expert_layout="peft-old-moe")


def test_stacks_of_which_each_is_another_way_round_are_refused(tmp_path):
    save("experts", tmp_path / "a")
    with changing(tmp_path / "a" / MODEL) as state:
        for inner in ("", "base_layer."):
            A, B = (f"base_model.model.layers.1.experts.{inner}lora_{x}.weight" for x in "AB")
            state[A], state[B] = relabel(state[A], state[B], EXPERTS, "peft-old-moe")
    with pytest.raises(AdapterError, match="its experts have two layouts"):
        read_adapter(tmp_path / "a")


def test_a_transposed_base_has_the_same_factors(tmp_path):
    model = save("experts", tmp_path / "a", is_transposed=True)
    adapter = read_adapter(tmp_path / "a")
    assert_updates(adapter, deltas(model))
    assert adapter.updates["layers.0.experts.gate_up_proj"].size == (2 * INNER, HIDDEN)


@pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss", "NemotronH"])
def test_adapters_of_transformers_models_go_through_a_file(family, tmp_path):
    model = add_experts_lora(tiny_moe(family), target_modules=["q_proj"])
    fill_lora_B(model)
    model.save_pretrained(tmp_path / "a")
    adapter = read_adapter(tmp_path / "a")
    assert_updates(adapter, deltas(model))
    assert {one.kind for one in adapter.updates.values()} == {"linear", "experts"}
    write_adapter(adapter, tmp_path / "b")
    loaded = PeftModel.from_pretrained(tiny_moe(family), tmp_path / "b")
    torch.testing.assert_close(deltas(loaded), deltas(model), **CLOSE)
