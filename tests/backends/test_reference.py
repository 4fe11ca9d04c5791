"""The oracle: held to gradcheck, to autograd, and to what PEFT and bitsandbytes computed."""

from __future__ import annotations

import json

import pytest
import torch
from nf4_weights import random_weight
from paths import GOLDEN
from safetensors import safe_open
from safetensors.torch import load_file
from tolerances import FLOOR_RMS, GOLDEN_RTOL, GRADCHECK, NF4_MAX_HALF_GAP, errors
from torch import Tensor

from peftkern.backends import reference
from peftkern.formats.nf4 import NF4Weight

F32, F64 = torch.float32, torch.float64


def nf4_weight(shape: tuple[int, int]) -> NF4Weight:
    packed, absmax = reference.nf4_quantize(random_weight(shape), 32)
    return NF4Weight(packed, absmax, shape, 32, torch.float32)


class Differentiable(torch.autograd.Function):
    """The reference forward with the reference backward, so that gradcheck compares the two."""

    @staticmethod
    def forward(ctx, x, lora_A, lora_B, bias, weight, keep, dropout_p, scaling):
        call, state = reference.lora_linear_forward, (weight,)
        if isinstance(weight, NF4Weight):
            call, state = reference.nf4_lora_linear_forward, (weight.tensors, weight.layout)
        y, S = call(x, *state, lora_A, lora_B, bias, scaling, keep, dropout_p)
        ctx.save_for_backward(x, S, lora_A, lora_B)
        ctx.rest = weight, state, keep, dropout_p, scaling
        return y

    @staticmethod
    def backward(ctx, dy):
        x, S, lora_A, lora_B = ctx.saved_tensors
        weight, state, keep, dropout_p, scaling = ctx.rest
        call = reference.lora_linear_backward
        if isinstance(weight, NF4Weight):
            call = reference.nf4_lora_linear_backward
        needs = list(ctx.needs_input_grad[:4])
        grads = call(dy, x, S, *state, lora_A, lora_B, scaling, keep, dropout_p, needs)
        kept = (grad if need else None for grad, need in zip(grads, needs, strict=True))
        return *kept, None, None, None, None


@pytest.mark.parametrize("frozen", [(), ("x",), ("lora_A",), ("lora_B",), ("x", "lora_A")], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("nf4", [False, True])
def test_backward_passes_gradcheck(nf4, dropout_p, frozen):
    K, N, r = 9, 7, 3
    leaves = {
        "x": torch.randn(2, 5, K, dtype=F64),
        "lora_A": torch.randn(r, K, dtype=F64),
        "lora_B": torch.randn(N, r, dtype=F64),
        "bias": torch.randn(N, dtype=F64),
    }
    for name, leaf in leaves.items():
        leaf.requires_grad_(name not in frozen)
    weight = nf4_weight((N, K)) if nf4 else torch.randn(N, K, dtype=F64)
    keep = torch.rand(2, 5, K) >= dropout_p if dropout_p else None
    arguments = (*leaves.values(), weight, keep, dropout_p, 0.7)
    assert torch.autograd.gradcheck(Differentiable.apply, arguments, **GRADCHECK)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_backward_without_adapters_is_that_of_linear(dropout_p):
    x = torch.randn(4, 9, dtype=F64, requires_grad=True)
    weight, bias = torch.randn(7, 9, dtype=F64), torch.randn(7, dtype=F64, requires_grad=True)
    dy = torch.randn(4, 7, dtype=F64)
    y, S = reference.lora_linear_forward(x, weight, None, None, bias, 1.0, None, dropout_p)
    assert torch.equal(y, torch.nn.functional.linear(x, weight, bias)) and S.numel() == 0
    expected = torch.autograd.grad(y, (x, bias), dy)
    dx, dA, dB, dbias = reference.lora_linear_backward(
        dy, None, None, weight, None, None, 1.0, None, dropout_p, [True, False, False, True]
    )
    assert errors(dx, expected[0])[0] <= FLOOR_RMS[F64]
    assert errors(dbias, expected[1])[0] <= FLOOR_RMS[F64]
    assert dA.numel() == dB.numel() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_is_that_of_torch_bit_for_bit(dtype):
    x = torch.randn(33, 65).to(dtype)
    for p in (0.1, 0.5, 1.0):
        torch.manual_seed(3)
        expected = torch.nn.functional.dropout(x.float(), p)
        torch.manual_seed(3)
        keep = torch.empty_like(x, dtype=torch.float32).bernoulli_(1 - p).bool()
        assert torch.equal(reference.dropped(x, keep, p, torch.float32), expected)


def test_empty_batch_gives_empty_results():
    w = nf4_weight((6, 8))
    x, dy = torch.zeros(0, 3, 8), torch.zeros(0, 3, 6)
    lora_A, lora_B = torch.randn(2, 8), torch.randn(6, 2)
    y, S = reference.nf4_lora_linear_forward(
        x, w.tensors, w.layout, lora_A, lora_B, None, 1.0, None, 0.0
    )
    assert y.shape == (0, 3, 6) and S.shape == (0, 3, 2)
    dx, dA, dB, dbias = reference.nf4_lora_linear_backward(
        dy, x, S, w.tensors, w.layout, lora_A, lora_B, 1.0, None, 0.0, [True] * 4
    )
    assert dx.shape == x.shape
    for grad, like in ((dA, lora_A), (dB, lora_B), (dbias, torch.zeros(6))):
        assert torch.equal(grad, torch.zeros_like(like))


def golden_cases(name: str) -> list[tuple[str, int, dict]]:
    with safe_open(GOLDEN / name, "pt") as file:
        cases = json.loads(file.metadata()["cases"])
    return [(name, index, case) for index, case in enumerate(cases)]


def assert_near(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert got.shape == expected.shape and got.dtype == expected.dtype
    rtol = GOLDEN_RTOL[dtype]
    bound = rtol * expected.abs().max().item()
    torch.testing.assert_close(got, expected, rtol=rtol, atol=bound)


@pytest.mark.parametrize(
    ("name", "index", "case"),
    golden_cases("lora_linear.safetensors") + golden_cases("nf4_lora_linear.safetensors"),
    ids=lambda value: str(value)[:70],
)
def test_golden_peft_layer_is_reproduced(name, index, case):
    data = load_file(GOLDEN / name)
    at = {key.removeprefix(f"{index}."): data[key] for key in data if key.startswith(f"{index}.")}
    dtype = getattr(torch, case["dtype"])
    keep = at["keep"] if case["dropout_p"] else None
    scaling = case["lora_alpha"] / case["r"]
    forward, backward = reference.lora_linear_forward, reference.lora_linear_backward
    state = (at["weight"],)
    if name.startswith("nf4"):
        forward = reference.nf4_lora_linear_forward
        backward = reference.nf4_lora_linear_backward
        w = NF4Weight.from_state_dict(at)
        state = (w.tensors, w.layout)
    rest = (scaling, keep, case["dropout_p"])
    y, S = forward(at["x"], *state, at["lora_A"], at["lora_B"], at.get("bias"), *rest)
    assert_near(y, at["y"], dtype)
    adapters = (at["lora_A"], at["lora_B"])
    needs = [True, True, True, False]
    dx, dA, dB, _ = backward(at["dy"], at["x"], S, *state, *adapters, *rest, needs)
    assert_near(dx, at["dx"], dtype)
    assert_near(dA, at["dA"], dtype)
    assert_near(dB, at["dB"], dtype)


@pytest.mark.parametrize("shape", [(2, 1 << 20), (3, 699_983)], ids=str)
def test_chunks_join_without_a_seam(shape):
    """Weights larger than one chunk give what their blocks give one by one."""
    weight = random_weight(shape).view(-1)
    packed, absmax = reference.nf4_quantize(weight, 4096)
    last = weight.numel() // 4096 * 4096
    tail_packed, tail_absmax = reference.nf4_quantize(weight[last - 4096 :], 4096)
    assert torch.equal(packed[(last - 4096) // 2 :], tail_packed)
    assert torch.equal(absmax[-len(tail_absmax) :], tail_absmax)
    whole = reference.nf4_dequantize([packed, absmax], [0, 4096, 0, weight.numel()], F32)
    assert (whole - weight).abs().max() <= NF4_MAX_HALF_GAP * absmax.max()
    layout = [0, 4096, 0, weight.numel() - last + 4096]
    part = reference.nf4_dequantize([tail_packed, tail_absmax], layout, F32)
    assert torch.equal(whole[last - 4096 :], part)
