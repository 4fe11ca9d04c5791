"""Linear layer over a 4-bit weight, alone or with a low-rank update: QLoRA."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern.backends import ops
from peftkern.formats.block_weight import QuantizedWeight
from peftkern.formats.nf4 import NF4Weight
from peftkern.functional.arguments import (
    autocast_dtype,
    autocast_to,
    cast_for_autocast,
    check_factors,
    check_float,
    check_linear,
    check_quantized,
    check_stored,
    draw_keep,
    fold_scaling,
    is_symbol,
    late_cast,
    needs_gradient,
)
from peftkern.functional.autograd import LowRankLinear

__all__ = ["nf4_linear", "nf4_lora_linear"]


def nf4_linear(x: Tensor, w: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """Apply a linear layer over a frozen 4-bit weight.

    Kernels that decode its format never make it dense; without one, torch's operations do.

    y = x @ dequantize(w).T + bias

    Args: x [..., K] float16|bfloat16|float32|float64; w of shape (N, K) in any format (NF4, FP4,
        MXFP4, NVFP4, INT4); bias [N], any
        float dtype, cast to that of x. Under autocast x and bias are cast to its dtype.
    Returns: [..., N], dtype of x; each weight is rounded to the dtype of x at most once and
        products accumulate in float32.
    Raises: ValueError naming both sides on a shape, dtype or device mismatch.
    Gradients: x, bias; twice differentiable.   Error bound: kernels/NUMERICS.md#nf4_lora_linear
    Source: Dettmers et al. 2023, arXiv:2305.14314
    """
    return _nf4_lora_linear(x, w, None, None, 1.0, bias, 0.0)


def nf4_lora_linear(
    x: Tensor,
    w: QuantizedWeight,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float | Tensor,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Apply a linear layer over a frozen 4-bit weight plus a low-rank update: QLoRA.

    y = x @ dequantize(w).T + scaling * (dropout(x) @ lora_A.T) @ lora_B.T + bias

    Args: x, scaling, dropout_p, lora_A [r, K] and lora_B [N, r] as in `lora_linear`; w and bias as
        in `nf4_linear`.
    Returns: [..., N], dtype of x.
    Raises: ValueError naming both sides on a shape, dtype or device mismatch.
    Gradients: x, lora_A, lora_B, bias, a tensor scaling; twice differentiable unless
        lora_A is frozen. x is saved only if lora_A requires a gradient.
        Error bound: kernels/NUMERICS.md#nf4_lora_linear
    Source: Dettmers et al. 2023, eq. 5, arXiv:2305.14314
    """
    if lora_A is None or lora_B is None:
        raise ValueError("lora_A, lora_B: expected two tensors, got None; see nf4_linear")
    return _nf4_lora_linear(x, w, lora_A, lora_B, scaling, bias, dropout_p)


def _nf4_lora_linear(
    x: Tensor,
    w: QuantizedWeight,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float | Tensor,
    bias: Tensor | None,
    dropout_p: float,
) -> Tensor:
    check_float("x", x)
    if type(w) is not NF4Weight:
        check_quantized("w", w)
    dtype = autocast_dtype(x)
    if dtype is not None and x.dtype is not dtype:
        x = autocast_to(dtype, x)
    if len(w.shape) != 2 or w.packed.device != x.device:
        check_stored("w", x, w)
    if isinstance(bias, Tensor) and bias.dtype is not x.dtype and bias.is_floating_point():
        bias = bias.to(x.dtype)
    check_linear(x, *w.shape, bias, dropout_p)
    if lora_B is not None:
        check_factors(*w.shape, x.device, lora_A, lora_B)
        if type(scaling) is not float or (torch.compiler.is_compiling() and is_symbol(scaling)):
            _, lora_A, lora_B = cast_for_autocast(x, lora_A, lora_B)
            (lora_B, scaling), dtype = fold_scaling(lora_B, scaling, x), None
    keep = draw_keep(x, dropout_p) if dropout_p else None
    needs = needs_gradient(x, lora_A, lora_B, bias)
    if dtype is not None:
        lora_A, lora_B, dtype = late_cast(dtype, lora_A, lora_B, needs)
    if needs is None:
        args = (lora_A, lora_B, bias, scaling, keep, dropout_p)
        return ops.run("nf4_lora_linear_forward", x, w.tensors, w.layout, *args)[0]
    options = (scaling, dropout_p, needs, dtype, w.tensors, w.layout)
    return LowRankLinear.apply(x, lora_A, lora_B, bias, keep, None, options)
