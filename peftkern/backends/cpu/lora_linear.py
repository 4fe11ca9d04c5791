"""Linear layer with a low-rank update: torch's GEMM for the weight, C++ for the update.

Where torch has no products of the dtype, dx is that of `grouped_linear`, for one group.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkern.backends.cpu import grouped_linear
from peftkern.backends.cpu.module import (
    float32,
    isa_and_threads,
    library,
    refusal_dense,
    rows_of,
)
from peftkern.backends.device import has_products
from peftkern.backends.dropout import keep_scale, philox_keep
from peftkern.backends.pointers import CPU, address, dtype_code, each, fresh, optional

refusal_forward = refusal_backward = refusal_dense


def lora_linear_forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
    keep: Tensor | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    N, K = weight.shape
    rows = rows_of(x, K)
    keep = mask_of(keep, rows.shape[0], K, dropout_p)
    S = lora_shrink(rows, float32(lora_A), keep, keep_scale(keep, dropout_p))
    y = F.linear(rows, weight, bias)  # the base layer's bits: a policy equals its reference
    lora_expand_(y, S, float32(lora_B.t()), scaling)
    return y.view(*x.shape[:-1], N), S.view(*x.shape[:-1], S.shape[1])


def lora_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    S: Tensor | None,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    keep: Tensor | None,
    dropout_p: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = rows_of(dy, lora_B.shape[0])
    keep = mask_of(keep, rows.shape[0], lora_A.shape[1], dropout_p)
    gradients = adapter_gradients(rows, x, S, lora_A, lora_B, scaling, keep, dropout_p, needs)
    compute(gradients)
    dx = dy.new_empty(0)
    if needs[0]:
        if has_products(dy.dtype, dy.device):
            dx = rows @ weight
        else:
            dx = grouped_linear.one_group(rows, weight.t())
        lora_expand_(dx, gradients.dS, float32(lora_A), keep_scale(keep, dropout_p), keep)
        dx = dx.view(*dy.shape[:-1], weight.shape[1])
    return dx, *requested(gradients, lora_A, lora_B, rows, needs)


class AdapterGradients(NamedTuple):
    """The adapter's part of a backward pass: outputs, float32 or None, and their description."""

    dS: Tensor | None  # [M, r]: scaling * dy @ lora_B
    dA: Tensor | None
    dB: Tensor | None
    sizes: tuple[int, ...]
    fields: tuple[float, ...]  # as `backward_args` of bind.cpp reads them
    inputs: tuple[Tensor | None, ...]  # whose addresses `fields` holds


def adapter_gradients(
    dy: Tensor,
    x: Tensor | None,
    S: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    keep: Tensor | None,
    dropout_p: float,
    needs: list[bool],
) -> AdapterGradients:
    """Allocate scaling * dy @ lora_B where dx or dA needs it, dA and dB, and describe them."""
    (M, N), (r, K), f32 = dy.shape, lora_A.shape, torch.float32
    need_dx, need_dA, need_dB, _ = needs
    x = rows_of(x, K) if need_dA else None
    S = S.reshape(M, r) if need_dB else None
    b = float32(lora_B.t())
    dS = torch.empty((M, r), dtype=f32, device="cpu") if need_dx or need_dA else None
    dA = torch.empty((r, K), dtype=f32, device="cpu") if need_dA else None
    dB = torch.empty((N, r), dtype=f32, device="cpu") if need_dB else None
    dy_at, x_at, S_at, b_at, keep_at = each(
        CPU,
        ("dy", dy, dy.dtype, M * N),
        ("x", x, dy.dtype if x is None else x.dtype, M * K),
        ("S", S, f32, M * r),
        ("lora_B", b, f32, r * N),
        ("keep", keep, torch.bool, M * K),
    )
    for_dS = (dy_at, dtype_code("dy", dy), b_at, scaling, fresh(dS))
    for_dA = (x_at, 0 if x is None else dtype_code("x", x), keep_at, keep_scale(keep, dropout_p))
    fields = (*for_dS, *for_dA, fresh(dA), S_at, fresh(dB))
    return AdapterGradients(dS, dA, dB, (M, N, K, r), fields, (dy, x, S, b, keep))


def compute(gradients: AdapterGradients) -> None:
    library().lora_backward(*isa_and_threads(), *gradients.sizes, gradients.fields)


def requested(
    gradients: AdapterGradients | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    dy: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dA, dB and dbias in the dtypes of their parameters; empty where not needed."""
    dA, dB = (None, None) if gradients is None else (gradients.dA, gradients.dB)
    return (
        dy.new_empty(0) if dA is None else dA.to(dtype=lora_A.dtype),
        dy.new_empty(0) if dB is None else dB.to(dtype=lora_B.dtype),
        dy.sum(0) if needs[3] else dy.new_empty(0),
    )


def lora_shrink(x: Tensor, a: Tensor, keep: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """Compute S[M, r] = scale * (x * keep)[M, K] @ a[r, K].T, float32; a float32."""
    (M, K), r = x.shape, a.shape[0]
    S = torch.empty((M, r), dtype=torch.float32, device="cpu")
    library().lora_shrink(
        *isa_and_threads(),
        M,
        K,
        r,
        address("x", x, x.dtype, M * K),
        dtype_code("x", x),
        address("lora_A", a, torch.float32, r * K),
        optional("keep", keep, torch.bool, M * K),
        scale,
        fresh(S),
    )
    return S


def lora_expand_(
    y: Tensor, s: Tensor, a: Tensor, scale: float = 1.0, keep: Tensor | None = None
) -> None:
    """Add scale * keep * (s[M, r] @ a[r, K]) to y[M, K]; s and a float32."""
    (M, K), r = y.shape, a.shape[0]
    library().lora_expand(
        *isa_and_threads(),
        M,
        K,
        r,
        address("s", s, torch.float32, M * r),
        address("lora", a, torch.float32, r * K),
        optional("keep", keep, torch.bool, M * K),
        scale,
        address("y", y, y.dtype, M * K),
        dtype_code("y", y),
    )


def mask_of(keep: Tensor | None, rows: int, columns: int, dropout_p: float) -> Tensor | None:
    """Return the dropout mask row by row: it has the strides that x had, or is still a seed."""
    if keep is None or keep.dtype is torch.bool:
        return None if keep is None else keep.contiguous()
    return philox_keep(keep, rows, columns, dropout_p)
