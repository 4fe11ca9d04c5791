"""Oracle of the gate of most mixtures' experts, with each row's routing weight."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkern.backends.reference.lora_linear import accumulation_dtype

_CHUNK = 1 << 20  # values handled at once: scratch stays near 20 MB whatever the number of rows


def swiglu_forward(gate_up: Tensor, row_weights: Tensor) -> Tensor:
    """Compute silu(gate) * up * row_weights[:, None], rounded once.

    Args: gate_up [R, 2I], gate before up; row_weights [R] of any float dtype.
    Returns: [R, I] in the dtype of gate_up.
    """
    a = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
    for block in _blocks(gate_up):
        gate, up, w = _wide(gate_up[block], row_weights[block])
        a[block] = F.silu(gate) * up * w
    return a


def swiglu_backward(
    da: Tensor, gate_up: Tensor, row_weights: Tensor, need_gate_up: bool, need_weights: bool
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of `swiglu_forward`.

    Returns: that of gate_up, like it, and of row_weights in the accumulation dtype, each [0] if it
        is not needed.
    """
    du = gate_up.new_empty(gate_up.shape if need_gate_up else 0)
    dtype = accumulation_dtype(gate_up)
    dw = gate_up.new_empty(gate_up.shape[0] if need_weights else 0, dtype=dtype)
    for block in _blocks(gate_up):
        gate, up, w = _wide(gate_up[block], row_weights[block])
        silu, da_wide = F.silu(gate), da[block].to(gate.dtype)
        if need_weights:
            dw[block] = torch.linalg.vecdot(da_wide, silu * up)
        if need_gate_up:
            scaled, s = da_wide * w, gate.sigmoid()
            dgate = scaled * up * (s * (1 + gate * (1 - s)))
            du[block] = torch.cat([dgate, scaled * silu], dim=1)
    return du, dw


def _blocks(gate_up: Tensor) -> Iterator[slice]:
    rows = max(1, _CHUNK // max(1, gate_up.shape[1]))
    return (slice(first, first + rows) for first in range(0, gate_up.shape[0], rows))


def _wide(gate_up: Tensor, row_weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(gate_up)
    return *gate_up.to(dtype).chunk(2, dim=1), row_weights.to(dtype)[:, None]
