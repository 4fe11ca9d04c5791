"""Oracle of the linear layer over a quantized weight with a low-rank update, in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from peftkern.backends.reference.lora_linear import lora_linear_backward, lora_linear_forward
from peftkern.backends.reference.nf4 import nf4_dequantize


def nf4_lora_linear_forward(
    x: Tensor,
    w: list[Tensor],
    layout: list[int],
    *adapter: Any,
    linear: Callable[..., tuple[Tensor, Tensor]] = lora_linear_forward,
    dequantize: Callable[..., Tensor] = nf4_dequantize,
) -> tuple[Tensor, Tensor]:
    """Run a back end's `lora_linear_forward` over a weight dequantized to the dtype of x."""
    return linear(x, dequantize(w, layout, x.dtype), *adapter)


def nf4_lora_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    S: Tensor | None,
    w: list[Tensor],
    layout: list[int],
    *adapter: Any,
    linear: Callable[..., tuple[Tensor, ...]] = lora_linear_backward,
    dequantize: Callable[..., Tensor] = nf4_dequantize,
) -> tuple[Tensor, ...]:
    """Run a back end's `lora_linear_backward` likewise; only dx reads the weight."""
    *_, (need_dx, _, _, _) = adapter
    weight = dequantize(w, layout, dy.dtype) if need_dx else None
    return linear(dy, x, S, weight, *adapter)
