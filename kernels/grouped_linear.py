"""LoRA over a dense or an NF4 weight for each group of rows on a GPU: the experts of a layer.

Two launches forward, S and y; four backward, dS, dx, dA, and dB with dbias: `grouped_products.py`.

Floors at an H200's 4.8 TB/s and 989 TFLOPS (its specification), counted, not measured; gate_up_proj
forward, bf16 / NF4, even routing. Bytes: each hit expert's N K weights (2 or 0.516 each) once, and
2 R (K + N); FLOPs: 2 R N K. LoRA of r = 16 adds 2 R r (K + N) FLOPs, 4 r (N + K) bytes an expert.

| E, N, K, top | T = 1 | T = 256 | T = 2048 | T = 8192 |
|---|---|---|---|---|
| Qwen3-30B-A3B: 128, 1536, 2048, 8 | 10 / 2.7 us | 171 / 46 us | 192 / 104 us | 417 / 417 us |
| Mixtral-8x7B: 8, 28672, 4096, 2 | 98 / 25 us | 398 / 122 us | 972 / 972 us | 3.9 / 3.9 ms |
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftkern.kernels.configs import ceil_div
from peftkern.kernels.grouped_products import Stack, product, reduce, shrink, tiles_of_rows
from peftkern.kernels.low_rank_update import ROWS_MAX, refusal_layer

GROUPS_MAX = 4096  # that a program scans at once
PROGRAMS_MAX = 2**31 - 1  # that CUDA takes on the first axis


def refusal_forward(
    x: Tensor,
    rows: Tensor | None,
    offsets: Tensor,
    weight: Tensor | None,
    transposed: bool,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
) -> str | None:
    N = _columns(weight, not transposed, lora_B, 1)
    return _refusal(_rows(x, rows), x.dtype, offsets, (N, x.shape[1]), lora_A, lora_B)


def refusal_backward(
    dy: Tensor,
    offsets: Tensor,
    weight: Tensor | None,
    transposed: bool,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
) -> str | None:
    N, K = dy.shape[1], _columns(weight, transposed, lora_A, 2)
    return _refusal(dy.shape[0], dy.dtype, offsets, (N, K), lora_A, lora_B)


def refusal_nf4_forward(
    x: Tensor,
    rows: Tensor | None,
    offsets: Tensor,
    layout: list[int],
    lora_A: Tensor | None,
    lora_B: Tensor | None,
) -> str | None:
    return _refusal(_rows(x, rows), x.dtype, offsets, tuple(layout[4:]), lora_A, lora_B)


def refusal_nf4_backward(
    dy: Tensor, offsets: Tensor, layout: list[int], lora_A: Tensor | None, lora_B: Tensor | None
) -> str | None:
    return refusal_nf4_forward(dy, None, offsets, layout, lora_A, lora_B)


def _refusal(
    R: int,
    dtype: torch.dtype,
    offsets: Tensor,
    shape: tuple[int, int],
    lora_A: Tensor | None,
    lora_B: Tensor | None,
) -> str | None:
    """Return the refusal of R rows in groups with weights [N, K] (or [K, N])."""
    E = offsets.shape[0]
    if not 1 <= E <= GROUPS_MAX:
        return f"there are {E} groups, not 1 to {GROUPS_MAX}"
    factors = (None, None) if lora_A is None else (lora_A[0], lora_B[0])
    reason = refusal_layer(dtype, shape, *factors)
    if reason is not None:
        return reason
    if R > ROWS_MAX:
        return f"there are more than {ROWS_MAX} rows"
    if tiles_of_rows(R, E, 16) * ceil_div(max(shape), 16) > PROGRAMS_MAX:  # of the least tiles
        return f"the results of {R} rows are more tiles than a launch has"
    return None


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
) -> tuple[Tensor, Tensor]:
    N = _columns(weight, not transposed, lora_B, 1)
    stack = Stack.dense(weight, transposed)
    return _forward(x, rows, offsets, stack, N, lora_A, lora_B, bias, scaling)


def nf4_grouped_linear_forward(
    x: Tensor,
    rows: Tensor | None,
    offsets: Tensor,
    w: list[Tensor],
    layout: list[int],
    transposed: bool,
    *adapter: Any,
) -> tuple[Tensor, Tensor]:
    stack, N = Stack.packed(w, layout, transposed), layout[5 if transposed else 4]
    return _forward(x, rows, offsets, stack, N, *adapter)


def grouped_linear_backward(
    dy: Tensor,
    offsets: Tensor,
    x: Tensor | None,
    rows: Tensor | None,
    S: Tensor | None,
    weight: Tensor | None,
    transposed: bool,
    lora_A: Tensor | None,
    *adapter: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    K = _columns(weight, transposed, lora_A, 2)
    stack = Stack.dense(weight, transposed).backward()
    return _backward(dy, offsets, x, rows, S, stack, K, lora_A, *adapter)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    stack, K = Stack.packed(w, layout, transposed).backward(), layout[4 if transposed else 5]
    return _backward(dy, offsets, x, rows, S, stack, K, *adapter)


def _rows(x: Tensor, rows: Tensor | None) -> int:
    return (x if rows is None else rows).shape[0]


def _columns(weight: Tensor | None, first: bool, factor: Tensor | None, dimension: int) -> int:
    """Return N (or K): the first or the last columns of a stack, or, without one, of a factor."""
    if weight is not None:
        return weight.shape[1 if first else 2]
    return 1 if factor is None else factor.shape[dimension]


def _forward(
    x: Tensor,
    rows: Tensor | None,
    offsets: Tensor,
    stack: Stack,
    N: int,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    bias: Tensor | None,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    x, R = x.contiguous(), _rows(x, rows)
    y, S, factor = x.new_empty((R, N)), None, None
    if lora_A is not None:
        S, factor = shrink(x, rows, offsets, lora_A, R, 1.0), lora_B.transpose(1, 2)
    bias = None if bias is None else bias.contiguous()
    product(x, rows, offsets, stack, S, factor, bias, scaling, y)
    return y, x.new_empty(0, dtype=torch.float32) if S is None else S


def _backward(
    dy: Tensor,
    offsets: Tensor,
    x: Tensor | None,
    rows: Tensor | None,
    S: Tensor | None,
    stack: Stack,
    K: int,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    need_dx, need_dA, need_dB, need_dbias = needs
    if lora_A is None:
        need_dA = need_dB = False
    dy, R = dy.contiguous(), dy.shape[0]
    dS = dx = dA = dB = dbias = None
    if lora_A is not None and (need_dx or need_dA):
        dS = shrink(dy, None, offsets, lora_B.transpose(1, 2), R, scaling)
    if need_dx:
        dx = dy.new_empty((R, K))
        product(dy, None, offsets, stack, dS, lora_A, None, 1.0, dx)
    if need_dA:
        dA = torch.empty_like(lora_A)
        reduce(x.contiguous(), rows, offsets, dS, 1.0, dA, None)
    if need_dB or need_dbias:
        dB = torch.empty_like(lora_B) if need_dB else None
        dbias = dy.new_empty((offsets.shape[0], dy.shape[1])) if need_dbias else None
        S = S.contiguous() if need_dB else None
        reduce(dy, None, offsets, S, scaling, dB.transpose(1, 2) if need_dB else None, dbias)
    return tuple([dy.new_empty(0) if g is None else g for g in (dx, dA, dB, dbias)])
