"""DoRA's row norms in C++: the updated weight is never formed."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern.backends.cpu.module import float32, isa_and_threads, library, refusal_dense
from peftkern.backends.decoded import refusal_format
from peftkern.backends.pointers import DTYPE_CODES, address, dtype_code, fresh, weight


def refusal_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> str | None:
    """Refuse float64 and integers."""
    return refusal_dense(lora_A) or refusal_dense(lora_B) or refusal_dense(weight)


def refusal_nf4_norm(
    layout: list[int], dtype: torch.dtype, lora_A: Tensor, lora_B: Tensor
) -> str | None:
    """Refuse formats, float64 and integers."""
    if reason := refusal_format("cpu", layout):
        return reason
    if dtype not in DTYPE_CODES:
        return f"the dtype is {dtype}"
    return refusal_dense(lora_A) or refusal_dense(lora_B)


def dora_norm(dense: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    dense = dense.contiguous()
    at = address("weight", dense, dense.dtype, dense.numel())
    return _norm(dense.shape, at, dtype_code("weight", dense), lora_A, lora_B, scaling)


def nf4_dora_norm(
    w: list[Tensor],
    layout: list[int],
    dtype: torch.dtype,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
) -> Tensor:
    return _norm(layout[3:], weight(w, layout), DTYPE_CODES[dtype], lora_A, lora_B, scaling)


def _norm(
    shape: list[int], at: int | tuple, code: int, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> Tensor:
    (N, K), r = shape, lora_A.shape[0]
    a, b = float32(lora_A), float32(lora_B) * scaling
    norm = torch.empty(N, dtype=torch.float32, device="cpu")
    library().dora_norm(
        *isa_and_threads(),
        N,
        K,
        r,
        at,
        code,
        address("lora_A", a, torch.float32, r * K),
        address("lora_B", b, torch.float32, N * r),
        fresh(norm),
    )
    return norm
