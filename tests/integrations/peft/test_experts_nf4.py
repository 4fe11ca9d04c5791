"""LoRA on fused experts in NF4: kernels read the stored weights; PEFT decodes and folds all."""

from __future__ import annotations

import copy

import pytest
import torch
from expert_models import (
    LAYOUTS,
    add_experts_lora,
    assert_as_near_as_peft,
    assert_like_peft,
    expert_net,
    fallbacks,
    inputs,
    oracle_of,
    outputs_and_gradients,
    patched_copy,
    served,
    tiny_moe,
    wrapper_of,
)
from torch import nn

import peftkern
from peftkern.layers.expert_stack import stacks_of

pytestmark = pytest.mark.usefixtures("one_thread")
BF16 = torch.bfloat16
every_layout = pytest.mark.parametrize("folder", LAYOUTS)


def net(folder: str, order: str, **options) -> nn.Module:
    model = expert_net(folder, quantized=order == "quantized first", **options)
    peftkern.quantize_(model, include=["experts"])
    assert len(stacks_of(wrapper_of(model).get_base_layer())) == 2
    return model


@every_layout
@pytest.mark.parametrize("order", ["quantized first", "adapted first"])
def test_like_pefts_fold_of_the_decoded_weights(folder, order):
    assert_like_peft(net(folder, order), *inputs())


@every_layout
def test_nothing_is_decoded_and_16_bits_are_nearer_to_float64(folder, monkeypatch):
    model = net(folder, "quantized first", dtype=BF16)
    wrapper_of(model).get_base_layer().limit = 9.0  # at a clamp the last bit decides a gradient
    dense = copy.deepcopy(model)
    experts = wrapper_of(dense).get_base_layer()
    for name, stack in stacks_of(experts).items():
        setattr(experts, name, nn.Parameter(stack.dequantize(), requires_grad=False))
    assert_as_near_as_peft(model, oracle_of(dense), *inputs(200, BF16))
    twin = patched_copy(model)
    monkeypatch.setattr("peftkern.layers.expert_stack.dequantize", None)
    outputs_and_gradients(twin, *inputs(200, BF16))


def test_a_whole_model_is_served_with_adapters_and_without(monkeypatch):
    model = tiny_moe("Qwen3Moe")
    peftkern.quantize_(model, include=["experts"])
    model = add_experts_lora(model)
    twin = copy.deepcopy(model)
    report = peftkern.patch(twin)
    assert report.kinds == {"lora.ParamWrapper": 2}
    assert report.without_adapter == [] and report.falling_back == {}
    ids = torch.randint(3, 60, (2, 9))
    expected = outputs_and_gradients(model, ids)
    with model.disable_adapter():
        base = model(ids).logits
    monkeypatch.setattr("peftkern.layers.expert_stack.dequantize", None)
    peftkern.reset_stats()
    got = outputs_and_gradients(twin, ids)
    assert served() == 2 and fallbacks() == {}
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5)
    with twin.disable_adapter():  # the experts alone, by the implementation that `patch` chose
        torch.testing.assert_close(twin(ids).logits, base, rtol=1e-4, atol=1e-5)


def parts(model: nn.Module) -> dict[str, torch.Tensor]:
    """The bytes of a model's experts."""
    found = {}
    for path, module in model.named_modules():
        for name, stack in stacks_of(module).items():
            found |= {f"{path}.{name}": stack._packed, f"{path}.{name}.absmax": stack._absmax}
    return {name: part.clone() for name, part in found.items()}


@pytest.mark.parametrize(
    "way", ["unmerge", "disable", "safely", "two", "inference", "moved", "cast", "patched anew"]
)
@pytest.mark.filterwarnings("ignore:.*quantized to NF4 again", "ignore:Already unmerged")
def test_a_patched_model_has_its_bytes_back_after_a_merge(way):
    model = patched_copy(net(LAYOUTS[-1], "quantized first"))
    if way == "two":
        model.add_adapter("other", model.peft_config["default"])
    given = inputs()
    before, expected = parts(model), model(*given)
    with torch.inference_mode(way == "inference"):
        model.merge_adapter(safe_merge=way == "safely")
        if way == "two":
            model.merge_adapter(["other"])
        assert all(not torch.equal(parts(model)[name], part) for name, part in before.items())
        if way == "moved":
            model.cpu()
        elif way == "cast":
            model.double().float()
        elif way == "patched anew":
            with pytest.warns(
                UserWarning, match="merged into 4-bit weights, which PEFT cannot undo"
            ):
                peftkern.unpatch(model)
            peftkern.patch(model)
        if way == "disable":
            with model.disable_adapter():
                model(*given)
        else:
            model.unmerge_adapter()
    after = parts(model)
    assert all(torch.equal(after[name], part) for name, part in before.items())
    assert torch.equal(model(*given), expected)
    assert all("frozen_weight" not in module.__dict__ for module in model.modules())


def test_weights_that_came_while_merged_are_not_replaced():
    model = patched_copy(net(LAYOUTS[0], "quantized first"))
    with pytest.warns(UserWarning, match="quantized to NF4 again"):
        model.merge_adapter()
    state = {name: part.flip(0) for name, part in model.state_dict().items()}
    model.load_state_dict(state)
    loaded = parts(model)
    with pytest.warns(UserWarning, match="does not bring back what was there before"):
        model.unmerge_adapter()
    after = parts(model)
    assert all(not torch.equal(after[name], part) for name, part in loaded.items())


@pytest.mark.filterwarnings("ignore:.*quantized to NF4 again")
def test_a_merge_from_before_patch_is_subtracted():
    model = net(LAYOUTS[0], "quantized first")
    model.merge_adapter()
    merged = parts(model)
    peftkern.patch(model)
    model.merge_adapter()  # finds nothing to merge
    model.unmerge_adapter()
    after = parts(model)
    assert all(not torch.equal(after[name], part) for name, part in merged.items())


@pytest.mark.filterwarnings("ignore:.*quantized to NF4 again")
def test_a_merge_that_fails_changes_nothing():
    model = patched_copy(net(LAYOUTS[0], "quantized first"))
    before = parts(model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.constant_(parameter, torch.nan)
    with pytest.raises(ValueError, match=r"NaN"):
        model.merge_adapter()
    after = parts(model)
    assert all(torch.equal(after[name], part) for name, part in before.items())
    assert all("frozen_weight" not in module.__dict__ for module in model.modules())
