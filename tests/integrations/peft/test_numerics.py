"""The patched forward and backward against PEFT's, in every dtype combination that PEFT allows.

The bound is the library's: against a float64 model with the same weights, the patched layer is as
accurate as PEFT's own forward.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
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
)
from peft_oracle import (
    assert_like_peft,
    dora_net,
    norms_computed,
    outputs_and_gradients,
    sample,
    stretch_magnitudes,
)
from tolerances import assert_as_accurate_as_torch
from torch import Tensor, nn

import peftkern
from peftkern.layers import NF4Linear

pytestmark = pytest.mark.usefixtures("form_the_product_again")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

VARIANTS = {
    "plain": {},
    "dropout": {"lora_dropout": 0.3},
    "lora_bias": {"lora_bias": True},
    "rank64": {"r": 64, "use_rslora": True},
    "DoRA": {"use_dora": True},
    "DoRA, dropout": {"use_dora": True, "lora_dropout": 0.3},
    "DoRA, rank64": {"use_dora": True, "r": 64, "use_rslora": True},
}
MAKERS = [make_linear, make_linear4bit]
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def net_of(variant: str, base: nn.Module, **config: Any) -> PeftModel:
    config = {**VARIANTS[variant], **config}
    return (dora_net if config.pop("use_dora", False) else lora_net)(base, **config)


@every_variant
@pytest.mark.parametrize(
    ("dtype", "adapter_dtype", "bias"),
    [(F32, None, True), (BF16, None, False), (BF16, BF16, True), (F16, None, False)],
    ids=str,
)
def test_dense_like_peft(dtype, adapter_dtype, bias, variant):
    model = net_of(variant, make_linear(dtype, bias), adapter_dtype=adapter_dtype)
    assert layer_of(model).lora_A["default"].weight.dtype is (adapter_dtype or F32)
    assert_like_peft(model, sample(dtype), computes_in=dtype)


@pytest.mark.parametrize("variant", ["plain", "dropout", "lora_bias", "rank64"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_conv1d_like_peft(dtype, variant):
    model = net_of(variant, make_conv1d(dtype), fan_in_fan_out=True)
    assert_like_peft(model, sample(dtype), computes_in=dtype)


@every_variant
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
    model = net_of(variant, base, adapter_dtype=adapter_dtype)
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


@every_variant
@pytest.mark.parametrize(("dtype", "x_dtype"), [(F32, F32), (F32, BF16), (BF16, F32)], ids=str)
def test_autocast_dense_like_peft(dtype, x_dtype, variant):
    model = net_of(variant, make_linear(dtype))
    assert_like_peft(model, sample(x_dtype), computes_in=BF16, autocast=True)


@pytest.mark.parametrize(
    ("x_dtype", "compute_dtype", "variant"),
    [
        *itertools.product([F32], [F32, BF16], ["plain", "dropout", "lora_bias", "rank64"]),
        *itertools.product([BF16], [F32, None], ["plain", "dropout", "lora_bias", "rank64"]),
        *itertools.product([F32, BF16], [None], ["DoRA", "DoRA, dropout"]),
    ],
    ids=str,
)
def test_autocast_linear4bit_like_peft(compute_dtype, x_dtype, variant):
    model = net_of(variant, make_linear4bit(F32, compute_dtype=compute_dtype), adapter_dtype=F32)
    assert_like_peft(model, sample(x_dtype), computes_in=BF16, autocast=True)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_lora_linear_over_our_nf4linear_like_peft(dtype):
    base = NF4Linear.from_linear(make_linear(dtype))
    assert_like_peft(lora_net(base, adapter_dtype=F32), sample(dtype), computes_in=dtype)


@pytest.mark.parametrize("make", MAKERS)
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


BOTH, TURNED, SECOND = ["default", "second"], ["second", "default"], ["second"]


@pytest.mark.parametrize(
    ("dtype", "active", "dropout"),
    [
        *((F32, BOTH, 0.3), (F32, TURNED, 0.0), (F32, SECOND, 0.3)),
        *((BF16, BOTH, 0.0), (BF16, TURNED, 0.3), (BF16, SECOND, 0.0)),
    ],
    ids=str,
)
@pytest.mark.parametrize("make", MAKERS)
def test_several_active_adapters_like_peft(make, dtype, active, dropout):
    model = lora_net(make(dtype), adapter_dtype=F32, lora_dropout=dropout)
    add_second_adapter(model, active, lora_dropout=dropout / 2, lora_bias=True)
    for factor in (layer_of(model).lora_A, layer_of(model).lora_B):
        for parameter in factor.parameters():
            parameter.data = parameter.data.float()
    assert_like_peft(model, sample(dtype), computes_in=dtype)


@pytest.mark.parametrize(
    ("active", "second_dora", "dropout"),
    [
        *((BOTH, True, 0.3), (BOTH, False, 0.0), (TURNED, True, 0.0), (TURNED, False, 0.3)),
        *((SECOND, True, 0.3), (SECOND, False, 0.0)),
    ],
)
@pytest.mark.parametrize("make", MAKERS)
def test_several_adapters_beside_dora_like_peft(make, active, second_dora, dropout):
    model = dora_net(make(), adapter_dtype=F32, lora_dropout=dropout)
    add_second_adapter(model, active, use_dora=second_dora, lora_dropout=dropout / 2)
    stretch_magnitudes(model)
    twin, x = patched_copy(model), sample(F32)
    expected = outputs_and_gradients(model, x, False)
    peftkern.reset_stats()
    got = outputs_and_gradients(twin, x, False)
    assert fallbacks() == {}
    assert norms_computed() == ("default" in active) + ("second" in active and second_dora)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "variant"), [(make_linear, "plain"), (make_linear4bit, "plain"), (make_linear, "DoRA")]
)
def test_scaling_as_a_tensor_and_changed_at_run_time(make, variant):
    model = net_of(variant, make())
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


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(
    ("variant", "frozen"),
    [
        *(("dropout", "lora_A"), ("dropout", "lora_B"), ("DoRA, dropout", "lora_A")),
        *(("DoRA, dropout", "lora_B"), ("DoRA, dropout", "lora_magnitude_vector")),
    ],
)
def test_frozen_part_of_the_adapter(make, variant, frozen):
    model = net_of(variant, make())
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


@pytest.mark.parametrize("variant", ["plain", "DoRA"])
def test_a_trained_base_bias_gets_its_gradient(variant):
    model = net_of(variant, make_linear(), bias="all")
    assert layer_of(model).base_layer.bias.requires_grad
    twin = patched_copy(model)
    x = sample(F32)
    for net in (model, twin):
        net(x).square().sum().backward()
    got, expected = layer_of(twin).base_layer.bias.grad, layer_of(model).base_layer.bias.grad
    torch.testing.assert_close(got, expected)
