"""Oracle of DoRA's norms, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern.backends.reference.nf4 import nf4_dequantize

_CHUNK = 1 << 20  # values handled at once: scratch stays near 12 MB whatever the weight's size


def dora_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """Return the row norms [N] of weight + scaling * lora_B @ lora_A, a block of rows at a time.

    Returns: float64 if the weight or a factor is, else float32, in which it accumulates.
    """
    wide = torch.float64 in (weight.dtype, lora_A.dtype, lora_B.dtype)
    acc = torch.float64 if wide else torch.float32
    A, B = lora_A.to(acc), lora_B.to(acc) * scaling
    norm = weight.new_empty(weight.shape[0], dtype=acc)
    rows = max(1, _CHUNK // max(weight.shape[1], 1))
    for start in range(0, len(norm), rows):
        block = slice(start, start + rows)
        total = torch.addmm(weight[block].to(acc), B[block], A)
        norm[block] = torch.linalg.vector_norm(total, dim=1)
    return norm


def nf4_dora_norm(
    w: list[Tensor],
    layout: list[int],
    dtype: torch.dtype,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
) -> Tensor:
    """Run `dora_norm` over a weight dequantized to values of `dtype`."""
    return dora_norm(nf4_dequantize(w, layout, dtype), lora_A, lora_B, scaling)
