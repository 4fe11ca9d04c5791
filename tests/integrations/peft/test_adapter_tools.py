"""`add_weighted_adapter` on live models: PEFT's results where PEFT is right, the sum elsewhere."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from linear_cases import F32
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils import merge_utils
from peft_models import add_lora, fill_adapters, make_conv1d, tiny_llama
from tolerances import SVD_RECONSTRUCTION
from torch import Tensor, nn

import peftkern
from peftkern.integrations.peft import adapter_tools
from peftkern.integrations.peft.adapter_tools import add_weighted_adapter
from peftkern.methods.sparse_sums import METHODS

WEIGHTS = [0.7, -0.4]
NAMES = ["default", "two"]
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


class Mixed(nn.Module):
    """One layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed = nn.Embedding(30, 24)
        self.linear = nn.Linear(24, 40)
        self.turned = make_conv1d(F32)
        self.conv = nn.Conv2d(3, 8, 3)
        self.point = nn.Conv2d(8, 6, 1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.linear(self.embed(ids))


KINDS = ["embed", "linear", "turned", "conv", "point"]


def mixed(first: dict[str, Any] | None = None, second: dict[str, Any] | None = None) -> PeftModel:
    """Two filled adapters over all kinds of layers."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": KINDS}
    model = get_peft_model(Mixed(), LoraConfig(**{**settings, **(first or {})}))
    model.add_adapter("two", LoraConfig(**{**settings, **(second or {})}))
    torch.manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    return model


def deltas(model: PeftModel, adapter: str) -> dict[str, Tensor]:
    """The update of every layer that has the adapter."""
    return {
        name: module.get_delta_weight(adapter)
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight") and adapter in module.scaling
    }


def sums(model: PeftModel, weights: list[float] = WEIGHTS) -> dict[str, Tensor]:
    """The weighted sum of the updates in float64."""
    found: dict[str, Tensor] = {}
    for adapter, weight in zip(NAMES, weights, strict=True):
        for name, delta in deltas(model, adapter).items():
            found[name] = found.get(name, 0) + weight * delta.double()
    return found


def cut(dense: Tensor, rank: int) -> Tensor:
    """The best approximation, of a convolution as a matrix."""
    flat = dense.flatten(1)
    U, S, Vh = torch.linalg.svd(flat, full_matrices=False)
    return ((U[:, :rank] * S[:rank]) @ Vh[:rank]).view(dense.shape)


def assert_updates(model: PeftModel, adapter: str, expected: dict[str, Tensor]) -> None:
    got = deltas(model, adapter)
    assert got.keys() == expected.keys()
    for name, delta in got.items():
        assert (delta - expected[name]).norm() <= SVD_RECONSTRUCTION * expected[name].norm(), name


def both(model: PeftModel, **options: Any) -> tuple[PeftModel, PeftModel]:
    """The new adapter by PEFT and by us, on copies."""
    theirs, ours = copy.deepcopy(model), model
    torch.manual_seed(8)
    theirs.add_weighted_adapter(NAMES, WEIGHTS, "new", **options)
    torch.manual_seed(8)
    add_weighted_adapter(ours, NAMES, WEIGHTS, "new", **options)
    return theirs, ours


@pytest.mark.parametrize("options", [
    {"combination_type": "cat"},
    {"combination_type": "svd", "svd_rank": 3},
    {"combination_type": "svd", "svd_rank": 6, "svd_full_matrices": False},
    {"combination_type": "svd"},
    {"combination_type": "magnitude_prune_svd", "density": 0.4},
    {"combination_type": "ties_svd", "density": 0.4},
])  # fmt: skip
def test_as_peft_over_all_kinds_of_layers(options):
    theirs, ours = both(mixed(), **options)
    assert_updates(ours, "new", deltas(theirs, "new"))
    assert ours.peft_config["new"].r == theirs.peft_config["new"].r
    ours.set_adapter("new"), theirs.set_adapter("new")
    ids = torch.arange(9)
    got, wanted = ours(ids), theirs(ids)
    assert (got - wanted).norm() <= SVD_RECONSTRUCTION * wanted.norm()


@pytest.mark.parametrize("suffix", ["", "_svd"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("signs", ["total", "frequency"])
def test_sparsified_sums_are_pefts_of_dense_updates(method, suffix, signs):
    model = add_two_to(tiny_llama())
    held = [deltas(model, name) for name in NAMES]
    torch.manual_seed(8)
    expected = {}
    for name in held[0]:
        pairs = [(d[name], w) for d, w in zip(held, WEIGHTS, strict=True) if name in d]
        found, weights = zip(*pairs, strict=True)
        more = {"majority_sign_method": signs} if "ties" in method else {}
        dense = getattr(merge_utils, method)(list(found), torch.tensor(weights), 0.5, **more)
        expected[name] = cut(dense.double(), 6)
    torch.manual_seed(8)
    options = {"svd_rank": 6, "density": 0.5, "majority_sign_method": signs}
    add_weighted_adapter(model, NAMES, WEIGHTS, "new", method + suffix, **options)
    assert_updates(model, "new", expected)


def test_factors_are_pefts_up_to_signs():
    theirs, ours = both(mixed(), combination_type="svd", svd_rank=3)
    wanted = get_peft_model_state_dict(theirs, adapter_name="new")
    for name, got in get_peft_model_state_dict(ours, adapter_name="new").items():
        torch.testing.assert_close(got.abs(), wanted[name].abs(), rtol=1e-4, atol=1e-5)
        assert got.dtype == wanted[name].dtype


def test_clamped_by_a_quantile_of_both_factors():
    model = mixed()
    add_weighted_adapter(model, NAMES, WEIGHTS, "plain", "svd", svd_rank=3)
    add_weighted_adapter(model, NAMES, WEIGHTS, "new", "svd", svd_rank=3, svd_clamp=0.97)
    plain, got = (get_peft_model_state_dict(model, adapter_name=n) for n in ("plain", "new"))
    for name in (name for name in got if "lora_A" in name or "embedding_A" in name):
        other = name.replace("_A", "_B")
        bound = torch.quantile(torch.cat([plain[name].flatten(), plain[other].flatten()]), 0.97)
        for one in (name, other):
            assert torch.equal(got[one], plain[one].clamp(-bound, bound))


def add_two_to(base: nn.Module, **second: Any) -> PeftModel:
    model = add_lora(base)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], **second}
    model.add_adapter("two", LoraConfig(**settings))
    fill_adapters(model)
    return model


def test_rslora_patterns_and_unequal_ranks_are_summed_exactly():
    """PEFT's cat of an rslora adapter first is sqrt(rank) too large."""
    model = mixed(
        {"use_rslora": True, "r": 4, "rank_pattern": {"linear": 2}, "alpha_pattern": {"conv": 1}},
        {"r": 6, "lora_alpha": 3},
    )
    expected = sums(model)
    add_weighted_adapter(model, NAMES, WEIGHTS, "cat", "cat")
    assert_updates(model, "cat", expected)
    assert model.peft_config["cat"].r == 10 and not model.peft_config["cat"].use_rslora
    for kind in ("svd", "linear"):
        add_weighted_adapter(model, NAMES, WEIGHTS, kind, kind, svd_rank=3)
        assert_updates(model, kind, {
            name: cut(delta.T, 3).T if "turned" in name else cut(delta, 3)
            for name, delta in expected.items()
        })  # fmt: skip


def test_a_rank_beyond_the_layer_and_one_adapter():
    model = mixed()
    expected = {name: delta.double() for name, delta in deltas(model, "two").items()}
    add_weighted_adapter(model, ["two"], [1.0], "wide", "svd", svd_rank=50)
    assert_updates(model, "wide", expected)
    add_weighted_adapter(model, ["two"], [1.0], "narrow", "svd", svd_rank=2)
    assert_updates(model, "narrow", {name: cut(d, 2) for name, d in expected.items()})


def test_layers_of_one_adapter_alone():
    model = add_two_to(tiny_llama(), layers_to_transform=[1])
    model.add_adapter("three", LoraConfig(target_modules=["v_proj"], layers_to_transform=[0]))
    fill_adapters(model)
    expected = {}
    for adapter in ("two", "three"):
        expected |= {name: 0.5 * d.double() for name, d in deltas(model, adapter).items()}
    add_weighted_adapter(model, ["three", "two"], [0.5, 0.5], "new", "cat")
    assert_updates(model, "new", expected)


def test_biases_of_lora_B_are_summed():
    bias = {"lora_bias": True, "target_modules": ["linear"]}
    model = mixed(bias, bias)
    layer = model.base_model.model.linear
    expected = sum(
        w * layer.scaling[name] * layer.lora_B[name].bias
        for name, w in zip(NAMES, WEIGHTS, strict=True)
    )
    add_weighted_adapter(model, NAMES, WEIGHTS, "new", "svd")
    torch.testing.assert_close(layer.lora_B["new"].bias, expected, **CLOSE)


def test_initializations_that_change_the_base_do_not_run_again():
    model = mixed({"init_lora_weights": "olora", "target_modules": ["linear"]},
                  {"target_modules": ["linear"]})  # fmt: skip
    weight = model.base_model.model.linear.base_layer.weight
    before, expected = weight.clone(), sums(model)
    add_weighted_adapter(model, NAMES, WEIGHTS, "new", "cat")
    assert torch.equal(weight, before)
    assert_updates(model, "new", expected)


def test_saved_modules_of_one_adapter_are_carried():
    model = mixed({"target_modules": ["linear"]},
                  {"target_modules": ["linear"], "modules_to_save": ["embed"]})  # fmt: skip
    wrapper = model.base_model.model.embed
    with torch.no_grad():
        wrapper.modules_to_save["two"].weight.add_(1.0)
    add_weighted_adapter(model, NAMES, WEIGHTS, "new", "svd")
    assert torch.equal(wrapper.modules_to_save["new"].weight, wrapper.modules_to_save["two"].weight)


def test_on_a_patched_model_and_frozen():
    model = add_two_to(tiny_llama())
    twin = copy.deepcopy(model)
    peftkern.patch(twin)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    for one in (model, twin):
        add_weighted_adapter(one, NAMES, WEIGHTS, "t", "svd")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trainable
    assert model.active_adapters == ["default"]
    for one, other in zip(deltas(model, "t").values(), deltas(twin, "t").values(), strict=True):
        assert torch.equal(one, other)
    ids = torch.arange(8)[None]
    model.set_adapter("t"), twin.set_adapter("t")
    torch.testing.assert_close(model(ids).logits, twin(ids).logits, rtol=1e-4, atol=1e-5)


def test_saved_and_loaded_by_peft(tmp_path):
    model = mixed({"use_rslora": True}, {"r": 2})
    add_weighted_adapter(model, NAMES, WEIGHTS, "new", "svd", svd_rank=5)
    expected = deltas(model, "new")
    model.save_pretrained(tmp_path, selected_adapters=["new"])
    loaded = PeftModel.from_pretrained(Mixed(), tmp_path / "new")
    assert_updates(loaded, "default", expected)


def test_an_adapter_of_that_name_stays():
    model = mixed()
    before = deltas(model, "two")
    add_weighted_adapter(model, NAMES, WEIGHTS, "two", "svd")
    assert_updates(model, "two", before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"combination_type": "mean"}, "combination_type: expected one of svd, cat"),
        ({"weights": [1.0]}, "weights: expected 2, got 1"),
        ({"combination_type": "ties"}, r"density: expected a number in \(0, 1\], got None"),
        ({"adapters": ["default", "three"]}, "Adapter three does not exist"),
        ({"combination_type": "ties", "density": 0.5, "majority_sign_method": "x"}, "majority_s"),
    ],
)
def test_bad_arguments_change_nothing(change, message):
    model = mixed()
    arguments = {"adapters": NAMES, "weights": WEIGHTS, "adapter_name": "new", **change}
    with pytest.raises(ValueError, match=message):
        add_weighted_adapter(model, **arguments)
    assert list(model.peft_config) == NAMES
    assert not any("new" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("where", ["_write", "_copy_saved_modules", "inject_adapter"])
def test_a_failure_leaves_no_layers_behind(where, monkeypatch):
    model = mixed()
    names, active = [name for name, _ in model.named_parameters()], model.active_adapter
    inject = model.base_model.inject_adapter

    def fail(*args: Any) -> None:
        if where == "inject_adapter":
            inject(*args)
        raise MemoryError(where)

    owner = model.base_model if where == "inject_adapter" else adapter_tools
    monkeypatch.setattr(owner, where, fail)
    with pytest.raises(MemoryError, match=where):
        add_weighted_adapter(model, NAMES, WEIGHTS, "new")
    assert list(model.peft_config) == NAMES and model.active_adapter == active
    assert [name for name, _ in model.named_parameters()] == names
    monkeypatch.undo()
    add_weighted_adapter(model, NAMES, WEIGHTS, "new", "cat")
    assert_updates(model, "new", sums(model))


def test_what_is_no_plain_update_is_refused():
    model = mixed({"target_modules": ["linear"]}, {"target_modules": ["linear"], "use_dora": True})
    with pytest.raises(
        ValueError, match=r"linear: adapter 'two' is more than scaling \* B A \(Dora"
    ):
        add_weighted_adapter(model, NAMES, WEIGHTS, "new", "svd")
    rows = {"target_modules": ["linear"], "trainable_token_indices": {"embed": [1, 2]}}
    model = mixed({"target_modules": ["linear"]}, rows)
    with pytest.raises(ValueError, match="two: token rows replace those of the base"):
        add_weighted_adapter(model, NAMES, WEIGHTS, "new", "svd")
