"""`convert_to_lora` on live models: PEFT's results where PEFT is right, DoRA's whole update."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoraConfig, MissConfig, PeftModel, get_peft_model
from peft.tuners.lora.conversion import convert_to_lora as pefts
from peft_models import (  # fmt: skip
    K,
    Net,
    fill_adapters,
    layer_of,
    lora_net,
    make_conv1d,
    make_linear,
    make_linear4bit,
    tiny_llama,
)
from safetensors.torch import save_file
from torch import Tensor, nn

import peftkern
from peftkern.integrations.peft.to_lora import convert_to_lora

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def reloaded(
    base: nn.Module, found: tuple[LoraConfig, dict[str, Tensor]], folder: Any
) -> PeftModel:
    """What PEFT reads from the written result."""
    config, state_dict = found
    save_file(
        {k: v.contiguous() for k, v in state_dict.items()}, folder / "adapter_model.safetensors"
    )
    config.save_pretrained(str(folder))
    return PeftModel.from_pretrained(base, folder)


def products(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    ends = (".lora_A.weight", ".lora_B.weight")
    names = [key.removesuffix(ends[0]) for key in state_dict if key.endswith(ends[0])]
    return {name: state_dict[name + ends[1]] @ state_dict[name + ends[0]] for name in names}


def assert_as_peft(model: nn.Module, rank: int | float) -> None:
    (config, got), (wanted_config, wanted) = convert_to_lora(model, rank), pefts(model, rank)
    assert got.keys() == wanted.keys()
    for name in got:
        assert got[name].shape == wanted[name].shape and got[name].dtype == wanted[name].dtype
    for name, update in products(got).items():
        torch.testing.assert_close(update, products(wanted)[name], **CLOSE)
    names = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "use_rslora")
    assert {n: getattr(config, n) for n in names} == {n: getattr(wanted_config, n) for n in names}


@pytest.mark.filterwarnings("ignore:Converting a PEFT adapter to LoRA that is already")
@pytest.mark.parametrize("rank", [2, 4, 0.5, 0.9])
@pytest.mark.parametrize("config", [{}, {"use_rslora": True, "rank_pattern": {"q_proj": 3}}])
def test_lora_as_peft(rank, config):
    targets = ["q_proj", "v_proj", "down_proj"]
    model = get_peft_model(tiny_llama(), LoraConfig(r=6, target_modules=targets, **config))
    fill_adapters(model)
    assert_as_peft(model, rank)


@pytest.mark.filterwarnings("ignore:Converting a PEFT adapter to LoRA that is already")
@pytest.mark.parametrize("make", [make_linear, make_conv1d])
def test_orientations_as_peft(make):
    assert_as_peft(lora_net(make(), use_rslora=True), 3)


@pytest.mark.parametrize("rank", [5, 0.7])
@pytest.mark.parametrize("config", [LoHaConfig, MissConfig])
def test_other_methods_as_peft(rank, config):
    torch.manual_seed(0)
    settings = config(r=4, target_modules=["q_proj", "down_proj"], init_weights=False)
    assert_as_peft(get_peft_model(tiny_llama(), settings), rank)


@pytest.mark.parametrize("make", [make_linear, make_conv1d, make_linear4bit])
@pytest.mark.parametrize("patched", [False, True])
def test_dora_keeps_its_magnitudes(make, patched, tmp_path):
    model = lora_net(make(), use_dora=True, use_rslora=True)
    with torch.no_grad():
        layer_of(model).lora_magnitude_vector["default"].weight.mul_(1.3)
    x = torch.randn(5, K)
    expected, before = model(x), model.base_model.model.proj.get_base_layer()
    if patched:
        peftkern.patch(model)
    found = convert_to_lora(model, 64)
    plain = reloaded(
        Net(make()), found, tmp_path
    ).train()  # in eval mode bitsandbytes has another kernel
    torch.testing.assert_close(plain(x), expected, rtol=1e-3, atol=1e-4)
    assert model.base_model.model.proj.get_base_layer() is before
    # The best of a lower rank, of the whole update.
    update = products(convert_to_lora(model, 64)[1]).popitem()[1]
    sigma = torch.linalg.svdvals(update.double())
    half = products(convert_to_lora(model, 8)[1]).popitem()[1]
    assert (update - half).norm() == pytest.approx(sigma[8:].norm().item(), rel=1e-4)


def test_a_rank_above_the_updates_is_filled_with_zeros(tmp_path):
    model = lora_net(make_linear())
    config, state = convert_to_lora(model, 16)
    assert config.r == 16 and state["base_model.model.proj.lora_A.weight"].shape == (16, K)
    assert not state["base_model.model.proj.lora_A.weight"][4:].any()
    x = torch.randn(5, K)
    torch.testing.assert_close(reloaded(Net(make_linear()), (config, state), tmp_path)(x), model(x))


class Alike(nn.Module):
    """A layer whose name ends another's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.proj = nn.Linear(8, 8)
        self.inner = nn.ModuleDict({"proj": nn.Linear(8, 8)})

    def forward(self, x: Tensor) -> Tensor:
        return self.inner["proj"](self.proj(x))


def test_a_pattern_names_no_other_layer(tmp_path):
    config = LoraConfig(r=4, target_modules=["proj"])
    model = get_peft_model(Alike(), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
        for name in ("lora_A", "lora_B"):  # of rank 1
            weight = getattr(model.base_model.model.inner["proj"], name)["default"].weight
            weight[(slice(1, None),) if name == "lora_A" else (slice(None), slice(1, None))] = 0
    found = convert_to_lora(model, 0.9999)
    loaded = reloaded(Alike(), found, tmp_path)
    layers = [loaded.get_submodule(f"base_model.model.{name}") for name in ("proj", "inner.proj")]
    assert layers[0].r["default"] > layers[1].r["default"] == 1
    assert_reads(loaded, found[1])


def assert_reads(loaded: PeftModel, state_dict: dict[str, Tensor]) -> None:
    """PEFT's updates are the products of the tensors."""
    for name, update in products(state_dict).items():
        read = loaded.get_submodule(name).get_delta_weight("default")
        torch.testing.assert_close(read, update, **CLOSE)


def test_saved_modules_are_carried():
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(tiny_llama(), config)
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.add_(1.0)
    found, state = convert_to_lora(model, 2)
    assert found.modules_to_save == ["lm_head"]
    wanted = model.base_model.model.lm_head.modules_to_save["default"].weight
    assert torch.equal(state["base_model.model.lm_head.weight"], wanted)


@pytest.mark.parametrize(
    ("rank", "config", "error", "message"),
    [
        (0, {}, ValueError, "rank: expected at least 1, got 0"),
        (1.5, {}, ValueError, r"rank: expected a share in \(0, 1\] where it is a float, got 1.5"),
        (65, {}, ValueError, "rank: expected at most 64, as base_model.model.proj has, got 65"),
        (2, {"lora_bias": True}, ValueError, "bias: expected an adapter without"),
        (2, {"bias": "lora_only"}, ValueError, "bias: expected an adapter without"),
        (
            2,
            {"alora_invocation_tokens": [1]},
            TypeError,
            "ALora.* is no update of the weight alone",
        ),
    ],
)
def test_what_cannot_be_converted(rank, config, error, message):
    with pytest.raises(error, match=message):
        convert_to_lora(lora_net(make_linear(), **config), rank)


def test_models_without_the_adapter():
    with pytest.raises(TypeError, match="model: expected layers with an adapter 'other', got none"):
        convert_to_lora(lora_net(make_linear()), 2, "other")
    with pytest.raises(TypeError, match="model: expected layers with an adapter 'default'"):
        convert_to_lora(make_linear(), 2)
    config = LoraConfig(target_modules=["embed_tokens"])
    with pytest.raises(TypeError, match="embed_tokens: Embedding cannot be converted to LoRA"):
        convert_to_lora(get_peft_model(tiny_llama(), config), 2)


def test_merged_dora_is_refused():
    model = lora_net(make_linear(), use_dora=True)
    model.merge_adapter()
    with pytest.raises(ValueError, match="proj: DoRA's update is of the weight as it was"):
        convert_to_lora(model, 2)
