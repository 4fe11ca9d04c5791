"""The gate of experts in C++: one pass over its input, and one for its gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern.backends.cpu.module import float32, isa_and_threads, library, refusal_dense
from peftkern.backends.pointers import address, dtype_code, fresh

refusal_forward = refusal_backward = refusal_dense


def swiglu_forward(gate_up: Tensor, row_weights: Tensor) -> Tensor:
    u, w = gate_up.contiguous(), float32(row_weights)
    R, inner = u.shape[0], u.shape[1] // 2
    a = u.new_empty(R, inner)
    library().swiglu_forward(
        *isa_and_threads(),
        *(R, inner),
        address("gate_up", u, u.dtype, 2 * R * inner),
        dtype_code("gate_up", u),
        address("row_weights", w, torch.float32, R),
        fresh(a),
    )
    return a


def swiglu_backward(
    da: Tensor, gate_up: Tensor, row_weights: Tensor, need_gate_up: bool, need_weights: bool
) -> tuple[Tensor, Tensor]:
    da, u, w = da.contiguous(), gate_up.contiguous(), float32(row_weights)
    R, inner = u.shape[0], u.shape[1] // 2
    du = u.new_empty(u.shape if need_gate_up else 0)
    dw = w.new_empty(R if need_weights else 0)
    library().swiglu_backward(
        *isa_and_threads(),
        *(R, inner),
        address("gate_up", u, u.dtype, 2 * R * inner),
        dtype_code("gate_up", u),
        address("row_weights", w, torch.float32, R),
        address("da", da, u.dtype, R * inner),
        fresh(du if need_gate_up else None),
        fresh(dw if need_weights else None),
    )
    return du, dw
