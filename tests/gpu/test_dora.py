"""DoRA's compiled kernels on a GPU: norms, the layer's gradients, graphs, streams, PEFT."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from dora_cases import (
    ADAPTERS,
    check_finite,
    check_norms,
    check_undone_weight,
    norm_case,
    norm_cases,
)
from gpu_runs import (
    CUDA,
    NEEDS_GPU,
    assert_patched_is_the_same,
    bf16_linear,
    capture,
    launches,
    linear4bit,
    on_a_busy_stream,
)
from linear_cases import BF16, F16, F32, F64
from nf4_weights import assert_same_bits, assert_same_every_time
from tolerances import DORA_NORM_RTOL, assert_as_accurate_as_torch
from torch import Tensor, nn

import peftkern
from peftkern.functional.dora import dora_linear, dora_norm

pytestmark = [*NEEDS_GPU, pytest.mark.usefixtures("triton_serves")]

SHAPES = [(1, 1, 1), (40, 320, 17), (130, 257, 3), (1000, 4096, 16), (4096, 1024, 64)]
LAYOUTS = [None, (64, True)]


# The norms


@pytest.mark.parametrize("adapters", ADAPTERS, ids=str)
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dense_norms(shape, dtype, adapters):
    with peftkern.use_backend("triton"):
        check_norms(norm_cases(shape, dtype, adapters, device=CUDA))


@pytest.mark.parametrize("layout", [(32, True), (64, True), (64, False), (4096, True)], ids=str)
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES[1:], (19, 69, 3), (300, 4096, 256)], ids=str)
def test_nf4_norms(shape, dtype, layout):
    with peftkern.use_backend("triton"):
        check_norms(norm_cases(shape, dtype, (F32, F32), layout, CUDA))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("r", [1, 32, 64, 65, 130, 256])
def test_every_tile_of_the_rank(r, layout):
    with peftkern.use_backend("triton"):
        for adapters in ((F32, F32), (BF16, BF16)):
            check_norms(norm_cases((600, 1024, r), BF16, adapters, layout, CUDA))


@pytest.mark.parametrize("left", [1e-2, 1e-4, 0.0])
def test_update_that_undoes_the_weight(left):
    """Three products of tf32 must not show where the sum cancels."""
    with peftkern.use_backend("triton"):
        check_undone_weight(left, device=CUDA)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_equal_bits_every_time(layout):
    case = norm_case((4096, 4096, 16), BF16, (F32, F32), layout, CUDA)
    assert_same_every_time(lambda: [dora_norm(*case.arguments, scaling=case.scaling)])


def test_transposed_weight_needs_no_copy():
    case = norm_case((4096, 1024, 16), BF16, (F32, F32), device=CUDA)
    wanted = dora_norm(*case.arguments, scaling=case.scaling)
    weight = case.weight.t().contiguous().t()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    got = dora_norm(weight, case.lora_A, case.lora_B, scaling=case.scaling)
    assert torch.cuda.max_memory_allocated() - before < weight.nbytes // 8
    torch.testing.assert_close(got, wanted, rtol=DORA_NORM_RTOL, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtypes", [(F32, (F32, F32)), (BF16, (F32, F32)), (BF16, (BF16, BF16))])
def test_nan_and_inf_propagate(dtypes, value):
    places = {"weight": (4, 9), "lora_A": (1, 7), "lora_B": (5, 1)}
    for name, place in places.items():
        case = norm_case((37, 70, 5), *dtypes, device=CUDA)
        getattr(case, name)[place] = value
        with peftkern.use_backend("triton"):
            check_finite(case.arguments)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_one_launch(layout):
    case = norm_case((1024, 1024, 16), BF16, (F32, F32), layout, CUDA)
    assert len(launches(lambda: dora_norm(*case.arguments, scaling=case.scaling))) == 1


def test_rank_that_does_not_fit_goes_to_the_reference():
    case = norm_case((40, 64, 300), BF16, (F32, F32), (64, True), CUDA)
    check_norms([case])
    assert ("nf4_dora_norm", "triton: the rank is 300, not 1 to 256") in peftkern.stats().fallbacks


def test_other_stream():
    case = norm_case((512, 512, 16), BF16, (F32, F32), device=CUDA)
    wanted = dora_norm(*case.arguments, scaling=case.scaling)
    weight = torch.zeros_like(case.weight)
    arguments = (weight, *case.arguments[1:])
    got = on_a_busy_stream(
        lambda: dora_norm(*arguments, scaling=case.scaling), [weight], [case.weight]
    )
    assert_same_bits(got, wanted)


# The layer


def operands(shape: tuple[int, int, int, int], dtype: torch.dtype) -> dict[str, Tensor]:
    M, N, K, r = shape
    drawn = {
        "x": torch.randn(M, K).to(dtype),
        "lora_A": torch.randn(r, K) / K**0.5,
        "lora_B": torch.randn(N, r) / r**0.5,
        "magnitude": (1 + 0.3 * torch.randn(N)) * K**0.5,
    }
    return {name: t.to(CUDA) for name, t in drawn.items()}


def gradients(function, weight, leaves: dict[str, Tensor], dy: Tensor, **options) -> list[Tensor]:
    leaves = {name: t.detach().requires_grad_() for name, t in leaves.items()}
    y = function(weight=weight, scaling=1.5, **leaves, **options)
    return [y.detach(), *torch.autograd.grad(y, list(leaves.values()), dy)]


def formula(x, weight, lora_A, lora_B, magnitude, *, scaling) -> Tensor:
    """PEFT's layer without dropout, in torch calls."""
    base = F.linear(x, weight)
    total = weight.to(lora_A.dtype) + scaling * (lora_B @ lora_A).detach()
    c = magnitude / torch.linalg.norm(total, dim=1).detach()
    update = F.linear(F.linear(x.to(lora_A.dtype), lora_A), lora_B) * scaling
    return (base + (c - 1) * base + c * update).to(base.dtype)


def draws_of(shape, dtype: torch.dtype, nf4: bool, recompute: bool) -> tuple[list, list, list]:
    """Ours, eager torch's and float64's results of one draw."""
    leaves, (M, N, K, _) = operands(shape, dtype), shape
    weight = dense = torch.randn(N, K).to(dtype)
    exact = dense.double()
    if nf4:  # few rows meet rounded codes, many rounded values: neither is the exact weight
        with peftkern.use_backend("reference"):
            weight = peftkern.quantize_nf4(dense)
            dense, exact = peftkern.dequantize_nf4(weight), peftkern.dequantize_nf4(weight, F64)
    weight, dense, exact = weight.to(CUDA), dense.to(CUDA), exact.to(CUDA)
    dy = torch.randn(M, N).to(dtype).to(CUDA)
    peftkern.reset_stats()
    with peftkern.use_backend("triton"):
        got = gradients(dora_linear, weight, leaves, dy, recompute=recompute)
    assert {backend for _, backend in peftkern.stats().calls} == {"triton"}
    wide = {name: t.double() for name, t in leaves.items()}
    eager = gradients(formula, dense, leaves, dy)
    return got, eager, gradients(formula, exact, wide, dy.double())


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("shape", [(8, 40, 320, 17), (300, 512, 1024, 16)], ids=str)
def test_values_and_gradients(shape, dtype, nf4, recompute):
    """Over 4,000 lengths: the largest error of few of them is chance."""
    runs = [draws_of(shape, dtype, nf4, recompute) for _ in range(4096 // shape[1])]
    for draws in zip(*(zip(*run, strict=True) for run in runs), strict=True):
        got, eager, oracle = (torch.stack(results) for results in zip(*draws, strict=True))
        assert_as_accurate_as_torch(got, eager, oracle)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("nf4", [False, True])
def test_graph_replays_what_eager_computes(nf4, dropout_p):
    leaves = {k: t.requires_grad_() for k, t in operands((64, 256, 512, 16), BF16).items()}
    weight = torch.randn(256, 512, device=CUDA).to(BF16)
    if nf4:
        weight = peftkern.quantize_nf4(weight)
    dy = torch.randn(64, 256, device=CUDA).to(BF16)

    def step() -> tuple[Tensor, ...]:
        y = dora_linear(weight=weight, scaling=1.5, dropout_p=dropout_p, **leaves)
        return y, *torch.autograd.grad(y, list(leaves.values()), dy)

    graph, results = capture(step)
    with torch.no_grad():
        leaves["x"].copy_(torch.randn_like(leaves["x"]))
        leaves["lora_B"].mul_(2)  # and the norm with it
    graph.replay()
    if dropout_p:  # each replay draws another mask
        first = results[0].clone()
        graph.replay()
        assert not torch.equal(first, results[0])
        assert all(torch.isfinite(t).all() for t in results)
        return
    torch.testing.assert_close(results, step())


# PEFT


@pytest.mark.parametrize(
    "draw_proj", [bf16_linear, partial(linear4bit, True), partial(linear4bit, False)]
)
def test_patched_peft_model(draw_proj):
    proj = draw_proj()
    prefix = "" if type(proj) is nn.Linear else "nf4_"
    ops = {"dora_norm", "lora_linear_forward", "lora_linear_backward"}
    assert_patched_is_the_same(proj, {prefix + op for op in ops}, use_dora=True)
