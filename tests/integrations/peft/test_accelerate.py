"""Models that accelerate has spread over devices: its hooks do their work, layers are served."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import (
    AlignDevicesHook,
    ModelHook,
    SequentialHook,
    add_hook_to_module,
    attach_align_device_hook,
    remove_hook_from_submodules,
)
from adalora_models import quantize_4bit_
from peft import AdaLoraConfig, get_peft_model
from peft_models import (
    K,
    N,
    add_lora,
    assert_falls_back,
    fallbacks,
    fill_adapters,
    layer_of,
    lora_net,
    make_linear,
    make_linear4bit,
    served_by_us,
    text_batch,
    tiny_llama,
)
from peft_oracle import dora_net, norms_computed
from torch import nn

import peftkern
from peftkern.integrations.peft.fallback import hooked

MAKERS = [make_linear, make_linear4bit]
ROLES = ["base_layer", "lora_A", "lora_B", "lora_dropout"]
dispatch = functools.partial(dispatch_model, device_map={"": "cpu"}, force_hooks=True)


def role(model: nn.Module, name: str) -> nn.Module:
    layer = layer_of(model)
    return layer.base_layer if name == "base_layer" else getattr(layer, name)["default"]


def hooks_of(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What accelerate keeps on the instances; bound methods are equal if function and self are."""
    kept = ("forward", "_old_forward", "_hf_hook")
    return {
        name: {key: vars(module)[key] for key in kept if key in vars(module)}
        for name, module in model.named_modules()
    }


class Tracer(ModelHook):
    """A hook that does something."""

    def post_forward(self, module: nn.Module, output: torch.Tensor) -> torch.Tensor:
        return output * 0.5


@pytest.mark.parametrize("order", ["before PEFT", "before patch", "after patch"])
@pytest.mark.parametrize("four_bit", [False, True])
def test_dispatched_model_is_served(order, four_bit):
    """As with `device_map="auto"` over two devices: a hook on every module with a state."""
    base = tiny_llama()
    if four_bit:
        quantize_4bit_(base)
    if order == "before PEFT":
        dispatch(base)
    model = add_lora(base)
    fill_adapters(model)
    expected = model(**text_batch()).loss  # by PEFT
    expected.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    if order == "before patch":
        dispatch(model)
    report = peftkern.patch(model)
    assert len(report.patched) == 14 and report.skipped == report.falling_back == {}
    if order == "after patch":
        dispatch(model)
    assert "_hf_hook" in vars(model.base_model.model.model.layers[0].self_attn.q_proj.base_layer)
    peftkern.reset_stats()
    loss = model(**text_batch()).loss
    loss.backward()
    assert served_by_us() == 14 and fallbacks() == {}
    torch.testing.assert_close(loss, expected)
    for name, p in model.named_parameters():
        if name in grads:
            torch.testing.assert_close(p.grad, grads[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("make", MAKERS)
def test_unpatch_leaves_the_hooks_as_accelerate_made_them(make):
    model = dispatch(lora_net(make()))
    before = hooks_of(model)
    assert len(before["base_model.model.proj"]) == 3
    peftkern.patch(model)
    assert vars(layer_of(model))["forward"] is before["base_model.model.proj"]["forward"]
    peftkern.unpatch(model)
    assert hooks_of(model) == before


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("removed", ["before patch", "after patch", "after unpatch"])
def test_hooks_are_removed(make, removed):
    """accelerate leaves the method that it had kept on the instance."""
    model = lora_net(make())
    x = torch.randn(3, K, requires_grad=True)
    expected = model(x)
    dispatch(model)
    for moment in ("before patch", "after patch", "after unpatch"):
        if moment == removed:
            remove_hook_from_submodules(model)
        if moment == "before patch":
            peftkern.patch(model)
        elif moment == "after patch":
            peftkern.reset_stats()
            torch.testing.assert_close(model(x), expected)
            assert served_by_us() == 1 and fallbacks() == {}
            peftkern.unpatch(model)
    peftkern.reset_stats()
    torch.testing.assert_close(model(x), expected)
    assert served_by_us() == 0 and fallbacks() == {}
    peftkern.patch(model)
    model(x)
    assert served_by_us() == 1


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), None])
def test_hooks_that_move_nothing(make, device):
    model = lora_net(make(), lora_dropout=0.2)
    for name in ROLES:
        add_hook_to_module(role(model, name), AlignDevicesHook(device, io_same_device=True))
    add_hook_to_module(role(model, "lora_A"), AlignDevicesHook(device), append=True)
    assert type(role(model, "lora_A")._hf_hook) is SequentialHook
    twin = copy.deepcopy(model)
    assert peftkern.patch(twin).falling_back == {}
    x = torch.randn(3, K, requires_grad=True)
    outputs = []
    peftkern.reset_stats()
    for net in (model, twin):
        torch.manual_seed(0)
        outputs.append(net(x))
    torch.testing.assert_close(*outputs)
    assert served_by_us() == 1 and fallbacks() == {}


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("name", ROLES)
@pytest.mark.parametrize("append", [False, True])
def test_other_hooks_on_what_is_read(make, name, append):
    model = lora_net(make(), lora_dropout=0.2)
    add_hook_to_module(role(model, name), AlignDevicesHook("cpu"))
    add_hook_to_module(role(model, name), Tracer(), append=append)
    assert_falls_back(model, f"accelerate's hook on {name} is Tracer")


@pytest.mark.parametrize("name", ROLES)
def test_forward_replaced_over_a_hook(name):
    model = lora_net(make_linear(), lora_dropout=0.2)
    module = add_hook_to_module(role(model, name), AlignDevicesHook("cpu"))
    hooked = module.forward
    module.forward = lambda x: hooked(x) * 0.5
    peftkern.patch(model)
    peftkern.reset_stats()
    model(torch.randn(2, K))
    assert fallbacks() == {f"forward of {name} is replaced": 1}


@pytest.mark.parametrize(
    ("target", "device", "moves"),
    [
        (1, "cuda:1", False),
        ("cuda:1", "cuda:1", False),
        (torch.device("cuda:1"), "cuda:1", False),
        ("cuda", "cuda:1", False),
        (0, "cuda:1", True),
        ("cuda:0", "cuda:1", True),
        ("cpu", "cuda:0", True),
        (0, "cpu", True),
    ],
)
def test_device_of_an_input_and_of_a_hook(target, device, moves):
    """The maps of transformers and accelerate name GPUs by their index alone."""
    module = add_hook_to_module(nn.Identity(), AlignDevicesHook(target))
    reason = hooked(torch.device(device), base_layer=module)
    assert (reason is not None) is moves
    assert not moves or reason.startswith("accelerate's hook on base_layer moves its input to ")


def test_hook_that_moves_the_input_of_a_base():
    """To where its weight is: PEFT calls it, which on a meta device leads nowhere."""
    model = lora_net(make_linear())
    add_hook_to_module(role(model, "base_layer"), AlignDevicesHook("meta"))
    report = peftkern.patch(model)
    assert report.falling_back == {}  # an input on its device would be served
    peftkern.reset_stats()
    with pytest.raises(RuntimeError, match="device meta"):
        model(torch.randn(2, K))
    assert fallbacks() == {"accelerate's hook on base_layer moves its input to meta": 1}


@pytest.mark.parametrize("place", ["layer", "model"])
def test_hook_that_moves_the_input_of_the_layer(place):
    """It runs before our forward does, which finds everything on one device."""
    model = lora_net(make_linear())
    peftkern.patch(model)
    module = layer_of(model) if place == "layer" else model
    add_hook_to_module(module, AlignDevicesHook("meta", place_submodules=True))
    peftkern.reset_stats()
    y = model(torch.randn(2, K))
    assert y.device.type == "meta" and y.shape == (2, N)
    assert fallbacks() == {"no kernel for meta": 1}


def test_weights_that_the_hook_of_the_layer_loads():
    model = lora_net(make_linear())
    x = torch.randn(2, K, requires_grad=True)
    expected = model(x)
    peftkern.patch(model)
    kind = type(layer_of(model)).__name__
    attach_align_device_hook(model, "cpu", offload=True, preload_module_classes=[kind])
    assert layer_of(model).lora_A["default"].weight.is_meta
    peftkern.reset_stats()
    torch.testing.assert_close(model(x), expected)
    assert served_by_us() == 1 and fallbacks() == {}


def test_dora():
    model = dispatch(dora_net(make_linear4bit()))
    twin = copy.deepcopy(model)
    assert peftkern.patch(twin).falling_back == {}
    x = torch.randn(2, K, requires_grad=True)
    peftkern.reset_stats()
    torch.testing.assert_close(twin(x), model(x))
    assert norms_computed() == 1 and fallbacks() == {}


def test_adalora():
    settings = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    model = get_peft_model(tiny_llama(), AdaLoraConfig(init_r=4, total_step=50, **settings))
    fill_adapters(model)
    dispatch(model)
    before = hooks_of(model)
    expected = model(**text_batch()).loss
    report = peftkern.patch(model)
    assert len(report.patched) == 5 and report.skipped == report.falling_back == {}
    peftkern.reset_stats()
    torch.testing.assert_close(model(**text_batch()).loss, expected)
    assert served_by_us() == 4 and fallbacks() == {}
    assert peftkern.stats().calls["adalora_orthogonality_forward", "cpu"] == 1
    peftkern.unpatch(model)
    assert hooks_of(model) == before


def test_4bit_layer_without_an_adapter():
    net = nn.Sequential(make_linear4bit()).eval()
    dispatch(net)
    assert peftkern.patch(net).without_adapter == ["0"]
    codes = net[0].weight.data.clone()
    peftkern.reset_stats()
    with torch.no_grad():
        net(torch.randn(2, K))
    assert served_by_us() == 1 and torch.equal(net[0].weight.data, codes)


@pytest.mark.parametrize("make", [MAKERS[0], pytest.param(MAKERS[1], marks=pytest.mark.more)])
def test_compiled_with_hooks(make):
    model = dispatch(lora_net(make()))
    peftkern.patch(model)
    x = torch.randn(2, K, requires_grad=True)
    expected = model(x)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(x), expected)
