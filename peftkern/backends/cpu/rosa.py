"""RoSA's sparse products in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern.backends.cpu.module import float32, isa_and_threads, library, refusal_list, rows_of
from peftkern.backends.pointers import address, dtype_code, fresh, optional


def refusal_sddmm(first: Tensor, x: Tensor, *args: object) -> str | None:
    """Refuse activations (dy or y, and x) that differ in dtype, or others than a CPU's."""
    return refusal_list([first, x])


refusal_spmm = refusal_sddmm


def rosa_sddmm(dy: Tensor, x: Tensor, crow: Tensor, col: Tensor) -> Tensor:
    N, K = crow.numel() - 1, x.shape[-1]
    dy, x, crow, col = rows_of(dy, N), rows_of(x, K), crow.contiguous(), col.contiguous()
    T = dy.shape[0]
    values = torch.empty(col.numel(), dtype=torch.float32, device="cpu")
    library().rosa_sddmm(
        *isa_and_threads(),
        _sparse(crow, col, N, K),
        address("dy", dy, x.dtype, T * N),
        address("x", x, x.dtype, T * K),
        fresh(values),
        T,
        dtype_code("x", x),
    )
    return values


def rosa_spmm_(
    y: Tensor, x: Tensor, values: Tensor, crow: Tensor, col: Tensor, order: Tensor | None
) -> None:
    N, K, nnz = crow.numel() - 1, x.shape[-1], col.numel()
    rows, x = rows_of(y, N), rows_of(x, K)  # rows: a view of y unless its layout forbids
    crow, col, values = crow.contiguous(), col.contiguous(), float32(values)
    order = None if order is None else order.contiguous()
    T = rows.shape[0]
    library().rosa_spmm(
        *isa_and_threads(),
        _sparse(crow, col, N, K),
        address("values", values, torch.float32, nnz),
        optional("order", order, col.dtype, nnz),
        address("x", x, y.dtype, T * K),
        address("y", rows, y.dtype, T * N),
        T,
        dtype_code("y", y),
    )
    if not y.is_contiguous():
        y.copy_(rows.view(y.shape))


def _sparse(crow: Tensor, col: Tensor, N: int, K: int) -> tuple[int, ...]:
    """Return a sparse matrix as C++ takes it: int32 or int64 indices."""
    if col.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"col: expected int32 or int64, got {col.dtype}")
    nnz = col.numel()
    return (
        address("crow", crow, col.dtype, N + 1),
        address("col", col, col.dtype, nnz),
        int(col.dtype is torch.int64),
        N,
        K,
        nnz,
    )
