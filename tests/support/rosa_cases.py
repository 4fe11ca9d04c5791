"""RoSA: masks, its sparse products against dense ones, and its formula, on every back end."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from linear_cases import F32, F64
from tolerances import assert_as_accurate_as_torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from peftkern.backends import ops
from peftkern.functional.rosa import SparseMask

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
    for results in zip(got, eager, oracle, strict=True):
        assert_as_accurate_as_torch(*results)


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


def formula(x, weight, A, B, values, bias, mask, scaling):
    """RoSA written down, each step rounded as torch rounds it; in float64 the oracle."""
    wide = torch.promote_types(x.dtype, F32)
    y = F.linear(x, weight, bias)
    y = (y.to(wide) + scaling * (x.to(wide) @ A.to(wide).T) @ B.to(wide).T).to(x.dtype)
    return (y.to(wide) + x.to(wide) @ mask.to_dense(values.to(wide)).T).to(x.dtype)


class Sizes(TorchDispatchMode):
    """The elements of the largest tensor that any op makes, views apart."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        is_view = any(r.alias_info is not None for r in func._schema.returns)
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor) and not is_view:
                self.largest = max(self.largest, t.numel())
        return out
