"""Patched layers whose weights other libraries' fused kernels read are named, and no others."""

from __future__ import annotations

import copy
import functools
import pickle
import types
import warnings

import pytest
import torch
import torch._dynamo.utils
from peft_models import K, add_lora, layer_of, lora_net, make_linear, text_batch, tiny_llama
from torch import Tensor, nn

import peftkern


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    """After any compilation in the process the general warning stays away."""
    torch._dynamo.utils.counters.clear()


NOBODY = r"none of the \d+ layers that peftkern has patched was called in a forward pass"


def get_lora_parameters(proj: nn.Module) -> tuple[Tensor, Tensor, Tensor, float]:
    """Axolotl's and Unsloth's have this name, and take a layer to pieces like this."""
    name = proj.active_adapter[0]
    A, B = proj.lora_A[name].weight, proj.lora_B[name].weight
    return proj.base_layer.weight, A, B, proj.scaling[name]


def fused(x: Tensor, W: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    return x @ W.T + s * (x @ A.T @ B.T)


def apply_lora_mlp_swiglu(self: nn.Module, x: Tensor) -> Tensor:
    gate = fused(x, *get_lora_parameters(self.gate_proj))
    up = fused(x, *get_lora_parameters(self.up_proj))
    return fused(nn.functional.silu(gate) * up, *get_lora_parameters(self.down_proj))


def apply_lora_o(self: nn.Module, x: Tensor) -> Tensor:
    return fused(x, *get_lora_parameters(self.o_proj))


def liger_mlp(self: nn.Module, x: Tensor) -> Tensor:
    """On an instance as well, but it calls the layers."""
    return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


def fuse_mlp(model: nn.Module, function=apply_lora_mlp_swiglu) -> None:
    for layer in model.base_model.model.model.layers:
        layer.mlp.forward = types.MethodType(function, layer.mlp)


@pytest.mark.parametrize("first", ["the kernels", "peftkern"])
def test_layers_that_fused_kernels_read_are_named(first):
    """Whichever comes first: a Trainer's callback patches again when training begins."""
    model = add_lora(tiny_llama())
    if first == "peftkern":
        assert peftkern.patch(model).bypassed == {}
    fuse_mlp(model)
    with pytest.warns(UserWarning, match="6 of the patched layers are never called") as caught:
        report = peftkern.patch(model)
    assert caught[0].filename == __file__
    named = {name for name in report.patched if ".mlp." in name}
    assert set(report.bypassed) == named and len(named) == 6
    by = f"{__name__}.apply_lora_mlp_swiglu"
    assert set(report.bypassed.values()) == {by} and f"their weights: {by} 6" in str(report)
    assert report.as_dict()["bypassed"] == report.bypassed
    peftkern.reset_stats()
    model(**text_batch())
    assert peftkern.stats().calls["lora_linear_forward", "cpu"] == 8
    with pytest.raises(ValueError, match=r"strict: 6 .* reads past it"):
        peftkern.patch(model, strict=True, dry_run=True)


def test_of_an_attention_only_what_is_read_is_named():
    model = add_lora(tiny_llama())
    for layer in model.base_model.model.model.layers:
        layer.self_attn.apply_o = types.MethodType(apply_lora_o, layer.self_attn)
    with pytest.warns(UserWarning, match="2 of the patched layers"):
        report = peftkern.patch(model)
    assert all(name.endswith("o_proj") for name in report.bypassed)


def test_replaced_methods_that_call_the_layers_are_none():
    model = add_lora(tiny_llama())
    fuse_mlp(model, liger_mlp)
    model.tie = functools.partial(liger_mlp, model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert peftkern.patch(model).bypassed == {}
        model(**text_batch())


class Past(nn.Module):
    """Reads the weights of its layer in a way that nobody knows of."""

    def __init__(self, calls: bool = False) -> None:
        super().__init__()
        self.net, self.calls = lora_net(make_linear()), calls

    def forward(self, x: Tensor) -> Tensor:
        layer = layer_of(self.net)
        return layer(x) if self.calls else layer.base_layer(x)


def test_a_forward_pass_that_calls_no_layer_is_told_once():
    model = Past()
    peftkern.patch(model)
    with pytest.warns(UserWarning, match=NOBODY):
        model(torch.randn(2, K))
    assert_silent(model)
    peftkern.patch(model)
    with pytest.warns(UserWarning, match=NOBODY):
        model(torch.randn(2, K))


def assert_silent(model: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(2, K))
    assert not model._forward_hooks


@pytest.mark.parametrize("forced", [None, "reset"])
def test_a_layer_that_is_called_is_no_reason_for_a_word(forced):
    model = Past(calls=True)
    model(torch.randn(2, K))
    peftkern.patch(model)
    if forced == "reset":
        peftkern.reset_stats()
    assert_silent(model)


def test_a_layer_that_falls_back_is_called():
    model = Past(calls=True)
    layer_of(model.net).base_layer.register_forward_hook(lambda *args: None)
    assert peftkern.patch(model).falling_back
    assert_silent(model)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_unpatched_models_lose_the_hook(copied):
    model = Past()
    peftkern.patch(model)
    twin = copied(model)
    with pytest.warns(UserWarning, match=NOBODY):
        twin(torch.randn(2, K))
    assert not twin._forward_hooks and len(model._forward_hooks) == 1
    peftkern.unpatch(model)
    assert_silent(model)


def test_a_compiled_model_is_left_in_peace():
    """In a graph nothing is counted, and the hook adds nothing to it."""
    torch._dynamo.reset()
    model = lora_net(make_linear())
    peftkern.patch(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        x = torch.randn(2, K)
        torch.testing.assert_close(compiled(x), model(x))
        past = Past()  # in whose graphs there might be layers, for all that is known now
        peftkern.patch(past)
        past(x)
