"""PEFT over `BlockLinear`: MXFP4, NVFP4 and INT4 bases under `patch`, merged and back."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from peft_models import (
    K,
    Net,
    fallbacks,
    layer_of,
    lora_net,
    make_linear,
    served_by_us,
    step_and_frozen,
)
from torch import nn

import peftkern
from peftkern.layers import BlockLinear, NF4Linear

FORMATS = ["mxfp4", "nvfp4", "int4"]


def quantized(format: str) -> nn.Module:
    if format == "nf4":
        return NF4Linear.from_linear(make_linear())
    blocksize = 32 if format == "int4" else None
    return BlockLinear.from_linear(make_linear(), format=format, blocksize=blocksize)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("use_dora", [False, True])
def test_as_over_its_dense_weight(format, use_dora):
    model = lora_net(quantized(format), use_dora=use_dora)
    dense = copy.deepcopy(model)
    layer_of(dense).base_layer = layer_of(dense).base_layer.to_linear().requires_grad_(False)
    assert peftkern.patch(model).falling_back == {}
    peftkern.reset_stats()
    got, expected = step_and_frozen(model), step_and_frozen(dense)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert served_by_us() == 2 and fallbacks() == {}


def adalora_net(base: nn.Module) -> nn.Module:
    config = AdaLoraConfig(init_r=4, total_step=9, target_modules=["proj"])
    model = get_peft_model(Net(base), config)
    nn.init.normal_(layer_of(model).lora_E["default"], std=50.0)  # of factors of 0.02
    return model


@pytest.mark.parametrize("make", [lora_net, adalora_net])
@pytest.mark.parametrize("format", [*FORMATS, "nf4"])
def test_unmerging_gives_the_bytes_back(format, make):
    model = make(quantized(format))
    peftkern.patch(model)
    base = layer_of(model).base_layer
    before, x = [t.clone() for t in base.quantized_weight.tensors], torch.randn(3, K)
    expected = model(x)
    with pytest.warns(UserWarning, match=f"quantized to {format.upper()} again"):
        model.merge_adapter()
    assert not torch.equal(base.weight.view(-1), before[0])
    assert (model(x) - expected).norm() < 0.2 * expected.norm()
    model.unmerge_adapter()
    assert all(map(torch.equal, base.quantized_weight.tensors, before))
    assert torch.equal(model(x), expected) and isinstance(base, nn.Linear)
