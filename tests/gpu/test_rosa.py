"""RoSA's compiled kernels on a GPU: both sparse products, the layer's gradients, graphs."""

from __future__ import annotations

import pytest
import torch
from gpu_runs import CUDA, NEEDS_GPU, capture, launches, on_a_busy_stream
from linear_cases import BF16, F16, F32
from nf4_weights import assert_same_bits, assert_same_every_time
from rosa_cases import (
    SHAPES,
    assert_exact,
    check_mask,
    check_products,
    formula,
    products,
    random_mask,
    uneven_mask,
    whole_numbers,
)
from tolerances import assert_as_accurate_as_torch
from torch import Tensor, nn

import peftkern
from peftkern.backends import ops
from peftkern.functional.rosa import SparseMask
from peftkern.layers import NF4Linear
from peftkern.methods.rosa import RoSALinear

pytestmark = [*NEEDS_GPU, pytest.mark.usefixtures("triton_serves")]

LARGE = [(1, 4096, 4096, 167_772), (500, 1000, 4096, 40_000), (2500, 600, 1000, 6_000)]


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, *LARGE], ids=str)
def test_products(shape, dtype, index):
    with peftkern.use_backend("triton"):
        check_products(*shape, dtype, index, CUDA)


@pytest.mark.parametrize("T", [1, 17, 40, 300, 2100])
@pytest.mark.parametrize("kind", ["rows", "columns", "both"])
def test_uneven_rows(kind, T):
    """Rows of 3000 entries next to empty ones, over every tile of rows of x."""
    mask = uneven_mask(kind, (260, 3000), CUDA)
    with peftkern.use_backend("triton"):
        check_mask(mask, T, BF16, CUDA)
        assert_exact(whole_numbers(mask, T, CUDA))


@pytest.mark.parametrize("share", [0.001, 0.02, 0.5])
@pytest.mark.parametrize("T", [5, 512, 1111])
def test_every_entry_counts_once(T, share):
    N, K = 1025, 700
    with peftkern.use_backend("triton"):
        assert_exact(whole_numbers(random_mask((N, K), int(share * N * K), device=CUDA), T, CUDA))


def drawn(T: int, mask: SparseMask, dtype: torch.dtype = BF16) -> tuple[Tensor, Tensor, Tensor]:
    """x, y and values of a mask."""
    N, K = mask.shape
    x, y = (torch.randn(T, n, device=CUDA).to(dtype) for n in (K, N))
    return x, y, torch.randn(mask.nnz, device=CUDA)


@pytest.mark.parametrize("T", [1, 512, 4096])
def test_equal_bits_every_time(T):
    mask = random_mask((1024, 4096), 40_000, device=CUDA)
    operands = (*drawn(T, mask), mask)
    assert_same_every_time(lambda: products(*operands))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["x", "y", "values"])
def test_nan_and_inf_propagate(name, value):
    mask = random_mask((40, 30), 150, device=CUDA)
    operands = dict(zip(("x", "y", "values"), drawn(20, mask), strict=True))
    operands["values"][7] = 0.0
    operands[name].view(-1)[77] = value
    results = []
    for backend in ("triton", "reference"):
        with peftkern.use_backend(backend):
            results.append(products(**operands, mask=mask))
    for got, wanted in zip(*results, strict=True):
        assert torch.equal(got.isnan(), wanted.isnan()) and torch.equal(got.isinf(), wanted.isinf())
    assert not all(t.isfinite().all() for t in results[0])


def test_a_column_out_of_range_gives_nan():
    mask = random_mask((5, 7), 9, device=CUDA)
    x, y, values = drawn(3, mask, F32)
    col = mask.col.clone()
    col[4] = 1 << 30
    row = mask.flat()[4] // 7
    with peftkern.use_backend("triton"):
        ops.rosa_spmm_(y, x, values, mask.crow, col, None)
        got = ops.rosa_sddmm(torch.ones_like(y), x, mask.crow, col)
    assert torch.equal(y.isnan(), (torch.arange(5, device=CUDA) == row).expand(3, 5))
    assert torch.equal(got.isnan(), torch.arange(9, device=CUDA) == 4)


@pytest.mark.parametrize(("op", "most"), [("sddmm", 4), ("spmm", 3)])
@pytest.mark.parametrize("T", [512, 4096])
def test_few_launches(op, most, T):
    """Transposing, the kernel, and partial sums."""
    mask = random_mask((4096, 4096), 167_772, device=CUDA)
    x, y, values = drawn(T, mask)
    calls = {
        "sddmm": lambda: ops.rosa_sddmm(y, x, mask.crow, mask.col),
        "spmm": lambda: ops.rosa_spmm_(y, x, values, mask.crow, mask.col, None),
    }
    names = launches(calls[op])
    assert 0 < len(names) <= most, names


def test_other_stream():
    mask = random_mask((512, 512), 3000, device=CUDA)
    x, y, values = drawn(300, mask)
    wanted = products(x, y, values, mask)
    late = torch.zeros_like(x)
    got = on_a_busy_stream(lambda: products(late, y, values, mask), [late], [x])
    assert_same_bits(got, wanted)


# The layer


def layer_of(N: int, K: int, nf4: bool) -> RoSALinear:
    linear = nn.Linear(K, N, dtype=BF16)
    with peftkern.use_backend("reference"):
        base = NF4Linear.from_linear(linear) if nf4 else linear
    layer = RoSALinear(base, r=4, density=0.01).to(CUDA)
    layer.set_mask(random_mask((N, K), layer.nnz, device=CUDA))
    nn.init.normal_(layer.lora_B, std=0.1)
    nn.init.normal_(layer.values, std=0.1)
    return layer


def step(layer: RoSALinear, x: Tensor, dy: Tensor) -> list[Tensor]:
    y = layer(x)
    trained = (layer.lora_A, layer.lora_B, layer.values)
    return [y.detach(), *torch.autograd.grad(y, (x, *trained), dy)]


def torchs(layer: RoSALinear, x: Tensor, dy: Tensor, weight: Tensor) -> list[Tensor]:
    """The layer in torch calls, in the type of x: float64 is the oracle."""
    wide = torch.promote_types(x.dtype, F32)
    x = x.detach().requires_grad_()
    trained = (layer.lora_A, layer.lora_B, layer.values)
    leaves = [p.detach().to(wide).requires_grad_() for p in trained]
    bias = layer.base.bias.detach().to(x.dtype)
    y = formula(x, weight.to(x.dtype), *leaves, bias, layer.mask, layer.scaling)
    return [y.detach(), *torch.autograd.grad(y, (x, *leaves), dy.to(x.dtype))]


@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize("T", [300, 2048])
def test_layer_and_gradients(T, nf4):
    """Rows beyond those of the fused NF4 kernel, whose weight is not the decoded one."""
    layer = layer_of(256, 512, nf4)
    with peftkern.use_backend("reference"):
        weight = peftkern.dequantize_nf4(layer.base.nf4) if nf4 else layer.base.weight.detach()
    x = torch.randn(T, 512, device=CUDA).to(BF16).requires_grad_()
    dy = torch.randn(T, 256, device=CUDA).to(BF16)
    peftkern.reset_stats()
    with peftkern.use_backend("triton"):
        got = step(layer, x, dy)
    assert {backend for _, backend in peftkern.stats().calls} == {"triton"}
    oracle = torchs(layer, x.detach().double(), dy, weight)
    assert_as_accurate_as_torch(got, torchs(layer, x, dy, weight), oracle)


@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize("T", [8, 300])
def test_graph_replays_what_eager_computes(T, nf4):
    """Nothing in a step waits for the host, or it could not be captured."""
    layer = layer_of(256, 512, nf4)
    x = torch.randn(T, 512, device=CUDA).to(BF16).requires_grad_()
    dy = torch.randn(T, 256, device=CUDA).to(BF16)
    peftkern.reset_stats()
    graph, results = capture(lambda: step(layer, x, dy))
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
        layer.values.mul_(2)
    graph.replay()
    torch.testing.assert_close(results, step(layer, x, dy))
    assert {op for op, _ in peftkern.stats().calls} >= {"rosa_sddmm", "rosa_spmm_"}
    assert {backend for _, backend in peftkern.stats().calls} == {"triton"}


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compile_fullgraph(mode):
    layer = layer_of(256, 512, False)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, mode=mode)
    dy = torch.randn(64, 256, device=CUDA).to(BF16)
    for _ in range(4):  # reduce-overhead warms up, records, then replays
        x = torch.randn(64, 512, device=CUDA).to(BF16).requires_grad_()
        wanted = step(layer, x, dy)
        torch.compiler.cudagraph_mark_step_begin()
        y = compiled(x)
        trained = (layer.lora_A, layer.lora_B, layer.values)
        got = [y.detach().clone(), *torch.autograd.grad(y, (x, *trained), dy)]
        torch.testing.assert_close(got, wanted)


def test_more_than_2_to_31_values():
    """Rows of x and of y beyond 2^31 elements, and x^T likewise: 4.3 GB each."""
    if torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("needs 40 GB")
    T, N, K = (1 << 15) + 5, 1 << 16, 1 << 16
    rows = torch.tensor([0, 0, N - 1, N - 1, N // 2], device=CUDA)
    columns = torch.tensor([0, K - 1, 0, K - 1, K // 2], device=CUDA)
    mask = SparseMask.from_indices(rows, columns, (N, K))
    x, y = (torch.zeros(T, n, device=CUDA, dtype=BF16) for n in (K, N))
    for t in (0, T - 1):
        x[t] = (torch.arange(K, device=CUDA) % 7).to(BF16)
        y[t] = (torch.arange(N, device=CUDA) % 5).to(BF16)
    values = torch.arange(1.0, mask.nnz + 1, device=CUDA)
    with peftkern.use_backend("triton"):
        slope = ops.rosa_sddmm(y, x, mask.crow, mask.col)
        ops.rosa_spmm_(y, x, values, mask.crow, mask.col, None)
    flat = mask.flat()
    assert torch.equal(slope, (2 * (flat // K % 5) * (flat % K % 7)).float())
    small = torch.zeros(N, device=CUDA).index_add_(0, flat // K, values * (flat % K % 7))
    wanted = (small + torch.arange(N, device=CUDA) % 5).to(BF16)
    assert torch.equal(y[0], wanted) and torch.equal(y[T - 1], wanted)
    assert y[1 : T - 1].count_nonzero() == 0
