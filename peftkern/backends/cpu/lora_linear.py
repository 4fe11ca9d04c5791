"""Linear layer with a low-rank update: torch's GEMM for the weight, C++ for the update."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkern.backends.cpu.module import (
    float32,
    isa_and_threads,
    library,
    refusal_dense,
    rows_of,
)
from peftkern.backends.dropout import keep_scale, philox_keep
from peftkern.backends.pointers import address, dtype_code, fresh, optional

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
    y = F.linear(rows, weight, bias)
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
    dx = dy.new_empty(0)
    dS, dA, dB, dbias = adapter_gradients(
        rows, x, S, lora_A, lora_B, scaling, keep, dropout_p, needs
    )
    if needs[0]:
        dx = rows @ weight
        lora_expand_(dx, dS, float32(lora_A), keep_scale(keep, dropout_p), keep)
        dx = dx.view(*dy.shape[:-1], weight.shape[1])
    return dx, dA, dB, dbias


def adapter_gradients(
    dy: Tensor,
    x: Tensor | None,
    S: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    keep: Tensor | None,
    dropout_p: float,
    needs: list[bool],
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Compute scaling * dy @ lora_B where dx or dA needs it, dA, dB and dbias."""
    need_dx, need_dA, need_dB, need_dbias = needs
    dS = None
    dA, dB, dbias = dy.new_empty(0), dy.new_empty(0), dy.new_empty(0)
    if lora_A is not None and (need_dx or need_dA):
        dS = lora_shrink(dy, float32(lora_B.t()), scale=scaling)
    if lora_A is not None and need_dA:
        rows = rows_of(x, lora_A.shape[1])
        dA = _lora_outer(dS, rows, keep_scale(keep, dropout_p), keep).to(lora_A.dtype)
    if lora_A is not None and need_dB:
        S = S.reshape(dy.shape[0], lora_B.shape[1])
        dB = _lora_outer(S, dy, scaling).t().to(lora_B.dtype).contiguous()
    if need_dbias:
        dbias = dy.sum(0)
    return dS, dA, dB, dbias


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


def _lora_outer(s: Tensor, x: Tensor, scale: float = 1.0, keep: Tensor | None = None) -> Tensor:
    """Compute scale * s[M, r].T @ (x * keep)[M, K], float32 [r, K]; s float32."""
    (M, K), r = x.shape, s.shape[1]
    gradient = torch.empty((r, K), dtype=torch.float32, device="cpu")
    library().lora_outer(
        *isa_and_threads(),
        M,
        K,
        r,
        address("s", s, torch.float32, M * r),
        address("x", x, x.dtype, M * K),
        dtype_code("x", x),
        optional("keep", keep, torch.bool, M * K),
        scale,
        fresh(gradient),
    )
    return gradient


def mask_of(keep: Tensor | None, rows: int, columns: int, dropout_p: float) -> Tensor | None:
    """Return the dropout mask row by row: it has the strides that x had, or is still a seed."""
    if keep is None or keep.dtype is torch.bool:
        return None if keep is None else keep.contiguous()
    return philox_keep(keep, rows, columns, dropout_p)
