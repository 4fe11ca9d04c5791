"""DoRA's row norms over a quantized weight. Over a dense one the reference is chunked already."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern.backends import ops
from peftkern.backends.reference.dora import dora_norm


def nf4_dora_norm(
    w: list[Tensor],
    layout: list[int],
    dtype: torch.dtype,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
) -> Tensor:
    """Run `dora_norm` over a weight that the best back end for it has decoded."""
    return dora_norm(ops.nf4_dequantize(w, layout, dtype), lora_A, lora_B, scaling)
