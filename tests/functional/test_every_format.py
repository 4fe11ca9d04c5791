"""Functions over a weight in every 4-bit format, against the same over its dequantized values."""

from __future__ import annotations

import pytest
import torch
from block_weights import ALL, random_weight_of
from linear_cases import BF16, F16, F32, F64, NF4Operands, check_accuracy, operands, ours
from tolerances import GRADCHECK, LOSS_CURVE_RTOL, assert_as_accurate_as_torch
from torch import Tensor

import peftkern
from peftkern.backends import correctness, reference
from peftkern.backends.programs import PLAIN
from peftkern.formats.block_weight import QuantizedWeight
from peftkern.functional.dora import dora_linear
from peftkern.functional.truncated_svd import truncated_svd

SERVED = (None, *PLAIN)
N, K, R = 40, 96, 4
STEPS = 30


def operands_over(w: QuantizedWeight, M: int, dtype: torch.dtype, adapter: torch.dtype, **options):
    weight = reference.nf4_dequantize(w.tensors, w.layout, dtype)
    o = operands((M, *w.shape, R), dtype, adapter, weight=weight, **options)
    return NF4Operands(**vars(o), w=w)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("served", SERVED)
def test_values_and_gradients(name, served):
    with peftkern.use_backend(served):
        for M, dtypes, p in ((1, (F32, F32), 0.0), (17, (BF16, F32), 0.3), (65, (F16, F16), 0.0)):
            w = random_weight_of(name, (N, K))
            cases = [operands_over(w, M, *dtypes, dropout_p=p, bias=M > 1) for _ in range(2)]
            check_accuracy(cases, ours)


@pytest.mark.parametrize("name", ALL)
def test_linear_alone_is_that_of_the_dense_weight(name):
    w = random_weight_of(name, (N, K))
    x, bias = torch.randn(9, K, requires_grad=True), torch.randn(N, requires_grad=True)
    dense, dy = peftkern.dequantize(w), torch.randn(9, N)
    results = []
    for function in (peftkern.nf4_linear, torch.nn.functional.linear):
        y = function(x, w if function is peftkern.nf4_linear else dense, bias)
        results.append([y.detach(), *torch.autograd.grad(y, (x, bias), dy)])
    wide = torch.nn.functional.linear(x.double(), dense.double(), bias.double())
    exact = [wide.detach(), *torch.autograd.grad(wide, (x, bias), dy.double())]
    for got, eager, oracle in zip(*results, exact, strict=True):
        assert_as_accurate_as_torch(got, eager, oracle)


@pytest.mark.parametrize("name", ["mxfp4", "int4"])
def test_gradcheck_in_float64(name):
    w = random_weight_of(name, (5, 32))
    leaves = [torch.randn(*shape, dtype=F64) for shape in ((3, 32), (2, 32), (5, 2), (5,))]
    leaves = [leaf.requires_grad_() for leaf in leaves]

    def call(x: Tensor, A: Tensor, B: Tensor, bias: Tensor) -> Tensor:
        return peftkern.nf4_lora_linear(x, w, A, B, scaling=1.5, bias=bias)

    assert torch.autograd.gradcheck(call, leaves, **GRADCHECK)
    assert torch.autograd.gradgradcheck(call, leaves, **GRADCHECK)


@pytest.mark.parametrize("name", ["nvfp4", "int4"])
def test_opcheck_and_one_graph(name):
    w = random_weight_of(name, (8, 64))
    x, A, B = torch.randn(3, 64, requires_grad=True), torch.randn(2, 64), torch.randn(8, 2)
    adapter = (A, B, None, 2.0, None, 0.0)
    torch.library.opcheck(torch.ops.peftkern.nf4_dequantize, (w.tensors, w.layout, BF16))
    forward = (x.detach(), w.tensors, w.layout, *adapter)
    torch.library.opcheck(torch.ops.peftkern.nf4_lora_linear_forward, forward)

    def call(x: Tensor, w: QuantizedWeight) -> Tensor:
        return peftkern.nf4_lora_linear(x, w, A, B, scaling=2.0) + peftkern.dequantize(w).sum()

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    results = []
    for function in (call, compiled):
        y = function(x, w)
        results.append((y.detach(), *torch.autograd.grad(y.sum(), x)))
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(graph, eager, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_other_functions_take_the_format(name):
    w = random_weight_of(name, (N, K))
    dense = peftkern.dequantize(w)
    x, A, B = torch.randn(6, K), torch.randn(R, K) / 9, torch.randn(N, R)
    options = {"scaling": 0.5}
    got = dora_linear(x, w, A, B, torch.ones(N), **options)
    expected = dora_linear(x, dense, A, B, torch.ones(N), **options)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    S = torch.linalg.svdvals(dense)[:3]
    torch.testing.assert_close(truncated_svd(w, 3).S, S, rtol=1e-5, atol=1e-6)
    assert truncated_svd(w, 2, minus=dense).S.amax() <= 1e-6 * S[0]
    stack = random_weight_of(name, (3, 16, K))
    ends = torch.tensor([2, 2, 6], dtype=torch.int32)
    stacked = peftkern.dequantize(stack)
    for served in SERVED:
        with peftkern.use_backend(served):
            got = peftkern.grouped_lora_linear(x, stack, offsets=ends)
            expected = peftkern.grouped_lora_linear(x, stacked, offsets=ends)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_checks_of_first_results_know_the_format(name):
    """What a kernel gives is judged by the weight's own format, a wrong result is told."""
    w = random_weight_of(name, (N, K))
    x, A, B = torch.randn(9, K), torch.randn(R, K), torch.randn(N, R)
    out = torch.empty(N, K)
    dequantize = (w.tensors, w.layout, out)
    reference.nf4_dequantize_out(*dequantize)
    assert correctness.wrong("nf4_dequantize_out", dequantize, None, lambda: out) is None
    out[-1, -1] += 0.01
    assert correctness.wrong("nf4_dequantize_out", dequantize, None, lambda: out) is not None
    forward = (x, w.tensors, w.layout, A, B, None, 2.0, None, 0.0)
    y, S = right = reference.nf4_lora_linear_forward(*forward)
    assert correctness.wrong("nf4_lora_linear_forward", forward, right, lambda: right) is None
    wrong = (y * 1.01, S)
    assert correctness.wrong("nf4_lora_linear_forward", forward, wrong, lambda: right) is not None


@pytest.mark.parametrize("name", ALL)
def test_loss_curve_is_that_of_the_dense_base(name):
    torch.manual_seed(1)
    first, second = (random_weight_of(name, shape) for shape in ((64, 96), (32, 64)))
    x, target = torch.randn(48, 96), torch.randn(48, 32)
    start = [
        torch.randn(R, 96) / 10,
        torch.zeros(64, R),
        torch.randn(R, 64) / 8,
        torch.zeros(32, R),
    ]

    def losses(dense: bool) -> list[float]:
        weights = [peftkern.dequantize(w) if dense else w for w in (first, second)]
        linear = peftkern.lora_linear if dense else peftkern.nf4_lora_linear
        factors = [factor.clone().requires_grad_() for factor in start]
        optimizer = torch.optim.AdamW(factors, lr=1e-2)
        found = []
        for _ in range(STEPS):
            h = linear(x, weights[0], *factors[:2], scaling=2.0).relu()
            loss = (linear(h, weights[1], *factors[2:], scaling=2.0) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    over_format, over_dense = torch.tensor(losses(False)), torch.tensor(losses(True))
    assert over_dense[-1] < 0.9 * over_dense[0]
    torch.testing.assert_close(over_format, over_dense, rtol=LOSS_CURVE_RTOL, atol=0)
