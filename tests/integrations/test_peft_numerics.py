"""The patched forward and backward against PEFT's, in every dtype combination that PEFT allows.

The bound is the library's: against a float64 model with the same weights, the patched layer is as
accurate as PEFT's own forward.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.helpers import disable_input_dtype_casting
from peft_models import (
    K,
    N,
    fallbacks,
    fill_adapters,
    layer_of,
    lora_net,
    make_conv1d,
    make_linear,
    make_linear4bit,
    patched_copy,
    served_by_us,
)
from peft_oracle import oracle_for, outputs_and_gradients, sample
from tolerances import assert_as_accurate_as_torch
from torch import Tensor, nn

import peftkern
from peftkern.layers import NF4Linear

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def assert_like_peft(
    model: nn.Module, x: Tensor, *, computes_in: torch.dtype, autocast: bool = False
) -> None:
    twin = patched_copy(model)
    oracle = outputs_and_gradients(oracle_for(model, computes_in), x.double(), False)
    eager = outputs_and_gradients(model, x, autocast)
    peftkern.reset_stats()
    got = outputs_and_gradients(twin, x, autocast)
    assert fallbacks() == {} and served_by_us() == 1
    assert got.keys() == eager.keys() == oracle.keys()
    for name in eager:
        assert_as_accurate_as_torch(got[name], eager[name], oracle[name])


VARIANTS = {
    "plain": {},
    "dropout": {"lora_dropout": 0.3},
    "lora_bias": {"lora_bias": True},
    "rank64": {"r": 64, "use_rslora": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"), [(F32, None), (BF16, None), (BF16, BF16), (F16, None)], ids=str
)
def test_dense_like_peft(dtype, adapter_dtype, variant):
    model = lora_net(make_linear(dtype), adapter_dtype=adapter_dtype, **VARIANTS[variant])
    assert layer_of(model).lora_A["default"].weight.dtype is (adapter_dtype or F32)
    assert_like_peft(model, sample(dtype), computes_in=dtype)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_conv1d_like_peft(dtype, variant):
    model = lora_net(make_conv1d(dtype), fan_in_fan_out=True, **VARIANTS[variant])
    assert_like_peft(model, sample(dtype), computes_in=dtype)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_no_bias_like_peft(dtype):
    assert_like_peft(lora_net(make_linear(dtype, bias=False)), sample(dtype), computes_in=dtype)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("x_dtype", "compute_dtype", "adapter_dtype"),
    [
        (F32, F32, F32),
        (BF16, BF16, F32),  # PEFT's default over a bfloat16 model
        (BF16, BF16, BF16),
        (F32, BF16, F32),  # after prepare_model_for_kbit_training
        (F16, F16, F32),
        (BF16, F32, F32),
        (BF16, None, F32),
        (F16, None, F32),
    ],
    ids=str,
)
def test_linear4bit_like_peft(x_dtype, compute_dtype, adapter_dtype, variant):
    base = make_linear4bit(x_dtype, compute_dtype=compute_dtype)
    model = lora_net(base, adapter_dtype=adapter_dtype, **VARIANTS[variant])
    assert_like_peft(model, sample(x_dtype), computes_in=compute_dtype or x_dtype)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_linear4bit_formats_like_peft(double_quant, bias):
    base = make_linear4bit(BF16, compute_dtype=BF16, double_quant=double_quant, bias=bias)
    assert_like_peft(lora_net(base), sample(BF16), computes_in=BF16)


@pytest.mark.parametrize("storage", [BF16, F16, F32], ids=str)
def test_linear4bit_quant_storage_like_peft(storage):
    base = make_linear4bit(F32, compute_dtype=F32, quant_storage=storage, bias=False)
    assert base.weight.dtype is storage
    assert_like_peft(lora_net(base, adapter_dtype=F32), sample(F32), computes_in=F32)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("dtype", "x_dtype"), [(F32, F32), (F32, BF16), (BF16, F32)], ids=str)
def test_autocast_dense_like_peft(dtype, x_dtype, variant):
    model = lora_net(make_linear(dtype), **VARIANTS[variant])
    assert_like_peft(model, sample(x_dtype), computes_in=BF16, autocast=True)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("x_dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("compute_dtype", [F32, BF16, None], ids=str)
def test_autocast_linear4bit_like_peft(compute_dtype, x_dtype, variant):
    base = make_linear4bit(F32, compute_dtype=compute_dtype)
    model = lora_net(base, adapter_dtype=F32, **VARIANTS[variant])
    assert_like_peft(model, sample(x_dtype), computes_in=BF16, autocast=True)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_lora_linear_over_our_nf4linear_like_peft(dtype):
    base = NF4Linear.from_linear(make_linear(dtype))
    assert_like_peft(lora_net(base, adapter_dtype=F32), sample(dtype), computes_in=dtype)


@pytest.mark.parametrize("make", [make_linear, make_linear4bit])
@pytest.mark.parametrize("shape", [(K,), (1, K), (2, 3, 4, K), (0, K), (7, 0, K)], ids=str)
def test_any_batch_shape_like_peft(make, shape):
    model = lora_net(make())
    twin = patched_copy(model)
    x = sample(F32, shape)
    got, expected = twin(x), model(x)
    assert got.shape == (*shape[:-1], N)
    torch.testing.assert_close(got, expected)


def add_second_adapter(model: nn.Module, active: list[str], **config: Any) -> None:
    settings = {"r": 7, "lora_alpha": 5, "target_modules": ["proj"], **config}
    model.add_adapter("second", LoraConfig(**settings))
    fill_adapters(model)
    model.base_model.set_adapter(active)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("active", [["default", "second"], ["second", "default"], ["second"]])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("make", [make_linear, make_linear4bit])
def test_several_active_adapters_like_peft(make, dtype, active, dropout):
    model = lora_net(make(dtype), adapter_dtype=F32, lora_dropout=dropout)
    add_second_adapter(model, active, lora_dropout=dropout / 2, lora_bias=True)
    for parameter in layer_of(model).lora_A.parameters():
        parameter.data = parameter.data.float()
    for parameter in layer_of(model).lora_B.parameters():
        parameter.data = parameter.data.float()
    assert_like_peft(model, sample(dtype), computes_in=dtype)


@pytest.mark.parametrize("make", [make_linear, make_linear4bit])
def test_scaling_as_a_tensor_and_changed_at_run_time(make):
    model = lora_net(make())
    twin = patched_copy(model)
    x = sample(F32)
    for scaling in (0.5, 2.0, torch.tensor(0.25), torch.tensor(-1.5)):
        for net in (model, twin):
            layer_of(net).scaling["default"] = scaling
        torch.testing.assert_close(twin(x), model(x))
        if isinstance(scaling, Tensor):  # hotswap writes into it
            expected = model(x)
            scaling.fill_(3.0)
            assert not torch.allclose(twin(x), expected)
            torch.testing.assert_close(twin(x), model(x))
    layer_of(model).scale_layer(0.5), layer_of(twin).scale_layer(0.5)
    torch.testing.assert_close(twin(x), model(x))


@pytest.mark.parametrize("make", [make_linear, make_linear4bit])
@pytest.mark.parametrize("frozen", ["lora_A", "lora_B"])
def test_frozen_half_of_the_adapter(make, frozen):
    model = lora_net(make(), lora_dropout=0.2)
    getattr(layer_of(model), frozen).requires_grad_(False)
    assert_like_peft(model, sample(F32), computes_in=F32)


def test_tied_adapters():
    model = lora_net(nn.Linear(K, K).requires_grad_(False))
    layer = layer_of(model)
    layer.lora_B["default"].weight = nn.Parameter(torch.randn(K, 4))
    tied = nn.Parameter(layer.lora_A["default"].weight.detach().clone())
    layer.lora_A["default"].weight = tied
    other = lora_net(nn.Linear(K, K).requires_grad_(False))
    layer_of(other).lora_A["default"].weight = tied
    both = nn.Sequential(model, other)
    twin, oracle = patched_copy(both), copy.deepcopy(both).double()
    grads = []
    for net in (twin, both, oracle):
        net(sample(next(net.parameters()).dtype)).square().sum().backward()
        shared = layer_of(net[0]).lora_A["default"].weight
        assert shared is layer_of(net[1]).lora_A["default"].weight
        grads.append(shared.grad)
    assert_as_accurate_as_torch(*grads)


def test_disabled_input_casting_like_peft():
    """Without its cast PEFT fails on float32 adapters over bfloat16; so does a patched layer."""
    x = sample(BF16)
    for make in (make_linear, make_linear4bit):
        model = lora_net(make(BF16), adapter_dtype=F32)
        twin = patched_copy(model)
        for net in (model, twin):
            with disable_input_dtype_casting(net), pytest.raises(RuntimeError, match="dtype"):
                net(x)
    same = lora_net(make_linear(BF16), adapter_dtype=BF16)
    twin = patched_copy(same)
    with disable_input_dtype_casting(twin):
        assert_close_bf16(twin(x), same(x))
    model = lora_net(make_linear(F32))
    twin = patched_copy(model)
    with disable_input_dtype_casting(twin), torch.autocast("cpu", BF16):
        assert_close_bf16(twin(x), model(x))


def assert_close_bf16(got: Tensor, expected: Tensor) -> None:
    assert got.dtype is expected.dtype is BF16
    torch.testing.assert_close(got, expected, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("double_quant", [True, False])
def test_compute_dtype_is_chosen_by_the_first_input_as_in_bitsandbytes(double_quant, caplog):
    model = lora_net(make_linear4bit(F32, double_quant=double_quant), adapter_dtype=F32)
    twin = patched_copy(model)
    base, twin_base = layer_of(model).base_layer, layer_of(twin).base_layer
    for dtype in (F16, BF16, F32):  # float16 decides nothing; it warns, once
        caplog.clear()
        expected = model(sample(dtype))
        warned = [r.message for r in caplog.records]
        caplog.clear()
        got = twin(sample(dtype))
        assert [r.message for r in caplog.records] == warned
        assert got.dtype is expected.dtype is dtype
        assert twin_base.compute_dtype is base.compute_dtype
        assert twin_base.compute_type_is_set == base.compute_type_is_set


def test_a_4bit_bias_keeps_its_dtype():
    """bitsandbytes casts the stored bias to its compute dtype for good; patched layers do not."""
    model = lora_net(make_linear4bit(F32, compute_dtype=BF16), adapter_dtype=F32)
    twin = patched_copy(model)
    twin(sample(F32))
    assert layer_of(twin).base_layer.bias.dtype is F32


def test_a_trained_base_bias_gets_its_gradient():
    model = lora_net(make_linear(), bias="all")
    assert layer_of(model).base_layer.bias.requires_grad
    twin = patched_copy(model)
    x = sample(F32)
    for net in (model, twin):
        net(x).square().sum().backward()
    got, expected = layer_of(twin).base_layer.bias.grad, layer_of(model).base_layer.bias.grad
    torch.testing.assert_close(got, expected)
