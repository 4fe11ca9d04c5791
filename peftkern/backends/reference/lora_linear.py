"""Oracle of the linear layer with a low-rank update, in plain torch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkern.backends.dropout import philox_keep


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
    """Compute y = x @ weight.T + bias + scaling * S @ lora_B.T with S = dropout(x) @ lora_A.T.

    Args: x [..., K]; weight [N, K] and bias [N] in the dtype of x; lora_A [r, K], lora_B [N, r] in
        any float dtype, or both None; keep, the dropout mask: bool [..., K], the int64 [1] seed
        of one (`dropout.philox_keep`), or None.
    Returns: y [..., N] in the dtype of x, and S [..., r] in the accumulation dtype ([0] without
        adapters).
    """
    rows, acc = math.prod(x.shape[:-1]), accumulation_dtype(x)
    x2 = x.reshape(rows, x.shape[-1])
    y = F.linear(x2, weight, bias)
    shape = (*x.shape[:-1], weight.shape[0])
    if lora_A is None or lora_B is None:
        return y.view(shape), x.new_empty(0, dtype=acc)
    S = lora_shrink(x, lora_A, keep, dropout_p)
    y = y.to(acc).addmm_(S.reshape(rows, lora_A.shape[0]) * scaling, lora_B.to(acc).t()).to(x.dtype)
    return y.view(shape), S


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
    """Compute the gradients of `lora_linear_forward`.

    dS = scaling * dy @ lora_B;  dx = dy @ weight + dropout'(dS @ lora_A);  dA = dS.T @ dropout(x);
    dB = scaling * dy.T @ S;  dbias = sum of dy over its rows.

    Args: dy [..., N]; x is read for dA alone, S for dB alone and weight for dx alone, None where
        that is not wanted; needs, flags of dx, dA, dB, dbias.
    Returns: dx in the dtype of dy, dA and dB in the dtypes of lora_A and lora_B, dbias in the dtype
        of dy; an empty tensor [0] for what is not wanted.
    """
    need_dx, need_dA, need_dB, need_dbias = needs
    rows, acc = math.prod(dy.shape[:-1]), accumulation_dtype(dy)
    dy2 = dy.reshape(rows, dy.shape[-1])
    has_lora = lora_A is not None and lora_B is not None
    dx, dA, dB, dbias = (dy.new_empty(0) for _ in range(4))
    if has_lora and (need_dx or need_dA):
        dS = (dy2.to(acc) @ lora_B.to(acc)) * scaling
    if need_dx:
        dx = dy2 @ weight
        if has_lora and keep is None:
            dx = dx.to(acc).addmm_(dS, lora_A.to(acc)).to(dy.dtype)
        elif has_lora:
            dx = (dx + dropped(dS @ lora_A.to(acc), keep, dropout_p, acc)).to(dy.dtype)
        dx = dx.view(*dy.shape[:-1], weight.shape[1])
    if has_lora and need_dA:
        x2 = x.reshape(rows, lora_A.shape[1])
        dA = (dS.t() @ dropped(x2, keep, dropout_p, acc)).to(lora_A.dtype)
    if has_lora and need_dB:
        S2 = S.reshape(rows, lora_B.shape[1])
        dB = (dy2.to(acc).t() @ (S2 * scaling)).to(lora_B.dtype)
    if need_dbias:
        dbias = dy2.sum(0)
    return dx, dA, dB, dbias


def lora_shrink(x: Tensor, lora_A: Tensor, keep: Tensor | None, dropout_p: float) -> Tensor:
    """Compute S [..., r] = dropout(x) @ lora_A.T in the accumulation dtype."""
    acc = accumulation_dtype(x)
    return F.linear(dropped(x, keep, dropout_p, acc), lora_A.to(acc))


def dropped(x: Tensor, keep: Tensor | None, dropout_p: float, dtype: torch.dtype) -> Tensor:
    """Compute x * (keep / (1 - p)), rounded as nn.Dropout does: bit for bit the same.

    keep: a mask of as many elements as x [..., K], a seed for `philox_keep`, or None.
    """
    x = x.to(dtype)
    if keep is None:
        return x
    if keep.dtype is torch.int64:
        keep = philox_keep(keep, math.prod(x.shape[:-1]), x.shape[-1], dropout_p)
    noise = keep.reshape(x.shape).to(dtype)
    return x * (noise / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0 * noise)


def accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32
