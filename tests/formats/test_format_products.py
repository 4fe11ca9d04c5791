"""Products over a weight of every 4-bit format: as accurate as over its dense values."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from block_weights import (
    ALL,
    block_weight,
    random_weight_of,
)
from grids import thinned
from grouped_cases import check as check_groups
from grouped_cases import grouped_operands
from linear_cases import BF16, F16, F32, NF4Operands, check_accuracy, operands, ours, trials
from tolerances import assert_as_accurate_as_torch

import peftkern
from peftkern.backends import ops
from peftkern.formats.block_weight import BlockWeight
from peftkern.functional.dora import dora_norm

BLOCKS = {"nf4": 32, "fp4": 64, "mxfp4": 32, "nvfp4": 16, "int4": 32}
FORMATS = [*BLOCKS.items(), ("int4", 64), ("int4", 256)]
# M, N, K, r: one row and rows of both kinds of kernels; pairs of weight rows and one left over;
# K of whole vectors, of halves of them and of what no vector divides.
SHAPES = [(1, 33, 192, 4), (3, 64, 256, 1), (8, 31, 320, 5), (40, 34, 64, 16), (70, 17, 96, 3)]


def columns(K: int, blocksize: int) -> int:
    return -(-K // blocksize) * blocksize


@pytest.mark.parametrize(
    ("shape", "row", "dtypes"),
    thinned(SHAPES, FORMATS, [(F32, F32), (BF16, F32), (F16, F16)], diagonals=2),
)
def test_values_and_gradients(every_backend, shape, row, dtypes):
    M, N, K, r = shape
    name, blocksize = row
    shape = M, N, columns(K, blocksize), r

    def draw() -> NF4Operands:
        w = random_weight_of(name, (N, shape[2]), dtypes[0], blocksize)
        dense = peftkern.dequantize_nf4(w, dtypes[0])
        return NF4Operands(**vars(operands(shape, *dtypes, weight=dense)), w=w)

    check_accuracy([draw() for _ in range(trials(shape))], ours)


@pytest.mark.parametrize("M", [1, 2, 3, 9, 40])
def test_int4_whose_codes_lie_near_their_zeros(every_backend, M):
    """Sums of codes and of zeros cancel there: the bound of kernels/NUMERICS.md holds."""
    N, K, blocksize = 24, 128, 32
    shape = (N, K // blocksize, 1)
    codes = torch.randint(13, 16, (N, K))
    scale, zero = 0.1 + torch.rand(shape), 15 - torch.rand(shape) / 100
    options = {"scale": scale.view(-1), "zero": zero.view(-1)}
    w = block_weight("int4", codes, F32, blocksize, **options)
    x, dy = torch.randn(M, K, requires_grad=True), torch.randn(M, N)
    y = peftkern.nf4_linear(x, w)
    y.backward(dy)
    x64, dy64, scale, zero = (t.detach().double() for t in (x, dy, scale, zero))
    blocks = codes.double().view(N, -1, blocksize)
    weight = (scale * (blocks - zero)).view(N, K)
    in_y = (scale * ((blocks - 8).abs() + (8 - zero).abs())).view(N, K)
    in_dx = (scale * (blocks + zero)).view(N, K)
    u = torch.finfo(F32).eps / 2
    for got, exact, terms, count in (
        (y, x64 @ weight.T, x64.abs() @ in_y.T, K),
        (x.grad, dy64 @ weight, dy64.abs() @ in_dx, N),
    ):
        assert ((got - exact).abs() <= u * exact.abs() + count * u * terms).all()


@pytest.mark.parametrize(
    ("row", "transposed", "dtype"), thinned(FORMATS, [False, True], [F32, BF16], diagonals=1)
)
def test_groups(every_backend, row, transposed, dtype):
    name, blocksize = row
    N, K = columns(48, blocksize), columns(64, blocksize)
    o = grouped_operands(dtype, F32, N=N, K=K, transposed=transposed)
    w = random_weight_of(name, tuple(o.weight.shape), dtype, blocksize)
    check_groups(replace(o, w=w, weight=peftkern.dequantize_nf4(w, dtype)))


@pytest.mark.parametrize(("row", "dtype"), thinned(FORMATS, [F32, BF16, F16], diagonals=1))
def test_norm(every_backend, row, dtype):
    name, blocksize = row
    K = columns(300, blocksize)
    w, A, B = (
        random_weight_of(name, (19, K), dtype, blocksize),
        torch.randn(3, K),
        torch.randn(19, 3),
    )
    dense = peftkern.dequantize_nf4(w)
    oracle = torch.linalg.norm(dense.double() + 0.7 * B.double() @ A.double(), dim=1)
    eager = torch.linalg.norm(dense.float() + 0.7 * (B @ A), dim=1)
    assert_as_accurate_as_torch(dora_norm(w, A, B, scaling=0.7), eager, oracle)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_the_same_wherever_a_weight_lies(every_backend, name, dtype):
    """At odd addresses, and where the scales lead to the slower of two ways of decoding."""
    w = random_weight_of(name, (35, 128), dtype, BLOCKS[name])
    moved = [torch.cat((t.new_zeros(1), t.reshape(-1)))[1:].view_as(t) for t in w.tensors]
    for M in (1, 4, 40):
        x, dy = torch.randn(M, 128).to(dtype), torch.randn(M, 35).to(dtype)
        none = (None, None, None, 1.0, None, 0.0)
        y, dx = [], []
        for tensors in (w.tensors, moved):
            y.append(ops.nf4_lora_linear_forward(x, tensors, w.layout, *none)[0])
            dx.append(dy_times(dy, tensors, w.layout))
        assert torch.equal(*y) and torch.equal(*dx)


def dy_times(dy: torch.Tensor, tensors: list[torch.Tensor], layout: list[int]) -> torch.Tensor:
    needs = [True, False, False, False]
    arguments = (dy, None, None, tensors, layout, None, None, 1.0, None, 0.0, needs)
    return ops.nf4_lora_linear_backward(*arguments)[0]


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize("M", [1, 40])
def test_scales_beyond_the_usual(every_backend, name, M):
    """A scale of zero, a tiny one and a NaN among the others: their columns alone show it."""
    w = random_weight_of(name, (34, 128), BF16)
    scale = w.scale.clone().view(34, -1)
    scale[0, 1], scale[3, 0], scale[6, 2] = 0, 1, 255 if name == "mxfp4" else 127
    options = {} if name == "mxfp4" else {"tensor_scale": w.tensor_scale}
    w = BlockWeight(
        name, w.packed, scale.view(-1), shape=w.shape, dtype=BF16, blocksize=w.blocksize, **options
    )
    x, dy = torch.randn(M, 128).to(BF16), torch.randn(M, 34).to(BF16)
    y = peftkern.nf4_linear(x, w)
    assert y[:, 6].isnan().all() and not y[:, [i for i in range(34) if i != 6]].isnan().any()
    dx, (first, last) = dy_times(dy, w.tensors, w.layout), (2 * w.blocksize, 3 * w.blocksize)
    assert dx[:, first:last].isnan().all()
    assert not dx[:, :first].isnan().any() and not dx[:, last:].isnan().any()
    dense = peftkern.dequantize_nf4(w, F32).double()
    keep = [i for i in range(34) if i != 6]
    exact = (x.double() @ dense.T)[:, keep]
    assert_as_accurate_as_torch(y[:, keep], (x @ dense.to(BF16).T)[:, keep], exact)
