"""Linear layer over groups of rows as torch's products, one group after the other.

A group is a linear layer with a low-rank update of its own. On a GPU the host reads the ends of the
groups, once a call.
"""

from __future__ import annotations

from torch import Tensor

from peftkern.backends import ops
from peftkern.backends.reference.grouped_linear import (
    dense_experts,
    grouped_backward,
    grouped_forward,
    nf4_experts,
)
from peftkern.backends.torch.lora_linear import lora_linear_backward, lora_linear_forward


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
    """Compute y and S."""
    N, expert = dense_experts(weight, transposed, lora_B, 1)
    args = (x, rows, offsets, N, expert, lora_A, lora_B, bias, scaling)
    return grouped_forward(lora_linear_forward, *args)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute dx, dA, dB and dbias; an empty tensor [0] for what is not wanted."""
    K, expert = dense_experts(weight, transposed, lora_A, 2)
    args = (dy, offsets, x, rows, S, K, expert, lora_A, lora_B, scaling, needs)
    return grouped_backward(lora_linear_backward, *args)


def nf4_grouped_linear_forward(
    x: Tensor,
    rows: Tensor | None,
    offsets: Tensor,
    w: list[Tensor],
    layout: list[int],
    transposed: bool,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    bias: Tensor | None,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """Compute y and S over weights that the best back end for it decodes, one at a time."""
    expert = nf4_experts(w, layout, transposed, ops.nf4_dequantize)
    args = (x, rows, offsets, layout[5 if transposed else 4], expert, lora_A, lora_B, bias, scaling)
    return grouped_forward(lora_linear_forward, *args)


def nf4_grouped_linear_backward(
    dy: Tensor,
    offsets: Tensor,
    x: Tensor | None,
    rows: Tensor | None,
    S: Tensor | None,
    w: list[Tensor],
    layout: list[int],
    transposed: bool,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute dx, dA, dB and dbias likewise; only dx reads the weights."""
    expert = nf4_experts(w, layout, transposed, ops.nf4_dequantize)
    K = layout[4 if transposed else 5]
    args = (dy, offsets, x, rows, S, K, expert, lora_A, lora_B, scaling, needs)
    return grouped_backward(lora_linear_backward, *args)
