"""BlockLinear, and NF4Linear in FP4: values, state dicts, casts, and adapters over them."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from block_weights import random_weight_of
from nf4_weights import assert_same_bits
from torch import nn

import peftkern
from peftkern.formats.block_weight import NAMES
from peftkern.layers import BlockLinear, NF4Linear
from peftkern.methods import DoRALinear

N, K = 24, 128
FORMATS = [*NAMES, "fp4"]
QUANTIZERS = {
    "mxfp4": peftkern.quantize_mxfp4,
    "nvfp4": peftkern.quantize_nvfp4,
    "int4": lambda w: peftkern.quantize_int4(w, blocksize=32),
    "fp4": peftkern.quantize_fp4,
}


def make(name: str, linear: nn.Linear | None = None) -> BlockLinear | NF4Linear:
    linear = nn.Linear(K, N) if linear is None else linear
    if name == "fp4":
        return NF4Linear.from_linear(linear, quant_type="fp4")
    options = {"blocksize": 32} if name == "int4" else {}
    return BlockLinear.from_linear(linear, format=name, **options)


@pytest.mark.parametrize("name", FORMATS)
def test_values_and_gradient_are_those_of_the_quantized_weight(name):
    linear = nn.Linear(K, N)
    layer = make(name, linear)
    dense = peftkern.dequantize(QUANTIZERS[name](linear.weight))
    assert_same_bits(layer.dequantize(), dense)
    x = torch.randn(5, K, requires_grad=True)
    twin = layer.to_linear()
    results = [(y, *torch.autograd.grad(y.sum(), x)) for y in (layer(x), twin(x))]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert not any(p.requires_grad for p in layer.parameters())
    assert name in repr(layer) and layer.weight.dtype is torch.uint8


@pytest.mark.parametrize("name", FORMATS)
def test_state_dict_goes_round_and_a_dense_one_is_quantized(name):
    layer, other = make(name), make(name)
    state = layer.state_dict()
    assert other.load_state_dict(state).missing_keys == []
    for key, value in other.state_dict().items():
        assert_same_bits(value, state[key])
        assert value.data_ptr() != state[key].data_ptr()
    linear = nn.Linear(K, N)
    other.load_state_dict(linear.state_dict())
    assert_same_bits(other.dequantize(), peftkern.dequantize(QUANTIZERS[name](linear.weight)))
    assert_same_bits(copy.deepcopy(layer).dequantize(), layer.dequantize())


@pytest.mark.parametrize("name", FORMATS)
def test_casts_leave_the_weight_alone(name):
    layer = make(name)
    before = layer.dequantize()
    layer.to(torch.bfloat16).half()
    assert layer.bias.dtype is torch.float16
    assert_same_bits(layer.dequantize(), before)
    assert layer.to("meta").quantized_weight.device.type == "meta"


@pytest.mark.parametrize("name", FORMATS)
def test_an_adapter_trains_over_it_and_merges(name):
    layer = DoRALinear(make(name), r=4)
    nn.init.normal_(layer.lora_B, std=0.1)
    x = torch.randn(5, K)
    y = layer(x)
    y.sum().backward()
    assert layer.lora_A.grad.abs().sum() > 0 and layer.lora_B.grad.abs().sum() > 0
    torch.testing.assert_close(layer.merge()(x), y, rtol=1e-4, atol=1e-4)


def test_a_layer_is_made_of_a_weight_as_it_is():
    w = random_weight_of("mxfp4", (N, K))
    layer = BlockLinear.from_weight(w, torch.ones(N))
    assert layer.quantized_weight.scale.data_ptr() == w.scale.data_ptr()
    torch.testing.assert_close(layer(torch.zeros(1, K)), torch.ones(1, N))
    for call, text in (
        (lambda: BlockLinear.from_weight(random_weight_of("mxfp4", (64,))), "weight: expected"),
        (lambda: BlockLinear.from_weight(w, torch.ones(3)), r"bias: expected \[24\], got \[3\]"),
        (lambda: BlockLinear(K, N, format="fp4"), "format: expected one of"),
        (
            lambda: BlockLinear(K, N, blocksize=64),
            "blocksize: expected 32 in mxfp4, got 64",
        ),
        (lambda: BlockLinear(100, N), "weight: expected .* multiple of 32"),
        (lambda: NF4Linear(K, N, quant_type="af4"), "quant_type: expected 'nf4' or 'fp4'"),
    ):
        with pytest.raises(ValueError, match="^" + text):
            call()


def test_a_state_dict_of_another_format_is_refused_by_name():
    layer = make("nvfp4")
    for state, text in (
        (make("mxfp4").state_dict(), r"weight.tensor_scale: missing from the state dict"),
        (make("int4").state_dict(), r"weight.tensor_scale: missing from"),
        ({**layer.state_dict(), "weight.zero": torch.zeros(1)}, "zero: expected None in nvfp4"),
        ({**layer.state_dict(), "weight.scale": torch.zeros(3)}, "scale: expected a torch.uint8"),
    ):
        with pytest.raises(RuntimeError, match=text):
            layer.load_state_dict(state)


def test_one_graph_without_a_warning():
    layer = make("mxfp4")
    x = torch.randn(3, layer.in_features, requires_grad=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Dynamo detected a call to a `functools")
        y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(y, layer(x))


def test_a_layer_that_was_pickled_before_there_was_fp4():
    layer, dense = NF4Linear(K, N), nn.Linear(K, N)
    del layer._quant["quant_type"]
    assert layer.nf4.quant_type == layer.quant_type == "nf4" and "fp4" not in repr(layer)
    layer.load_state_dict(dense.state_dict())
    assert torch.equal(layer.weight, NF4Linear.from_linear(dense).weight)
