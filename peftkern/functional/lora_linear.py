"""Linear layer with a low-rank update: LoRA."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern.backends import ops
from peftkern.functional.arguments import (
    autocast_dtype,
    autocast_to,
    cast_for_autocast,
    check_factors,
    check_float,
    check_frozen,
    check_linear,
    draw_keep,
    fold_scaling,
    is_symbol,
    late_cast,
    mismatch,
    needs_gradient,
)
from peftkern.functional.autograd import LowRankLinear

__all__ = ["lora_linear"]


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float | Tensor,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Apply a linear layer plus a low-rank update.

    y = x @ weight.T + scaling * (dropout(x) @ lora_A.T) @ lora_B.T + bias

    Args: x [..., K] float16|bfloat16|float32|float64; weight [N, K], dtype of x, frozen; lora_A
        [r, K] and lora_B [N, r], any float dtype (PEFT keeps them in float32); scaling, a number
        or a 0-dim tensor (read on its device, never on the host); bias [N], dtype of x; dropout_p
        in [0, 1], drawn from torch's generator: on a CPU exactly as nn.Dropout draws it, elsewhere
        as a seed. Under autocast all of them are cast to its dtype, as F.linear does.
    Returns: [..., N], dtype of x; the update accumulates in float32 (float64 for float64).
    Raises: ValueError naming both sides on a shape, dtype or device mismatch, and if weight
        requires a gradient.
    Gradients: x, lora_A, lora_B, bias, a tensor scaling; twice differentiable unless
        lora_A is frozen. x is saved only if lora_A requires a gradient.
        Error bound: kernels/NUMERICS.md#lora_linear
    Source: Hu et al. 2021, eq. 3, arXiv:2106.09685
    """
    check_float("x", x)
    check_frozen(weight)
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, weight, bias = [autocast_to(dtype, tensor) for tensor in (x, weight, bias)]
    if weight.dim() != 2 or weight.dtype is not x.dtype or weight.device != x.device:
        raise mismatch("weight", f"[N, K] {x.dtype} on {x.device} like x", weight)
    check_linear(x, *weight.shape, bias, dropout_p)
    check_factors(*weight.shape, x.device, lora_A, lora_B)
    if type(scaling) is not float or (torch.compiler.is_compiling() and is_symbol(scaling)):
        _, lora_A, lora_B = cast_for_autocast(x, lora_A, lora_B)
        (lora_B, scaling), dtype = fold_scaling(lora_B, scaling, x), None
    keep = draw_keep(x, dropout_p) if dropout_p else None
    needs = needs_gradient(x, lora_A, lora_B, bias)
    if dtype is not None:
        lora_A, lora_B, dtype = late_cast(dtype, lora_A, lora_B, needs)
    if needs is None:
        args = (lora_A, lora_B, bias, scaling, keep, dropout_p)
        return ops.run("lora_linear_forward", x, weight, *args)[0]
    options = (scaling, dropout_p, needs, dtype, (), ())
    return LowRankLinear.apply(x, lora_A, lora_B, bias, keep, weight, options)
