"""Linear layer over a quantized weight with a low-rank update: decoded, then as a dense one."""

from __future__ import annotations

from torch import Tensor

from peftkern.backends import ops
from peftkern.backends.torch.lora_linear import lora_linear_backward, lora_linear_forward


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
    """Run `lora_linear_forward` over a weight that the best back end for it has decoded."""
    weight = ops.nf4_dequantize(w, layout, x.dtype)
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
    """Run `lora_linear_backward` likewise; only dx reads the weight."""
    weight = ops.nf4_dequantize(w, layout, dy.dtype) if needs[0] else None
    return lora_linear_backward(dy, x, S, weight, lora_A, lora_B, scaling, keep, dropout_p, needs)
