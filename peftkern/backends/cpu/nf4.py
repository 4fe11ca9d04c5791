"""NF4 codec in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern.backends.cpu.module import isa_and_threads, library, refusal_dense, refusal_device
from peftkern.backends.decoded import refusal_format
from peftkern.backends.pointers import (
    DTYPE_CODES,
    address,
    check_blocksize,
    dtype_code,
    fresh,
    weight,
)

refusal_quantize = refusal_dense
refusal_quantize_absmax = refusal_device


def refusal_dequantize(w: list[Tensor], layout: list[int], dtype: torch.dtype) -> str | None:
    """Refuse formats and dtypes of the result."""
    if dtype not in DTYPE_CODES:
        return f"the dtype is {dtype}"
    return refusal_format("cpu", layout) or refusal_device(w[0])


def refusal_dequantize_out(w: list[Tensor], layout: list[int], out: Tensor) -> str | None:
    """Refuse formats and dtypes of `out`."""
    return refusal_dequantize(w, layout, out.dtype)


def nf4_quantize(dense: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    dense, numel = dense.contiguous(), dense.numel()
    check_blocksize("blocksize", blocksize)
    packed = torch.empty((numel + 1) // 2, dtype=torch.uint8, device="cpu")
    absmax = torch.empty(-(-numel // blocksize), dtype=torch.float32, device="cpu")
    library().nf4_quantize(
        *isa_and_threads(),
        address("weight", dense, dense.dtype, numel),
        dtype_code("weight", dense),
        numel,
        blocksize,
        fresh(packed),
        packed.numel(),
        fresh(absmax),
        absmax.numel(),
    )
    return packed, absmax


def nf4_quantize_absmax(
    absmax: Tensor, offset: Tensor, code: Tensor, blocksize: int
) -> tuple[Tensor, Tensor]:
    absmax, code, n = absmax.contiguous(), code.contiguous(), absmax.numel()
    check_blocksize("blocksize", blocksize)
    q = torch.empty(n, dtype=torch.uint8, device="cpu")
    nested_absmax = torch.empty(-(-n // blocksize), dtype=torch.float32, device="cpu")
    address("offset", offset, torch.float32, 1)
    library().nf4_quantize_absmax(
        torch.get_num_threads(),
        address("absmax", absmax, torch.float32, n),
        n,
        float(offset),
        address("code", code, torch.float32, 256),
        blocksize,
        fresh(q),
        fresh(nested_absmax),
        nested_absmax.numel(),
    )
    return q, nested_absmax


def nf4_dequantize(w: list[Tensor], layout: list[int], dtype: torch.dtype) -> Tensor:
    out = torch.empty(layout[3:], dtype=dtype, device="cpu")
    _dequantize(w, layout, out, True)
    return out


def nf4_dequantize_out(w: list[Tensor], layout: list[int], out: Tensor) -> None:
    if out.is_contiguous():
        _dequantize(w, layout, out, False)
    else:
        out.copy_(nf4_dequantize(w, layout, out.dtype).view(out.shape))


def _dequantize(w: list[Tensor], layout: list[int], out: Tensor, is_fresh: bool) -> None:
    """Write to a contiguous `out`; one that is fresh is written past the caches."""
    numel = out.numel()
    library().nf4_dequantize(
        *isa_and_threads(),
        weight(w, layout),
        address("out", out, out.dtype, numel),
        dtype_code("out", out),
        numel,
        is_fresh,
    )
