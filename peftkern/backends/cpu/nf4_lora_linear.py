"""Linear layer over an NF4 weight that is never made dense, with a low-rank update, in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern.backends.cpu.crossovers import few_rows
from peftkern.backends.cpu.lora_linear import (
    adapter_gradients,
    compute,
    lora_expand_,
    mask_of,
    requested,
)
from peftkern.backends.cpu.module import (
    float32,
    isa_and_threads,
    library,
    refusal_dense,
    rows_of,
)
from peftkern.backends.decoded import refusal_format
from peftkern.backends.dropout import keep_scale
from peftkern.backends.pointers import CPU, each, fresh, weight

_ACTIVATIONS = {torch.float32: 0, torch.bfloat16: 1}


def refusal_forward(x: Tensor, w: list[Tensor], layout: list[int], *args: object) -> str | None:
    """Refuse formats, empty weights, dtypes and devices."""
    if 0 in layout[3:]:
        return "the weight is empty"
    if layout[0] and (reason := refusal_format("cpu", layout)):
        return reason
    return refusal_dense(x)


def refusal_backward(
    dy: Tensor, x: object, S: object, w: list[Tensor], layout: list[int], *args: object
) -> str | None:
    """Refuse what forward refuses."""
    return refusal_forward(dy, w, layout)


def nf4_lora_linear_forward(
    x: Tensor,
    w: list[Tensor],
    layout: list[int],
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    bias: Tensor | None,
    scaling: float,
    keep: Tensor | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    N, K = layout[3:]
    rows = rows_of(x, K)
    M, r = rows.shape[0], 0 if lora_A is None else lora_A.shape[0]
    if x.dtype is torch.float16:
        rows = rows.float()
    if keep is not None:
        keep = mask_of(keep, M, K, dropout_p)
    if lora_A is not None:
        lora_A, lora_B = float32(lora_A), float32(lora_B)
    if bias is not None:
        bias = float32(bias)
    y = torch.empty((M, N), dtype=rows.dtype, device="cpu")
    S = torch.empty((M, r) if lora_A is not None else 0, dtype=torch.float32, device="cpu")
    f32 = torch.float32
    x_at, A_at, B_at, keep_at, bias_at, S_at, y_at = each(
        CPU,
        ("x", rows, rows.dtype, M * K),
        ("lora_A", lora_A, f32, r * K),
        ("lora_B", lora_B, f32, N * r),
        ("keep", keep, torch.bool, M * K),
        ("bias", bias, f32, N),
        ("S", S, f32, M * r),
        ("y", y, rows.dtype, M * N),
    )
    view, code, scale = weight(w, layout), _ACTIVATIONS[rows.dtype], keep_scale(keep, dropout_p)
    isa, threads = isa_and_threads()
    library().nf4_lora_linear_forward(
        *(isa, threads, M, N, K, r),
        *(x_at, code, view, A_at, keep_at, scale, S_at, scaling, B_at, bias_at, y_at),
        few_rows("few_rows", isa, rows.dtype),
    )
    if x.dtype is torch.float16:
        y = y.half()
    if x.dim() == 2:
        return y, S
    return y.view(*x.shape[:-1], N), S if lora_A is None else S.view(*x.shape[:-1], r)


def nf4_lora_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    S: Tensor | None,
    w: list[Tensor],
    layout: list[int],
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    keep: Tensor | None,
    dropout_p: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    N, K = layout[3:]
    rows = rows_of(dy, N)
    keep = mask_of(keep, rows.shape[0], K, dropout_p)
    gradients = a = None
    if lora_A is not None:
        if lora_A.shape[1] != K:  # or its mask would be one of another size
            raise ValueError(f"lora_A: expected [r, {K}] like w, got {list(lora_A.shape)}")
        gradients = adapter_gradients(rows, x, S, lora_A, lora_B, scaling, keep, dropout_p, needs)
        a = float32(lora_A)
    dx = None
    if dy.dtype is torch.float16 or not needs[0]:
        if gradients is not None:
            compute(gradients)
        if needs[0]:  # a product in float32, and under dropout the update in float16
            fused = None if gradients is None or keep is not None else gradients.dS
            dx = _nf4_linear_backward(rows.float(), w, layout, None if fused is None else a, fused)
            dx = dx.to(dy.dtype)
            if gradients is not None and keep is not None:
                lora_expand_(dx, gradients.dS, a, keep_scale(keep, dropout_p), keep)
    else:
        fields = () if gradients is None else gradients.fields
        dx = _nf4_linear_backward(rows, w, layout, a, None, fields)
    dx = dx.view(*dy.shape[:-1], K) if needs[0] else dy.new_empty(0)
    return dx, *requested(gradients, lora_A, lora_B, rows, needs)


def _nf4_linear_backward(
    dy: Tensor,
    w: list[Tensor],
    layout: list[int],
    a: Tensor | None,
    s: Tensor | None,
    adapter: tuple[float, ...] = (),
) -> Tensor:
    """Compute dx[M, K] = dy[M, N] W + s[M, r] a[r, K]; s and a float32 or None.

    With the fields of `AdapterGradients` these are computed first, and s is their dS.
    """
    (M, N), K = dy.shape, layout[-1]
    r = 0 if a is None else a.shape[0]
    dx = torch.empty((M, K), dtype=dy.dtype, device="cpu")
    f32 = torch.float32
    dy_at, s_at, a_at = each(
        CPU, ("dy", dy, dy.dtype, M * N), ("s", s, f32, M * r), ("lora_A", a, f32, r * K)
    )
    view, code = weight(w, layout), _ACTIVATIONS[dy.dtype]
    isa, threads = isa_and_threads()
    library().nf4_lora_linear_backward(
        *(isa, threads, M, N, K, r),
        *(dy_at, code, view, s_at, a_at, adapter, fresh(dx)),
        few_rows("few_rows_backward", isa, dy.dtype),
    )
    return dx
