"""Experts in every layout: the same products, back to the same bits, as PEFT loads them."""

from __future__ import annotations

import json

import pytest
import torch
from adapters import (
    CASES,
    CLOSE,
    CONFIG,
    EXPERTS,
    HIDDEN,
    INNER,
    MODEL,
    assert_updates,
    base_of,
    delta,
    deltas,
    refused,
    save,
)
from checkpoint_folders import changing, configure, save_moe
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from peftkern.tools.adapters import from_model, read_adapter
from peftkern.tools.adapters.convert.run import convert_adapter

pytestmark = pytest.mark.filterwarnings("ignore")
LAYOUTS = ("peft-old-moe", "per-expert", "grouped", "mlx")


def same_files(one, other) -> None:
    """Check that two folders of PEFT's hold the same bits."""
    mine, theirs = load_file(one / MODEL), load_file(other / MODEL)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("case", ["experts", "experts and attention"])
@pytest.mark.parametrize("to", LAYOUTS)
def test_there_and_back(to, case, tmp_path):
    model = save(case, tmp_path / "a")
    convert_adapter(tmp_path / "a", tmp_path / "peft", "peft")
    done = convert_adapter(tmp_path / "peft", tmp_path / "b", to, base=base_of(tmp_path / "base"))
    assert done.rounded == () and done.losses == {}
    convert_adapter(tmp_path / "b", tmp_path / "back", "peft")
    same_files(tmp_path / "peft", tmp_path / "back")
    assert_updates(read_adapter(tmp_path / "back"), deltas(model))


def test_a_live_model_is_converted_as_its_file_is(tmp_path):
    model, base = save("experts and attention", tmp_path / "a"), base_of(tmp_path / "base")
    for name, source in (("b", tmp_path / "a"), ("c", from_model(model))):
        convert_adapter(source, tmp_path / name, "per-expert", base=base)
    same_files(tmp_path / "b", tmp_path / "c")


@pytest.mark.parametrize("rank, alpha", [(1, 4), (3, 1.5), (3, 6), (2, 0.5)])
def test_scalings_of_powers_of_two_round_nothing(rank, alpha, tmp_path, monkeypatch):
    monkeypatch.setitem(CASES, "here", {**CASES["experts"], "r": rank, "lora_alpha": alpha})
    model, base = save("here", tmp_path / "a"), base_of(tmp_path / "base")
    for to in LAYOUTS:
        done = convert_adapter(tmp_path / "a", tmp_path / to, to, base=base)
        assert done.rounded == ()
        convert_adapter(tmp_path / to, tmp_path / f"{to} back", "peft")
        before, after = (read_adapter(tmp_path / n).updates for n in ("a", f"{to} back"))
        for key, theirs in deltas(model).items():
            assert torch.equal(delta(after[key], theirs), delta(before[key], theirs))


def test_other_scalings_are_named_since_they_round_once(tmp_path):
    save("experts and attention", tmp_path / "a")
    done = convert_adapter(tmp_path / "a", tmp_path / "b", "grouped")
    updates = read_adapter(tmp_path / "a").updates
    assert set(done.rounded) == set(updates)
    for key, update in read_adapter(tmp_path / "b").updates.items():
        exact = updates[key].lora_B.double() * updates[key].scaling
        assert torch.equal(update.lora_A, updates[key].lora_A)
        assert torch.equal(update.lora_B, exact.float())


@pytest.mark.parametrize("to", ["peft-old-moe", "per-expert", "grouped"])
def test_what_layouts_hold_of_each_expert(to, tmp_path):
    save("experts", tmp_path / "a")
    convert_adapter(tmp_path / "a", tmp_path / "b", to, base=base_of(tmp_path / "base"))
    state, updates = load_file(tmp_path / "b" / MODEL), read_adapter(tmp_path / "a").updates
    up, down = (updates[f"layers.1.experts.{name}"] for name in ("gate_up_proj", "down_proj"))
    prefix = "base_model.model.layers.1.experts."
    for e in range(EXPERTS):
        gate_up = up.scaling * up.lora_B[e] @ up.lora_A[e]
        narrow = down.scaling * down.lora_B[e] @ down.lora_A[e]
        if to == "per-expert":
            names = [f"{prefix}{e}.{name}_proj.lora_" for name in ("gate", "up", "down")]
            pair = [state[f"{name}B.weight"] @ state[f"{name}A.weight"] for name in names]
            torch.testing.assert_close(torch.cat(pair[:2]), gate_up, **CLOSE)
            torch.testing.assert_close(pair[2], narrow, **CLOSE)
        elif to == "grouped":
            A, B = (state[f"{prefix}down_proj.lora_{x}.weight"] for x in "AB")
            assert list(A.shape) == [EXPERTS, 2, INNER] and list(B.shape) == [EXPERTS, HIDDEN, 2]
            torch.testing.assert_close(B[e] @ A[e], narrow, **CLOSE)
        else:  # rows e*r.. of A and columns e, E+e.. of B, of the transposed update
            A, B = (state[f"{prefix}base_layer.lora_{x}.weight"] for x in "AB")
            assert list(A.shape) == [EXPERTS * 2, 2 * INNER]
            turned = B[:, e::EXPERTS] @ A[2 * e : 2 * e + 2]
            torch.testing.assert_close(turned.T, gate_up, **CLOSE)


FAMILIES = {"qwen3_moe": ("gate_proj", "up_proj", "down_proj"), "mixtral": ("w1", "w3", "w2")}


@pytest.fixture(params=FAMILIES)
def trained(request, tmp_path):
    """A base's folder, an adapter of its experts as PEFT saved it, and its deltas."""
    save_moe(tmp_path / "base", request.param, torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], target_parameters=parameters)
    model = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(tmp_path / "a")
    return tmp_path, request.param, deltas(model)


def load(folder, adapter) -> dict:
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    return deltas(PeftModel.from_pretrained(model, adapter))


def test_peft_loads_experts_that_have_pairs_of_their_own(trained):
    folder, family, wanted = trained
    convert_adapter(folder / "a", folder / "b", "per-expert", base=folder / "base")
    names = load_file(folder / "b" / MODEL)
    assert all(any(f".{e}.{name}.lora_A" in key for key in names) for e in range(4)
               for name in FAMILIES[family])  # fmt: skip
    torch.testing.assert_close(load(folder, folder / "b"), wanted, **CLOSE)
    convert_adapter(folder / "a", folder / "p", "peft")
    convert_adapter(folder / "b", folder / "back", "peft")
    same_files(folder / "p", folder / "back")


def test_an_adapter_of_transformers_4_becomes_what_peft_makes_of_it(trained):
    folder, family, _ = trained
    torch.manual_seed(1)
    prefix, hidden, inner = "base_model.model.model.layers", 64, 32
    if family == "mixtral":
        inner = 96
    block = "block_sparse_moe" if family == "mixtral" else "mlp"
    gate, up, down = FAMILIES[family]
    state = {}
    for layer in range(2):
        for e in range(4):
            for name in FAMILIES[family]:
                m, n = (hidden, inner) if name == down else (inner, hidden)
                key = f"{prefix}.{layer}.{block}.experts.{e}.{name}.lora_"
                state |= {f"{key}A.weight": torch.randn(3, n), f"{key}B.weight": torch.randn(m, 3)}
    (folder / "v4").mkdir()
    save_file(state, folder / "v4" / MODEL)
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": [gate, up, down]}
    (folder / "v4" / CONFIG).write_text(json.dumps(config))
    convert_adapter(folder / "v4", folder / "b", "peft")
    ours, theirs = load(folder, folder / "b"), load(folder, folder / "v4")
    assert len(ours) == 4
    torch.testing.assert_close(ours, theirs, **CLOSE)
    convert_adapter(folder / "b", folder / "back", "per-expert", base=folder / "base")
    back = load_file(folder / "back" / MODEL)
    for name, tensor in state.items():
        wanted = tensor * 2 if "lora_B" in name else tensor  # the scaling
        assert torch.equal(back[name], wanted), name


@pytest.mark.parametrize("parameter", ["gate_up_proj", "down_proj"])
def test_gate_and_up_alone_are_warned_of_which_peft_reads_as_zero(parameter, tmp_path):
    save_moe(tmp_path / "base", "qwen3_moe", torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(target_parameters=[f"mlp.experts.{parameter}"]))
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "lora_" in name:
                tensor.normal_()
    model.save_pretrained(tmp_path / "a")
    done = convert_adapter(tmp_path / "a", tmp_path / "b", "per-expert", base=tmp_path / "base")
    said = [note for note in done.notes if "updates of zero: for PEFT convert to peft" in note]
    zero = not any(one.any() for one in load(tmp_path, tmp_path / "b").values())
    assert bool(said) == zero == (parameter == "gate_up_proj")


def test_grouped_adapters_may_share_a_side(tmp_path):
    save("experts", tmp_path / "a")
    convert_adapter(tmp_path / "a", tmp_path / "b", "grouped")
    key = "base_model.model.layers.0.experts.gate_up_proj.lora_A.weight"
    with changing(tmp_path / "b" / MODEL) as state:
        state[key] = state[key][:1]
    shared = read_adapter(tmp_path / "b").updates["layers.0.experts.gate_up_proj"]
    assert all(torch.equal(one, state[key][0]) for one in shared.lora_A) and len(shared.lora_A) == 3


def test_what_is_no_layout_of_experts_is_refused(tmp_path):
    save("linear", tmp_path / "a")
    for to in ("peft-old-moe", "per-expert", "grouped"):
        refused(tmp_path / "a", to, str(tmp_path / "a"), "no experts", to)
    refused(tmp_path / "a", "gguf", "peft-old-moe", "'gguf'")


def test_gate_and_up_that_alternate_have_no_projections(tmp_path):
    save("experts", tmp_path / "a", is_transposed=True)
    save_moe(tmp_path / "base", "gpt_oss")
    for to in ("per-expert", "mlx"):
        refused(tmp_path / "a", to, "gate_up_proj", "alternate in gpt_oss", base=tmp_path / "base")
    save("one parameter", tmp_path / "down", is_transposed=True)
    words = "down_proj: an update in gpt_oss, whose experts have no projections"
    refused(tmp_path / "down", "per-expert", words, base=tmp_path / "base")


@pytest.mark.parametrize("named", [None, "somebody/a-tune"])
def test_a_name_alone_tells_nothing_of_experts(named, tmp_path):
    save("experts", tmp_path / "a", is_transposed=True)
    configure(tmp_path / "a", CONFIG, base_model_name_or_path=named)
    for to in ("per-expert", "mlx"):
        refused(tmp_path / "a", to, "gate_up_proj", "how gate and up lie", "--base")
    base = base_of(tmp_path / "base")
    configure(tmp_path / "a", CONFIG, base_model_name_or_path=str(base))
    for to in ("per-expert", "mlx"):
        convert_adapter(tmp_path / "a", tmp_path / to, to)


def test_experts_that_do_not_make_a_stack(tmp_path):
    save("experts", tmp_path / "a")
    base = base_of(tmp_path / "base")
    convert_adapter(tmp_path / "a", tmp_path / "b", "per-expert", base=base)
    whole = load_file(tmp_path / "b" / MODEL)
    key = "base_model.model.layers.0.experts."

    def without(*names: str) -> None:
        left = {k: t for k, t in whole.items() if not k.startswith(tuple(key + n for n in names))}
        save_file(left, tmp_path / "b" / MODEL)

    without("1.down_proj")
    refused(tmp_path / "b", "peft", "layers.0.experts.0.down_proj", "none of number 1")
    without("0.gate_proj", "1.gate_proj", "2.gate_proj")
    refused(tmp_path / "b", "peft", "layers.0.experts", "gate_proj beside up_proj")
    without("2.gate_proj")
    refused(tmp_path / "b", "peft", "as many experts")
    narrow = {f"{key}1.down_proj.lora_{x}.weight": torch.ones(2, 2) for x in "AB"}
    save_file(whole | narrow, tmp_path / "b" / MODEL)
    refused(tmp_path / "b", "peft", "layers.0.experts.1.down_proj.lora_A", "[2, 2]")
    far = {f"{key}{10**15}.down_proj.lora_{x}.weight": torch.ones(2, 2) for x in "AB"}
    save_file(whole | far, tmp_path / "b" / MODEL)  # nothing of that size is made
    refused(tmp_path / "b", "peft", f"from 0 to {10**15}, got none of number 3")


def test_stacks_that_are_no_pairs(tmp_path):
    save("experts", tmp_path / "a")
    convert_adapter(tmp_path / "a", tmp_path / "b", "grouped")
    whole = load_file(tmp_path / "b" / MODEL)
    A = "base_model.model.layers.0.experts.gate_up_proj.lora_A.weight"
    for tensor in (whole[A][:2], whole[A][:, :1], whole[A][:, :, :0]):
        save_file(whole | {A: tensor.contiguous()}, tmp_path / "b" / MODEL)
        refused(tmp_path / "b", "peft", A.removesuffix(".lora_A.weight"), str(list(tensor.shape)))
    save_file({k: t for k, t in whole.items() if k != A}, tmp_path / "b" / MODEL)
    refused(tmp_path / "b", "peft", A)
