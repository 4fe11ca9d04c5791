"""Codec of NF4 and FP4, and dequantization of every 4-bit format."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern.backends import ops
from peftkern.backends.reference.nf4 import absmax_quantize
from peftkern.formats.block_weight import QuantizedWeight
from peftkern.formats.nf4 import BLOCKSIZES, NESTED_BLOCKSIZE, NF4Weight, dynamic_map
from peftkern.formats.table import FP4
from peftkern.functional.arguments import (
    DTYPES,
    WEIGHT_DTYPES,
    check_dense,
    check_float,
    check_quantized,
    mismatch,
)

__all__ = ["dequantize", "dequantize_nf4", "quantize_fp4", "quantize_nf4"]


def quantize_nf4(weight: Tensor, *, blocksize: int = 64, double_quant: bool = True) -> NF4Weight:
    """Quantize a weight to NF4.

    Args: weight, any shape, float16|bfloat16|float32; blocksize 32, 64, ... or 4096; double_quant
        keeps absmax in 8 bits (in blocks of 256) instead of 32.
    Returns: NF4Weight of the same shape, dtype and device.
    Raises: ValueError on another dtype or blocksize.
    Gradients: none.   Source: Dettmers et al. 2023, arXiv:2305.14314
    """
    check_quantizable(weight, BLOCKSIZES, blocksize)
    packed, absmax = ops.nf4_quantize(weight.detach(), blocksize)
    w = NF4Weight(packed, absmax, tuple(weight.shape), blocksize, weight.dtype)
    return nest_absmax(w) if double_quant else w


def quantize_fp4(weight: Tensor, *, blocksize: int = 64, double_quant: bool = True) -> NF4Weight:
    """Quantize a weight to bitsandbytes' FP4, in torch's operations.

    Args, Returns: as `quantize_nf4`; the weight's `quant_type` is "fp4".
    Raises: ValueError on another dtype or blocksize.
    Gradients: none.   Source: kernels/FORMATS.md#fp4
    """
    check_quantizable(weight, BLOCKSIZES, blocksize)
    packed, absmax = absmax_quantize(weight, blocksize, FP4)
    w = NF4Weight(packed, absmax, tuple(weight.shape), blocksize, weight.dtype, quant_type="fp4")
    return nest_absmax(w) if double_quant else w


def check_quantizable(weight: Tensor, blocksizes: tuple[int, ...], blocksize: int) -> None:
    """Raise ValueError unless a format with these sizes of blocks takes a weight."""
    check_dense("weight", weight)
    check_float("weight", weight, WEIGHT_DTYPES)
    if type(blocksize) is not int or blocksize not in blocksizes:
        raise mismatch("blocksize", f"one of {blocksizes}", blocksize)


def nest_absmax(w: NF4Weight) -> NF4Weight:
    """Return a weight of plain absmax with absmax in 8 bits, as `quantize_nf4` does."""
    absmax = w.absmax
    offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
    code = torch.tensor(dynamic_map(), dtype=torch.float32, device=absmax.device)
    q, nested = ops.nf4_quantize_absmax(absmax, offset, code, NESTED_BLOCKSIZE)
    pieces = (w.packed, q, w.shape, w.blocksize, w.dtype)
    return NF4Weight(*pieces, nested, code, offset, NESTED_BLOCKSIZE, w.quant_type)


def dequantize(
    w: QuantizedWeight, dtype: torch.dtype | None = None, out: Tensor | None = None
) -> Tensor:
    """Dequantize a 4-bit weight of any format; NF4 and FP4 bit for bit as bitsandbytes does.

    value = cast((code - zero) * scale): in float32, then one rounding; zero is 0 but in INT4.

    Args: dtype of the result, that of `out` or of the original weight by default; out, a tensor of
        the weight's shape on its device to write to, outside of autograd.
    Returns: a tensor of w.shape, `out` if that is given.
    Raises: ValueError naming both sides on a shape, dtype or device mismatch of `out`.
    Gradients: none.   Source: kernels/FORMATS.md
    """
    check_quantized("w", w)
    if dtype is not None and (not isinstance(dtype, torch.dtype) or dtype not in DTYPES):
        raise mismatch("dtype", f"one of {DTYPES}", dtype)
    if out is None:
        return ops.nf4_dequantize(w.tensors, w.layout, w.dtype if dtype is None else dtype)
    check_float("out", out)
    wanted = out.dtype if dtype is None else dtype
    if out.shape != w.shape or out.dtype is not wanted or out.device != w.device:
        raise mismatch("out", f"{list(w.shape)} {wanted} on {w.device}", out)
    if out.requires_grad and torch.is_grad_enabled():
        raise ValueError("out: expected a tensor outside of autograd, got one that requires grad")
    ops.nf4_dequantize_out(w.tensors, w.layout, out)
    # Autograd must see that what it may have saved is gone.
    if not torch.compiler.is_compiling() and not out.is_inference():
        torch.autograd.graph.increment_version(out)
    return out


dequantize_nf4 = dequantize  # its name when there was one format
