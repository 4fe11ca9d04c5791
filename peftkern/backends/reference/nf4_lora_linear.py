"""Oracle of the linear layer over a quantized weight with a low-rank update, in plain torch."""

from __future__ import annotations

from torch import Tensor

from peftkern.backends.reference.lora_linear import lora_linear_backward, lora_linear_forward
from peftkern.backends.reference.nf4 import nf4_dequantize


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
    """Run `lora_linear_forward` over a weight dequantized straight to the dtype of x."""
    weight = nf4_dequantize(w, layout, x.dtype)
    return lora_linear_forward(x, weight, lora_A, lora_B, bias, scaling, keep, dropout_p)


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
    """Run `lora_linear_backward` over a weight dequantized straight to the dtype of dy."""
    weight = nf4_dequantize(w, layout, dy.dtype) if needs[0] else None  # only dx reads it
    return lora_linear_backward(dy, x, S, weight, lora_A, lora_B, scaling, keep, dropout_p, needs)
