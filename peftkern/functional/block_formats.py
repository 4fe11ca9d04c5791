"""Quantizers of MXFP4, NVFP4 and INT4, in torch's operations."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern.backends.reference.quantizers import (
    int4_quantize,
    mxfp4_quantize,
    nvfp4_quantize,
    nvfp4_tensor_scale,
)
from peftkern.formats.block_weight import BlockWeight
from peftkern.formats.table import INT4, MXFP4, NVFP4, Format
from peftkern.functional.arguments import mismatch
from peftkern.functional.nf4 import check_quantizable

__all__ = ["quantize_int4", "quantize_mxfp4", "quantize_nvfp4"]


def quantize_mxfp4(weight: Tensor) -> BlockWeight:
    """Quantize a weight to MXFP4: e2m1 codes, and a power of two for each 32 of a row.

    scale = 2^(floor(log2(largest)) - 2); values beyond 6 * scale saturate, ties go to even codes.

    Args: weight [..., K], K a multiple of 32, float16|bfloat16|float32.
    Returns: BlockWeight of the same shape, dtype and device. A block with a NaN or Inf is NaN.
    Raises: ValueError on another dtype or shape.
    Gradients: none.   Source: OCP Microscaling Formats 1.0, section 6.3
    """
    _check(weight, MXFP4, 32)
    packed, scale = mxfp4_quantize(weight)
    return BlockWeight("mxfp4", packed, scale, tuple(weight.shape), weight.dtype, 32)


def quantize_nvfp4(weight: Tensor, *, tensor_scale: Tensor | None = None) -> BlockWeight:
    """Quantize a weight to NVFP4: e2m1 codes, an e4m3 scale for each 16 of a row, and one for all.

    scale = e4m3(largest of the block / 6 / tensor_scale); ties go to even codes.

    Args: weight [..., K], K a multiple of 16, float16|bfloat16|float32; tensor_scale, one float32
        value, or None: the largest value over 448 * 6.
    Returns: BlockWeight of the same shape, dtype and device.
    Raises: ValueError on another dtype or shape.
    Gradients: none.   Source: kernels/FORMATS.md#nvfp4
    """
    _check(weight, NVFP4, 16)
    if tensor_scale is None:
        tensor_scale = nvfp4_tensor_scale(weight)
    elif (
        not isinstance(tensor_scale, Tensor)
        or tensor_scale.numel() != 1
        or tensor_scale.dtype is not torch.float32
        or tensor_scale.device != weight.device
    ):
        raise mismatch("tensor_scale", f"one float32 value on {weight.device}", tensor_scale)
    tensor_scale = tensor_scale.detach().reshape(1)
    packed, scale = nvfp4_quantize(weight, tensor_scale)
    shape = tuple(weight.shape)
    return BlockWeight("nvfp4", packed, scale, shape, weight.dtype, 16, tensor_scale)


def quantize_int4(weight: Tensor, *, blocksize: int = 128, symmetric: bool = False) -> BlockWeight:
    """Quantize a weight to INT4: codes 0 to 15, a scale and a zero point for each group of a row.

    value = (code - zero) * scale, from the least to the largest value of the group and zero, or
    symmetric around code 8.

    Args: weight [..., K], K a multiple of blocksize, float16|bfloat16|float32; blocksize 32, 64,
        128 or 256.
    Returns: BlockWeight of the same shape, dtype and device.
    Raises: ValueError on another dtype, blocksize or shape.
    Gradients: none.   Source: kernels/FORMATS.md#int4
    """
    _check(weight, INT4, blocksize)
    if not isinstance(symmetric, bool):
        raise mismatch("symmetric", "True or False", symmetric)
    packed, scale, zero = int4_quantize(weight, blocksize, symmetric)
    shape = tuple(weight.shape)
    return BlockWeight("int4", packed, scale, shape, weight.dtype, blocksize, zero=zero)


def _check(weight: Tensor, row: Format, blocksize: int) -> None:
    check_quantizable(weight, row.blocksizes, blocksize)
    if weight.dim() == 0 or weight.shape[-1] % blocksize:
        raise mismatch("weight", f"[..., K] with K a multiple of {blocksize}", weight)
