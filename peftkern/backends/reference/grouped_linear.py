"""Oracle of the linear layer over groups of rows, each with its own weight and update."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from peftkern.backends.reference.lora_linear import (
    accumulation_dtype,
    lora_linear_backward,
    lora_linear_forward,
    lora_shrink,
)
from peftkern.backends.reference.nf4 import nf4_dequantize, unnested
from peftkern.formats.table import cut

Expert = Callable[[int, torch.dtype], Tensor]
Linear = Callable[..., Any]  # lora_linear_forward or _backward of a back end


def grouped_linear_forward(
    x: Tensor,
    rows: Tensor | None,
    offsets: Tensor,
    weight: Tensor | None,
    transposed: bool,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    bias: Tensor | None,
    scaling: float,
    *,
    linear: Linear = lora_linear_forward,
) -> tuple[Tensor, Tensor]:
    """Compute y = x @ weight[e].T + bias[e] + scaling * S @ lora_B[e].T with S = x @ lora_A[e].T.

    e is the group of a row: row i of y reads x[rows[i]], or x[i] without `rows`, and belongs to
    the group e with offsets[e-1] <= i < offsets[e], or to none from offsets[-1] on.

    Args: x [T, K]; rows int32 [R] or None; offsets int32 [E], the ends of the groups; weight
        [E, N, K], [E, K, N] if transposed, of one matrix if all groups share it, or None; lora_A
        [E, r, K] and lora_B [E, N, r] in any float dtype and with any strides, or both None; bias
        [E, N] in the dtype of x; linear, a back end's `lora_linear_forward`, run on one group after
        the other.
    Returns: y [R, N] in the dtype of x and S [R, r] in the accumulation dtype ([0] without
        adapters), both zero for rows of no group.
    """
    N, expert = _dense_experts(weight, transposed, lora_B, 1)
    return _forward(linear, x, rows, offsets, N, expert, lora_A, lora_B, bias, scaling)


def grouped_linear_backward(
    dy: Tensor,
    offsets: Tensor,
    x: Tensor | None,
    rows: Tensor | None,
    S: Tensor | None,
    weight: Tensor | None,
    transposed: bool,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    needs: list[bool],
    *,
    linear: Linear = lora_linear_backward,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of `grouped_linear_forward`.

    dS = scaling * dy @ lora_B[e];  dx = dy @ weight[e] + dS @ lora_A[e];  dA[e] = dS.T @ x;
    dB[e] = scaling * dy.T @ S;  dbias[e] = sum of dy over the group.

    Args: dy [R, N]; x is read for dA alone, S for dB alone and weight for dx alone, None where that
        is not wanted; needs, flags of dx, dA, dB, dbias.
    Returns: dx [R, K], a row for each row of dy; dA and dB with the dtypes and strides of lora_A
        and lora_B, zero for empty groups; dbias [E, N]; an empty tensor [0] for what is not wanted.
    """
    K, expert = _dense_experts(weight, transposed, lora_A, 2)
    factors = (lora_A, lora_B, scaling)
    return _backward(linear, dy, offsets, x, rows, S, K, expert, *factors, needs)


def nf4_grouped_linear_forward(
    x: Tensor,
    rows: Tensor | None,
    offsets: Tensor,
    w: list[Tensor],
    layout: list[int],
    transposed: bool,
    *adapter: Any,
    linear: Linear = lora_linear_forward,
    dequantize: Callable[..., Tensor] = nf4_dequantize,
) -> tuple[Tensor, Tensor]:
    """Run `grouped_linear_forward` over weights dequantized one at a time to the dtype of x."""
    expert, N = _nf4_experts(w, layout, transposed, dequantize), layout[5 if transposed else 4]
    return _forward(linear, x, rows, offsets, N, expert, *adapter)


def nf4_grouped_linear_backward(
    dy: Tensor,
    offsets: Tensor,
    x: Tensor | None,
    rows: Tensor | None,
    S: Tensor | None,
    w: list[Tensor],
    layout: list[int],
    transposed: bool,
    *adapter: Any,
    linear: Linear = lora_linear_backward,
    dequantize: Callable[..., Tensor] = nf4_dequantize,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run `grouped_linear_backward` likewise."""
    expert, K = _nf4_experts(w, layout, transposed, dequantize), layout[4 if transposed else 5]
    return _backward(linear, dy, offsets, x, rows, S, K, expert, *adapter)


def groups(offsets: Tensor, R: int) -> Iterator[tuple[int, slice]]:
    """Yield (e, rows) of the groups that have rows.

    Raises: ValueError if the ends decrease, or leave [0, R].
    """
    start = 0
    for e, stop in enumerate(offsets.tolist()):
        if not start <= stop <= R:
            raise ValueError(
                f"offsets: expected ends of groups that ascend to at most {R}, the number of rows; "
                f"got {stop} after {start} at group {e}"
            )
        if stop > start:
            yield e, slice(start, stop)
        start = stop


def _dense_experts(
    weight: Tensor | None, transposed: bool, factor: Tensor | None, dim: int
) -> tuple[int, Expert | None]:
    """Return a size of the weights and a function of (e, dtype) that gives a group's [N, K].

    Args: factor, lora_B [E, N, r] or lora_A [E, r, K], whose size `dim` is that of the weights'
        [E, N, K]; alone it is read where there are no weights.
    """
    if weight is None:
        return factor.shape[dim], None

    def expert(e: int, dtype: torch.dtype) -> Tensor:
        matrix = weight[e if len(weight) > 1 else 0].to(dtype)
        return matrix.t() if transposed else matrix

    return weight.shape[3 - dim if transposed else dim], expert


def _nf4_experts(
    w: list[Tensor], layout: list[int], transposed: bool, dequantize: Callable[..., Tensor]
) -> Expert:
    """Return the same function of a quantized stack: `dequantize` decodes what is asked for."""
    w, layout = unnested(w, layout)
    _, blocksize, _, E, *shape = layout
    blocks = shape[0] * shape[1] // blocksize  # of each

    def expert(e: int, dtype: torch.dtype) -> Tensor:
        e = e if E > 1 else 0
        matrix = dequantize(*cut(w, layout, slice(e * blocks, (e + 1) * blocks), shape), dtype)
        return matrix.t() if transposed else matrix

    return expert


def _forward(
    linear: Linear,
    x: Tensor,
    rows: Tensor | None,
    offsets: Tensor,
    N: int,
    expert: Expert | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    bias: Tensor | None,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """Run a back end's `lora_linear_forward` on one group after the other."""
    R, acc = len(x if rows is None else rows), accumulation_dtype(x)
    y = x.new_zeros(R, N)
    S = x.new_zeros(0 if lora_A is None else (R, lora_A.shape[1]), dtype=acc)
    for e, at in groups(offsets, R):
        x_e = x[at] if rows is None else x[rows[at]]
        A, B, bias_e = (None if t is None else t[e] for t in (lora_A, lora_B, bias))
        if expert is None:
            S[at] = S_e = lora_shrink(x_e, A, None, 0.0)
            y_e = (S_e * scaling) @ B.to(acc).t()
            y[at] = (y_e if bias is None else y_e + bias_e).to(x.dtype)
            continue
        y[at], S_e = linear(x_e, expert(e, x.dtype), A, B, bias_e, scaling, None, 0.0)
        if A is not None:
            S[at] = S_e
    return y, S


def _backward(
    linear: Linear,
    dy: Tensor,
    offsets: Tensor,
    x: Tensor | None,
    rows: Tensor | None,
    S: Tensor | None,
    K: int,
    expert: Expert | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run a back end's `lora_linear_backward` on one group after the other."""
    need_dx, need_dA, need_dB, need_dbias = needs
    acc, has_lora = accumulation_dtype(dy), lora_A is not None
    grads = (
        dy.new_zeros((len(dy), K) if need_dx else 0),
        torch.zeros_like(lora_A) if has_lora and need_dA else dy.new_empty(0),
        torch.zeros_like(lora_B) if has_lora and need_dB else dy.new_empty(0),
        dy.new_zeros((len(offsets), dy.shape[1]) if need_dbias else 0),
    )
    by_linear = [need_dx and expert is not None, need_dA, need_dB, need_dbias]
    for e, at in groups(offsets, len(dy)):
        A, B = (None if t is None else t[e] for t in (lora_A, lora_B))
        x_e = None if x is None else x[at] if rows is None else x[rows[at]]
        S_e, W = None if S is None else S[at], expert(e, dy.dtype) if by_linear[0] else None
        parts = linear(dy[at], x_e, S_e, W, A, B, scaling, None, 0.0, by_linear)
        for grad, part, index in zip(grads, parts, (at, e, e, e), strict=True):
            if part.numel():
                grad[index] = part
        if need_dx and expert is None:
            dS = (dy[at].to(acc) @ B.to(acc)) * scaling
            grads[0][at] = (dS @ A.to(acc)).to(dy.dtype)
    return grads
