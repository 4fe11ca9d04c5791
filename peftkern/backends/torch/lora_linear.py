"""Linear layer with a low-rank update as torch's products, the update added in place.

    S = dropout(x) @ lora_A.T        y = F.linear(x, weight, bias);  y += scaling * S @ lora_B.T
    dS = scaling * dy @ lora_B       dx = dy @ weight;  dx += dropout'(dS @ lora_A)

A product that the dtype of the call holds takes the tensors as they are. What has to be widened or
masked first is so a chunk of rows at a time: no float32 copy of x, y or weight exists. Factors go
into `alpha`, where they cost neither a pass nor a rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkern.backends.device import has_products
from peftkern.backends.dropout import keep_scale, philox_keep
from peftkern.backends.reference.lora_linear import accumulation_dtype
from peftkern.backends.torch.chunks import chunks


def lora_linear_forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    bias: Tensor | None,
    scaling: float,
    keep: Tensor | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """Compute y and S. Of 16-bit products S has the values of the dtype of x, as in eager torch."""
    N, K = weight.shape
    rows, acc = math.prod(x.shape[:-1]), accumulation_dtype(x)
    x2 = x.reshape(rows, K)
    y = F.linear(x2, weight, bias)  # the base layer's bits: a policy equals its reference
    if lora_A is None or lora_B is None:
        return y.view(*x.shape[:-1], N), x.new_empty(0, dtype=acc)
    dtype, q = _product_dtype(x, lora_A, lora_B), keep_scale(keep, dropout_p)
    A, S = lora_A.to(dtype).t(), x.new_empty((rows, lora_A.shape[0]), dtype=dtype)
    for at, part in _parts(x2, dtype, _by_rows(keep, rows, K), dropout_p):
        S[at] = _product(part, A, q)
    _add_product_(y, S, lora_B.to(dtype).t(), scaling)
    return y.view(*x.shape[:-1], N), S.to(acc).view(*x.shape[:-1], S.shape[1])


def lora_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    S: Tensor | None,
    weight: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    keep: Tensor | None,
    dropout_p: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute dx, dA, dB and dbias; an empty tensor [0] for what is not wanted."""
    need_dx, need_dA, need_dB, need_dbias = needs
    rows = math.prod(dy.shape[:-1])
    dy2 = dy.reshape(rows, dy.shape[-1])
    dx, dA, dB, dbias = (dy.new_empty(0) for _ in range(4))
    has_lora = lora_A is not None and lora_B is not None
    if has_lora:
        r, K = lora_A.shape
        dtype, q = _product_dtype(dy, lora_A, lora_B), keep_scale(keep, dropout_p)
        keep = _by_rows(keep, rows, K)
        S2 = S.reshape(rows, r) if need_dB else None
        dS, dB_total = _from_dy(dy2, S2, lora_B, scaling, dtype, need_dx or need_dA)
    if need_dx:
        dx = _frozen_backward(dy2, weight)
        if has_lora:
            _add_product_(dx, dS, lora_A.to(dtype), q, keep, dropout_p)
        dx = dx.view(*dy.shape[:-1], weight.shape[1])
    if has_lora and need_dA:
        total = dy.new_zeros((r, K), dtype=accumulation_dtype(dy))
        for at, part in _parts(x.reshape(rows, K), dtype, keep, dropout_p):
            total += _product(dS[at].t(), part, q)
        dA = total.to(lora_A.dtype)
    if has_lora and need_dB:
        dB = dB_total.to(lora_B.dtype)
    if need_dbias:
        dbias = dy2.sum(0)
    return dx, dA, dB, dbias


def _from_dy(
    dy: Tensor,
    S: Tensor | None,
    lora_B: Tensor,
    scaling: float,
    dtype: torch.dtype,
    need_dS: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Compute dS [M, r] in `dtype` and, given S, dB [N, r] before its cast, in one pass over dy."""
    dS = dB = None
    if need_dS:
        dS, B = dy.new_empty((len(dy), lora_B.shape[1]), dtype=dtype), lora_B.to(dtype)
    if S is not None:
        dB, S = dy.new_zeros(lora_B.shape, dtype=accumulation_dtype(dy)), S.to(dtype)
    if dS is not None or dB is not None:
        for at, part in _parts(dy, dtype):
            if dS is not None:
                dS[at] = _product(part, B, scaling)
            if dB is not None:
                dB += _product(part.t(), S[at], scaling)
    return dS, dB


def _product_dtype(x: Tensor, lora_A: Tensor, lora_B: Tensor) -> torch.dtype:
    """Return the dtype of the update's products: that of x where the adapters share it.

    Not so on a CPU that multiplies 16 bits more slowly than it widens them: all float16, and
    bfloat16 where torch has no products of it (8 ms for an update that takes 0.5 in float32, Xeon,
    November 2026).
    """
    shared = x.dtype is lora_A.dtype is lora_B.dtype
    if shared and x.is_cpu:
        shared = x.dtype is not torch.float16 and has_products(x.dtype, x.device)
    return x.dtype if shared else accumulation_dtype(x)


def _frozen_backward(dy: Tensor, weight: Tensor) -> Tensor:
    """Compute dy @ weight, in float32 pieces on a CPU where torch has no products of the dtype."""
    if has_products(dy.dtype, dy.device):
        return dy @ weight
    dx = dy.new_empty((len(dy), weight.shape[1]))
    for rows in chunks(*dy.shape, dy.device):
        total = torch.zeros((len(dy[rows]), weight.shape[1]), device=dy.device)
        for at in chunks(*weight.shape, dy.device):
            total.addmm_(dy[rows, at].float(), weight[at].float())
        dx[rows] = total
    return dx


def _product(left: Tensor, right: Tensor, alpha: float) -> Tensor:
    """Compute alpha * left @ right, rounded once."""
    left, alpha = _told(left, alpha)
    return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=alpha)


def _add_product_(
    y: Tensor,
    left: Tensor,
    right: Tensor,
    alpha: float,
    keep: Tensor | None = None,
    dropout_p: float = 0.0,
) -> None:
    """Add alpha * left[M, r] @ right[r, N] where it is kept to y[M, N], in the dtype of left."""
    left, alpha = _told(left, alpha)
    if keep is None and y.dtype is left.dtype:
        y.addmm_(left, right, alpha=alpha)
        return
    for at in chunks(*y.shape, y.device):
        part = y[at]
        total = part.to(left.dtype)  # the same memory if the dtype is the same
        if keep is None:
            total.addmm_(left[at], right, alpha=alpha)
        else:
            product = (left[at] @ right).mul_(_mask(keep, at, y.shape[1], dropout_p))
            total.add_(product, alpha=alpha)
        part.copy_(total)


def _told(left: Tensor, alpha: float) -> tuple[Tensor, float]:
    """Put an alpha of zero into the factor, as BLAS would then not look for NaN in it."""
    return (left, alpha) if alpha else (left * alpha, 1.0)


def _parts(
    matrix: Tensor, dtype: torch.dtype, keep: Tensor | None = None, dropout_p: float = 0.0
) -> Iterator[tuple[slice, Tensor]]:
    """Yield rows and their values in `dtype`, those kept without dropout's scale.

    All at once where nothing has to be copied.
    """
    if keep is None and matrix.dtype is dtype:
        yield slice(0, len(matrix)), matrix
        return
    for at in chunks(*matrix.shape, matrix.device):
        part = matrix[at]
        if keep is not None:
            part = part * _mask(keep, at, matrix.shape[1], dropout_p)
        yield at, part.to(dtype)


def _by_rows(keep: Tensor | None, rows: int, columns: int) -> Tensor | None:
    """Return a mask as a matrix; a seed stays one."""
    if keep is None or keep.dtype is torch.int64:
        return keep
    return keep.reshape(rows, columns)


def _mask(keep: Tensor, at: slice, columns: int, dropout_p: float) -> Tensor:
    """Return the rows of a mask, drawn from their seed if it is one."""
    if keep.dtype is torch.int64:
        rows = torch.arange(at.start, at.stop, device=keep.device)
        return philox_keep(keep, rows, columns, dropout_p)
    return keep[at]
