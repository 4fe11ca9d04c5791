"""RoSA: masks, its sparse products against dense ones, and its formula, on every back end."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from linear_cases import F32, F64
from tolerances import assert_as_accurate_as_torch
from torch import Tensor

import peftkern
from peftkern.backends import ops
from peftkern.functional.rosa import SparseMask, rosa_linear

SHAPES = [  # T, N, K, nnz: one, around 16, 32 and 64 rows of x, empty rows, dense, none
    (1, 1, 1, 1),
    (1, 40, 70, 200),
    (16, 33, 17, 90),
    (31, 129, 65, 70),
    (64, 16, 48, 768),
    (65, 7, 300, 1000),
    (200, 70, 19, 400),
    (3, 5, 6, 0),
]


def random_mask(
    shape: tuple[int, int],
    nnz: int,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> SparseMask:
    N, K = shape
    flat = torch.randperm(N * K, generator=torch.Generator().manual_seed(seed))[:nnz].to(device)
    return SparseMask.from_indices(flat // K, flat % K, shape, dtype)


def uneven_mask(kind: str, shape: tuple[int, int], device: str = "cpu") -> SparseMask:
    """Masks as gradients draw them: whole rows, whole columns, or both beside a sprinkling."""
    N, K = shape
    dense = torch.zeros(shape, dtype=torch.bool)
    if kind in ("rows", "both"):
        dense[[N // 3, N - 1]] = True
    if kind in ("columns", "both"):
        dense[:, [0, K // 2]] = True
    if kind == "both":
        dense |= torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.05
    rows, columns = dense.to(device).nonzero(as_tuple=True)
    return SparseMask.from_indices(rows, columns, shape)


def products(x: Tensor, y: Tensor, values: Tensor, mask: SparseMask) -> tuple[Tensor, ...]:
    """y + x S^T, x + y S, and y^T x at the places of the mask."""
    forward, turned = y.clone(), x.clone()
    ops.rosa_spmm_(forward, x, values, mask.crow, mask.col, None)
    ops.rosa_spmm_(turned, y, values, mask.ccol, mask.row, mask.order)
    return forward, turned, ops.rosa_sddmm(y, x, mask.crow, mask.col)


def dense_products(x: Tensor, y: Tensor, values: Tensor, mask: SparseMask) -> tuple[Tensor, ...]:
    """The same by dense products, in float32 or in the float64 of the arguments."""
    wide = F64 if x.dtype is F64 else F32
    S, x_, y_ = mask.to_dense(values.to(wide)), x.to(wide), y.to(wide)
    at_places = (y_.T @ x_).view(-1)[mask.flat()]
    return (y_ + x_ @ S.T).to(y.dtype), (x_ + y_ @ S).to(x.dtype), at_places


def check_mask(mask: SparseMask, T: int, dtype: torch.dtype, device: str = "cpu") -> None:
    """Both ops, the product with the matrix and with its transpose, as accurate as torch."""
    (N, K), values = mask.shape, torch.randn(mask.nnz).to(device)
    x, y = (torch.randn(T, n).to(dtype).to(device) for n in (K, N))
    got, eager = products(x, y, values, mask), dense_products(x, y, values, mask)
    oracle = dense_products(x.double(), y.double(), values.double(), mask)
    assert_as_accurate_as_torch(got, eager, oracle)


def check_products(
    T: int, N: int, K: int, nnz: int, dtype: torch.dtype, index: torch.dtype, device: str = "cpu"
) -> None:
    check_mask(random_mask((N, K), nnz, index, device=device), T, dtype, device)


def whole_numbers(
    mask: SparseMask, T: int, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, SparseMask]:
    """x, y, values: float32 sums of them are exact, so an entry lost or met twice would show."""
    N, K = mask.shape
    shapes = ((T, K), (T, N), (mask.nnz,))
    x, y, values = (torch.randint(-4, 5, shape).float().to(device) for shape in shapes)
    return x, y, values, mask


def assert_exact(operands: tuple[Tensor, Tensor, Tensor, SparseMask]) -> None:
    for got, wanted in zip(products(*operands), dense_products(*operands), strict=True):
        assert torch.equal(got, wanted)


def check_wide_columns(index: torch.dtype) -> None:
    """Numbers of columns that do not fit into sixteen bits."""
    K = 70_001
    columns = torch.tensor([0, 32_767, 32_768, 65_535, 65_536, 70_000], dtype=index)
    mask = SparseMask.from_indices(torch.zeros_like(columns), columns, (1, K), index)
    x, y = torch.randn(3, K), torch.zeros(3, 1)
    ops.rosa_spmm_(y, x, torch.ones(6), mask.crow, mask.col, None)
    torch.testing.assert_close(y[:, 0], x[:, columns.long()].sum(1))
    got = ops.rosa_sddmm(torch.ones(3, 1), x, mask.crow, mask.col)
    torch.testing.assert_close(got, x[:, columns.long()].sum(0))


def products_of_layout(
    layout: str, T: int, dtype: torch.dtype = F32
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Both products with x and y behind other strides and values of `dtype`, and without them."""
    mask, values = random_mask((24, 40), 60), torch.randn(60)
    x, y = torch.randn(T, 40), torch.randn(T, 24)
    if layout == "expanded":
        x = x[:1].expand(T, 40)
    wanted, _, wanted_slope = products(x.contiguous(), y, values, mask)
    if layout == "transposed":
        x, y = x.T.contiguous().T, y.T.contiguous().T
    elif layout == "3-d":
        x, y = x.view(2, T // 2, 40), y.view(2, T // 2, 24)
    elif layout == "sliced":
        x, y = torch.stack([x, x], 2)[..., 1], torch.stack([y, y], 2)[..., 1]
    elif layout == "misaligned":
        x, y = (torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape) for t in (x, y))
    slope = ops.rosa_sddmm(y, x, mask.crow, mask.col)
    ops.rosa_spmm_(y, x, values.to(dtype), mask.crow, mask.col, None)
    return (y.reshape(T, 24), slope), (wanted, wanted_slope)


def formula(x, weight, A, B, values, bias, mask, scaling):
    """RoSA written down, each step rounded as torch rounds it; in float64 the oracle."""
    wide = torch.promote_types(x.dtype, F32)
    y = F.linear(x, weight, bias)
    y = (y.to(wide) + scaling * (x.to(wide) @ A.to(wide).T) @ B.to(wide).T).to(x.dtype)
    return (y.to(wide) + x.to(wide) @ mask.to_dense(values.to(wide)).T).to(x.dtype)


def operands(T: int, N: int, K: int, nnz: int, dtype: torch.dtype) -> dict[str, Tensor]:
    x, weight, bias = torch.randn(T, K), torch.randn(N, K) / K**0.5, torch.randn(N)
    return {
        "x": x.to(dtype),
        "weight": weight.to(dtype),
        "A": torch.randn(4, K) / K**0.5,
        "B": torch.randn(N, 4) / 2,
        "values": torch.randn(nnz) / 4,
        "bias": bias.to(dtype),
    }


def with_gradients(function, o: dict[str, Tensor], dy: Tensor) -> list[Tensor]:
    leaves = {k: v.detach().clone().requires_grad_(k != "weight") for k, v in o.items()}
    y = function(*leaves.values())
    y.backward(dy.to(y.dtype))
    return [y.detach(), *(leaf.grad for k, leaf in leaves.items() if k != "weight")]


def check_function(dtype: torch.dtype, nf4: bool) -> set[str]:
    """Values and gradients are as accurate as torch's; the back ends that served."""
    T, N, K, nnz = 40, 48, 64, 150
    o, mask, dy = operands(T, N, K, nnz, dtype), random_mask((N, K), nnz), torch.randn(T, N)
    w = None
    if nf4:
        with peftkern.use_backend("reference"):
            w = peftkern.quantize_nf4(o["weight"])
            o["weight"] = peftkern.dequantize_nf4(w)

    def ours(x, weight, A, B, values, bias):
        return rosa_linear(x, w if nf4 else weight, A, B, values, mask, scaling=1.5, bias=bias)

    def plain(*leaves):
        return formula(*leaves, mask, 1.5)

    peftkern.reset_stats()
    got = with_gradients(ours, o, dy.to(dtype))
    served = {backend for _, backend in peftkern.stats().calls}
    eager = with_gradients(plain, o, dy.to(dtype))
    oracle = with_gradients(plain, {k: v.double() for k, v in o.items()}, dy.to(dtype).double())
    assert_as_accurate_as_torch(got, eager, oracle)
    return served
