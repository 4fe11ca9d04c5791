"""Oracle of RoSA's sparse products, in plain torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from peftkern.backends.reference.lora_linear import accumulation_dtype

_CHUNK = 1 << 20  # values handled at once: scratch stays near 12 MB whatever the weight's size


def rosa_sddmm(dy: Tensor, x: Tensor, crow: Tensor, col: Tensor) -> Tensor:
    """Compute dy.T @ x at the entries of a sparse matrix [N, K] alone.

    Args: dy [..., N] and x [..., K] of one dtype; crow [N + 1] and col [nnz], int32 or int64: the
        columns of row n are col[crow[n] : crow[n + 1]].
    Returns: [nnz] in the accumulation dtype, entries in the order of col.
    Raises: ValueError if an index is out of range.
    """
    N, K = crow.numel() - 1, x.shape[-1]
    _check_sparse(crow, col, K)
    rows, acc = math.prod(x.shape[:-1]), accumulation_dtype(x)
    dy2, x2 = dy.reshape(rows, N), x.reshape(rows, K)
    values = torch.zeros(col.numel(), dtype=acc, device=x.device)
    row = torch.repeat_interleave(torch.arange(N, device=x.device), crow.diff().long())
    chunk = max(1, _CHUNK // max(rows, 1))
    for start in range(0, col.numel(), chunk):
        at = slice(start, start + chunk)
        products = dy2[:, row[at]].to(acc) * x2[:, col[at].long()].to(acc)
        values[at] = products.sum(0)
    return values


def rosa_spmm_(
    y: Tensor, x: Tensor, values: Tensor, crow: Tensor, col: Tensor, order: Tensor | None
) -> None:
    """Add x @ S.T to y in place, S [N, K] being sparse; the sum is rounded once.

    Args: y [..., N] and x [..., K] of one dtype; crow and col as in `rosa_sddmm`; the value of
        entry j is values[order[j]], values[j] without an order.
    Raises: ValueError if an index is out of range.
    """
    nnz = col.numel()
    _check_sparse(crow, col, x.shape[-1])
    if order is not None:
        _check_range("order", order, nnz)
        values = values[order.long()]
    rows, acc = math.prod(x.shape[:-1]), accumulation_dtype(x)
    x2, values = x.reshape(rows, x.shape[-1]), values.to(acc)
    starts, lengths = crow.tolist(), crow.diff().long()
    first = 0
    while first < len(starts) - 1:
        last = first + 1  # as many rows of S as make a chunk of products
        while last < len(starts) - 1 and (starts[last + 1] - starts[first]) * rows <= _CHUNK:
            last += 1
        at = slice(starts[first], starts[last])
        if rows and starts[last] > starts[first]:
            products = x2[:, col[at].long()].t().to(acc) * values[at, None]
            sums = torch.segment_reduce(products, "sum", lengths=lengths[first:last], initial=0)
            target = y[..., first:last]
            target.copy_(target.to(acc) + sums.t().reshape(target.shape))
        first = last


def _check_sparse(crow: Tensor, col: Tensor, K: int) -> None:
    if crow[0] != 0 or crow[-1] != col.numel() or (crow.diff() < 0).any():
        raise ValueError("crow: expected to ascend from 0 to the number of entries")
    _check_range("col", col, K)


def _check_range(name: str, index: Tensor, limit: int) -> None:
    if index.numel() and not 0 <= index.min() <= index.max() < limit:
        raise ValueError(f"{name}: an index is out of range, expected 0 to {limit - 1}")
