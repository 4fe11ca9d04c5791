"""peftkern.patch over PEFT's DoRA, where it has ways of its own: norms of rows, and lengths."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig
from peft.helpers import DoraCaching
from peft_models import (
    K,
    add_lora,
    fallbacks,
    layer_of,
    make_linear,
    make_linear4bit,
    patched_copy,
    text_batch,
    tiny_llama,
)
from peft_oracle import dora_net, norms_computed, outputs_and_gradients, sample
from tolerances import BF16_LOSS_RTOL, LOSS_CURVE_RTOL, errors
from torch import nn
from torch.utils.checkpoint import checkpoint

import peftkern
from peftkern.backends import device
from peftkern.backends.cpu import crossovers
from peftkern.layers import NF4Linear

pytestmark = pytest.mark.usefixtures("form_the_product_again")
SMALL = "small dense product: PEFT's own operations are as fast"
F32, BF16 = torch.float32, torch.bfloat16
MAKERS = [make_linear, make_linear4bit]


def test_our_nf4linear_under_dora():
    """A base that PEFT cannot dequantize: the adapter is made over the dense layer."""
    model = dora_net(make_linear())
    layer = layer_of(model)
    layer.base_layer = NF4Linear.from_linear(layer.base_layer)
    dense = copy.deepcopy(model)
    layer_of(dense).base_layer = layer.base_layer.to_linear()
    layer_of(dense).base_layer.requires_grad_(False)
    peftkern.patch(model)
    got, expected = (outputs_and_gradients(net, sample(F32), False) for net in (model, dense))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", MAKERS)
def test_dropout_only_where_peft_drops(make):
    """DoRA asks the layer whether it trains, and the dropout module whether it drops."""
    model = dora_net(make(), lora_dropout=0.5)
    twin, x = patched_copy(model), sample(F32).requires_grad_()
    for layer_trains in (True, False):
        for dropout_trains in (True, False):
            for net in (model, twin):
                layer_of(net).train(layer_trains)
                layer_of(net).lora_dropout.train(dropout_trains)
            torch.manual_seed(3)
            expected = model(x)
            torch.manual_seed(3)
            torch.testing.assert_close(twin(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("second", [False, True])
def test_a_vector_becomes_a_row(make, second):
    """PEFT's magnitude is one."""
    model = dora_net(make())
    if second:
        model.add_adapter("second", LoraConfig(r=3, target_modules=["proj"], use_dora=True))
        model.base_model.set_adapter(["default", "second"])
    twin, x = patched_copy(model), torch.randn(K, requires_grad=True)
    got, expected = twin(x), model(x)
    assert got.shape == expected.shape == (1, layer_of(model).out_features)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    weights = torch.randn_like(got)
    grads = [torch.autograd.grad((y * weights).sum(), x)[0] for y in (got, expected)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
    assert not fallbacks()


def test_small_layers_are_left_to_peft(monkeypatch):
    model = dora_net(make_linear())
    layer = layer_of(model)
    smallest = layer.in_features * layer.out_features
    for minimum, reasons in ((smallest, {}), (smallest + 1, {SMALL: 1})):
        monkeypatch.setattr(crossovers, "crossover", lambda _, size=minimum: size)
        peftkern.patch(model)
        peftkern.reset_stats()
        model(sample(F32))
        assert fallbacks() == reasons and norms_computed() == (not reasons)


@pytest.mark.parametrize("paid", [True, False])
def test_small_layers_train_where_torch_has_no_products(paid, monkeypatch):
    model, x = dora_net(make_linear()).train(), sample(F32)
    multiply_adds = x.numel() * layer_of(model).out_features
    monkeypatch.setattr(crossovers, "crossover", lambda _: 1 << 62)
    monkeypatch.setitem(device._PRODUCTS, F32, False)
    monkeypatch.setitem(crossovers.WITHOUT_PRODUCTS, "dora", multiply_adds + (not paid))
    assert not peftkern.patch(model).small
    peftkern.reset_stats()
    model(x)
    assert fallbacks() == ({} if paid else {SMALL: 1}) and norms_computed() == paid


@pytest.mark.parametrize("make", MAKERS)
def test_norms_that_peft_caches(make):
    """PEFT's cache serves dense layers, and holds no norms of factors from before it was off."""
    model = dora_net(make()).eval()
    twin, x = patched_copy(model), sample(F32).requires_grad_()  # or bitsandbytes computes in bf16
    for caching, changes in ((True, False), (False, True), (True, False)):
        peftkern.reset_stats()
        for net in (model, twin):
            layer_of(net).lora_B["default"].weight.data.add_(float(changes))
        with DoraCaching(enabled=caching):
            expected = model(x)
            torch.testing.assert_close(twin(x), expected, rtol=1e-4, atol=1e-4)
        left_to_peft = caching and make is make_linear
        assert fallbacks() == ({"DoRA's norms are cached": 1} if left_to_peft else {})
        assert norms_computed() == (not left_to_peft)


@pytest.mark.parametrize(
    ("dtype", "rtol", "dropout"), [(F32, LOSS_CURVE_RTOL, 0.1), (BF16, BF16_LOSS_RTOL, 0.0)]
)
def test_training_run_is_the_same(dtype, rtol, dropout):
    model = add_lora(tiny_llama(dtype), use_dora=True, lora_dropout=dropout)
    twin = patched_copy(model)
    assert not peftkern.patch(twin).falling_back
    peftkern.reset_stats()
    losses = []
    for net in (model, twin):
        torch.manual_seed(0)
        optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=5e-3)
        curve = []
        for _ in range(20 if dtype is F32 else 5):
            loss = net(**text_batch()).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(loss.item())
        losses.append(curve)
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=rtol, atol=0)
    assert norms_computed() == 14 * len(losses[0]) and fallbacks() == {}
    if dtype is F32:
        assert losses[0][-1] < 0.95 * losses[0][0], "the model has to learn something"
        for (name, got), expected in zip(twin.named_parameters(), model.parameters(), strict=True):
            if "magnitude" in name:
                assert errors(got, expected)[0] <= LOSS_CURVE_RTOL


@pytest.mark.parametrize("make", MAKERS)
def test_a_base_weight_that_changes_is_seen(make):
    model = dora_net(make())
    twin, x = patched_copy(model), sample(F32).requires_grad_()
    before = twin(x)
    torch.manual_seed(77)
    dense = nn.Linear(K, 96).requires_grad_(False)
    for net in (model, twin):
        base = layer_of(net).base_layer
        if make is make_linear:
            base.weight.data.copy_(dense.weight)
        else:
            base.weight.quant_state.absmax = base.weight.quant_state.absmax.flip(0).contiguous()
    torch.testing.assert_close(twin(x), model(x))
    assert not torch.allclose(twin(x), before)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    model = dora_net(make_linear(), lora_dropout=0.3)
    peftkern.patch(model)
    plain = outputs_and_gradients(model, sample(F32), False)
    forward = model.forward
    model.forward = lambda x: checkpoint(forward, x, use_reentrant=reentrant)
    replayed = outputs_and_gradients(model, sample(F32), False)
    assert plain.keys() == replayed.keys()
    assert all(torch.equal(replayed[name], plain[name]) for name in plain)
