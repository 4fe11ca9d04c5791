"""The "cuda" back end: ops on CUDA C++ kernels, where they need what Triton does not give.

One function per op with the op's signature, and the predicates that say why a call cannot run here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern import native_cuda


def supports_quantize(weight: Tensor, *args: object) -> str | None:
    """Reason against nf4_quantize."""
    if weight.dtype not in native_cuda.DTYPE_CODES:
        return f"the dtype is {weight.dtype}"
    return native_cuda.unserved(weight.device)


def supports_dequantize(packed: Tensor, *args: object) -> str | None:
    """Reason against nf4_dequantize and nf4_dequantize_out: the dtype asked for, or the device."""
    dtype = args[-1].dtype if isinstance(args[-1], Tensor) else args[-1]
    if dtype not in native_cuda.DTYPE_CODES:
        return f"the dtype is {dtype}"
    return native_cuda.unserved(packed.device)


def nf4_quantize(weight: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    return native_cuda.nf4_quantize(weight.contiguous(), blocksize)


def nf4_dequantize(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    nested_offset: Tensor | None,
    blocksize: int,
    nested_blocksize: int,
    shape: list[int],
    dtype: torch.dtype,
) -> Tensor:
    out = torch.empty(tuple(shape), dtype=dtype, device=packed.device)
    tensors = (packed, absmax, nested_absmax, nested_code, nested_offset)
    native_cuda.nf4_dequantize((*tensors, blocksize, nested_blocksize), out)
    return out


def nf4_dequantize_out(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    nested_offset: Tensor | None,
    blocksize: int,
    nested_blocksize: int,
    out: Tensor,
) -> None:
    tensors = (packed, absmax, nested_absmax, nested_code, nested_offset)
    dense = (
        out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
    )
    native_cuda.nf4_dequantize((*tensors, blocksize, nested_blocksize), dense)
    if dense is not out:
        out.copy_(dense)
