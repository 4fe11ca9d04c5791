"""NF4 codec in CUDA C++."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern.backends.cuda.module import launching_on, library, refusal_device
from peftkern.backends.decoded import refusal_format
from peftkern.backends.pointers import (
    DTYPE_CODES,
    address,
    check_blocksize,
    dtype_code,
    fresh,
    weight,
)


def refusal_quantize(weight: Tensor) -> str | None:
    """Refuse dtypes and devices."""
    if weight.dtype not in DTYPE_CODES:
        return f"the dtype is {weight.dtype}"
    return refusal_device(weight.device)


def refusal_dequantize(w: list[Tensor], layout: list[int], dtype: torch.dtype) -> str | None:
    """Refuse formats, dtypes of the result, and devices."""
    if dtype not in DTYPE_CODES:
        return f"the dtype is {dtype}"
    return refusal_format("cuda", layout) or refusal_device(w[0].device)


def refusal_dequantize_out(w: list[Tensor], layout: list[int], out: Tensor) -> str | None:
    """Refuse formats, dtypes of `out`, and devices."""
    return refusal_dequantize(w, layout, out.dtype)


def nf4_quantize(dense: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    dense = dense.contiguous()
    check_blocksize("blocksize", blocksize)
    device, numel = dense.device, dense.numel()
    src = address("weight", dense, dense.dtype, numel, device)
    packed = torch.empty((numel + 1) // 2, dtype=torch.uint8, device=device)
    absmax = torch.empty(-(-numel // blocksize), dtype=torch.float32, device=device)
    with launching_on(device) as stream:
        library().nf4_quantize(
            stream,
            src,
            dtype_code("weight", dense),
            numel,
            blocksize,
            fresh(packed),
            packed.numel(),
            fresh(absmax),
            absmax.numel(),
        )
    return packed, absmax


def nf4_dequantize(w: list[Tensor], layout: list[int], dtype: torch.dtype) -> Tensor:
    out = torch.empty(tuple(layout[3:]), dtype=dtype, device=w[0].device)
    nf4_dequantize_out(w, layout, out)
    return out


def nf4_dequantize_out(w: list[Tensor], layout: list[int], out: Tensor) -> None:
    if not out.is_contiguous():
        out.copy_(nf4_dequantize(w, layout, out.dtype).view(out.shape))
        return
    numel, device = out.numel(), out.device
    at, code = address("out", out, out.dtype, numel, device), dtype_code("out", out)
    view = weight(w, layout, device)
    with launching_on(device) as stream:
        library().nf4_dequantize(stream, view, at, code, numel)
