"""NF4 decoding by lookup: a byte is the index of the two values that it stands for."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from peftkern.backends.reference.nf4 import nf4_absmax
from peftkern.backends.torch.chunks import chunks
from peftkern.formats.nf4 import nf4_code
from peftkern.formats.table import stored


def nf4_dequantize(w: list[Tensor], layout: list[int], dtype: torch.dtype) -> Tensor:
    """Rebuild the weight: NF4_CODE[code] * absmax in float32, rounded once to `dtype`."""
    out = torch.empty(layout[3:], dtype=dtype, device=w[0].device)
    nf4_dequantize_out(w, layout, out)
    return out


def nf4_dequantize_out(w: list[Tensor], layout: list[int], out: Tensor) -> None:
    """Rebuild the weight in `out`, which has its shape and the dtype wanted."""
    packed, *_, blocksize, _, _ = stored(w, layout)
    flat = out.view(-1) if out.is_contiguous() else out.new_empty(out.numel())
    scale, pairs = nf4_absmax(w, layout), _pairs(packed.device)
    whole = flat.numel() // blocksize
    for blocks in chunks(whole, blocksize, packed.device):
        octets = packed[blocks.start * blocksize // 2 : blocks.stop * blocksize // 2]
        values = flat[blocks.start * blocksize : blocks.stop * blocksize]
        _decode(octets, scale[blocks], pairs, values)
    if whole < len(scale):  # a part of a block, perhaps of an odd length
        octets = packed[whole * blocksize // 2 :]
        _decode(octets, scale[whole:], pairs, flat[whole * blocksize :])
    if not out.is_contiguous():
        out.copy_(flat.view(out.shape))


@functools.cache
def _pairs(device: torch.device) -> Tensor:
    """Return the two float32 values of each byte, high nibble first, as one int64.

    2 KB for each device: to copy them at every call would wait for a GPU.
    """
    code = nf4_code(device)
    pairs = torch.stack((code.repeat_interleave(16), code.repeat(16)), dim=1)
    return pairs.view(torch.int64).view(-1)


def _decode(octets: Tensor, scale: Tensor, pairs: Tensor, out: Tensor) -> None:
    """Write to `out`, flat, the values of as many equal blocks as there are scales."""
    values = pairs.index_select(0, octets.int()).view(torch.float32)[: out.numel()]
    blocks = (len(scale), -1)
    torch.mul(values.view(blocks), scale[:, None], out=out.view(blocks))
