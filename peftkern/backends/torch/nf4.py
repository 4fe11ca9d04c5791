"""Decoding of 4-bit weights by lookup: a byte is the index of the two values it stands for."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from peftkern.backends.reference.nf4 import block_scales
from peftkern.backends.torch.chunks import chunks
from peftkern.formats.table import FORMATS, code_of, stored


def nf4_dequantize(w: list[Tensor], layout: list[int], dtype: torch.dtype) -> Tensor:
    """Rebuild a weight of any format: (code - zero) * scale in float32, rounded once to `dtype`."""
    out = torch.empty(layout[3:], dtype=dtype, device=w[0].device)
    nf4_dequantize_out(w, layout, out)
    return out


def nf4_dequantize_out(w: list[Tensor], layout: list[int], out: Tensor) -> None:
    """Rebuild the weight in `out`, which has its shape and the dtype wanted."""
    part = stored(w, layout)
    packed, blocksize = part.packed, part.blocksize
    flat = out.view(-1) if out.is_contiguous() else out.new_empty(out.numel())
    (scale, zero), pairs = block_scales(w, layout), _pairs(int(layout[0]), packed.device)
    whole = flat.numel() // blocksize

    def decode(octets: Tensor, blocks: slice, values: Tensor) -> None:
        _decode(octets, scale[blocks], None if zero is None else zero[blocks], pairs, values)

    for blocks in chunks(whole, blocksize, packed.device):
        first, last = blocks.start * blocksize, blocks.stop * blocksize
        decode(packed[first // 2 : last // 2], blocks, flat[first:last])
    if whole < len(scale):  # a part of a block, perhaps of an odd length
        first = whole * blocksize
        decode(packed[first // 2 :], slice(whole, None), flat[first:])
    if not out.is_contiguous():
        out.copy_(flat.view(out.shape))


@functools.cache
def _pairs(form: int, device: torch.device) -> Tensor:
    """Return the two float32 values of each byte in their order, as one int64.

    2 KB for each device: to copy them at every call would wait for a GPU.
    """
    code = code_of(FORMATS[form], device)
    halves = (code.repeat_interleave(16), code.repeat(16))
    pairs = torch.stack(halves[::-1] if FORMATS[form].low_first else halves, dim=1)
    return pairs.view(torch.int64).view(-1)


def _decode(octets: Tensor, scale: Tensor, zero: Tensor | None, pairs: Tensor, out: Tensor) -> None:
    """Write to `out`, flat, the values of as many equal blocks as there are scales."""
    values = pairs.index_select(0, octets.int()).view(torch.float32)[: out.numel()]
    values = values.view(len(scale), -1)
    if zero is not None:
        values.sub_(zero[:, None])
    torch.mul(values, scale[:, None], out=out.view(values.shape))
