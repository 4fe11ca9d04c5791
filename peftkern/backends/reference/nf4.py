"""Oracle of the NF4 codec, in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkern.formats.nf4 import ABSMAX_FLOOR, nf4_code, nf4_midpoints
from peftkern.formats.table import stored

_CHUNK = 1 << 20  # values handled at once: scratch stays near 12 MB whatever the weight's size


def nf4_quantize(weight: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Quantize a float32, float16 or bfloat16 tensor of any shape to NF4.

    Returns: packed uint8 [(numel + 1) // 2] and absmax float32 [ceil(numel / blocksize)].
    """
    flat = weight.detach().reshape(-1)
    numel = flat.numel()
    packed = torch.empty((numel + 1) // 2, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(-numel // blocksize), dtype=torch.float32, device=flat.device)
    thresholds = torch.tensor(nf4_midpoints(), dtype=torch.float32, device=flat.device)
    for start in range(0, numel, _CHUNK):  # a multiple of every blocksize
        stop = min(start + _CHUNK, numel)
        codes, scale = _quantize_blocks(flat[start:stop].float(), thresholds, blocksize)
        if len(codes) % 2:
            codes = F.pad(codes, (0, 1), value=7)
        packed[start // 2 : (stop + 1) // 2] = codes[::2] << 4 | codes[1::2]
        absmax[start // blocksize : -(-stop // blocksize)] = scale
    return packed, absmax


def nf4_quantize_absmax(
    absmax: Tensor, offset: Tensor, code: Tensor, blocksize: int
) -> tuple[Tensor, Tensor]:
    """Quantize `absmax - offset` to the nearest of 256 ascending values, in blocks.

    Returns: q uint8 [nblocks] and nested_absmax float32 [ceil(nblocks / blocksize)].
    """
    return _quantize_blocks(absmax - offset, (code[:-1] + code[1:]) / 2, blocksize)


def nf4_absmax(w: list[Tensor], layout: list[int]) -> Tensor:
    """Return the float32 absmax of every block: as it is, or rebuilt from its nested form."""
    weight = stored(w, layout)
    if weight.nested_absmax is None:
        return weight.absmax
    scale = weight.nested_absmax.repeat_interleave(weight.nested_blocksize)
    values = weight.nested_code[weight.absmax.int()]
    return values * scale[: values.numel()] + weight.nested_offset


def nf4_dequantize(w: list[Tensor], layout: list[int], dtype: torch.dtype) -> Tensor:
    """Rebuild the weight: NF4_CODE[code] * absmax in float32, rounded once to `dtype`."""
    out = torch.empty(stored(w, layout).shape, dtype=dtype, device=w[0].device)
    nf4_dequantize_out(w, layout, out)
    return out


def nf4_dequantize_out(w: list[Tensor], layout: list[int], out: Tensor) -> None:
    """Rebuild the weight in `out`, which has its shape and the dtype wanted."""
    packed, *_, blocksize, _, _ = stored(w, layout)
    flat = out.view(-1) if out.is_contiguous() else out.new_empty(out.numel())
    numel = flat.numel()
    scale, code = nf4_absmax(w, layout), nf4_code(packed.device)
    for start in range(0, numel, _CHUNK):
        stop = min(start + _CHUNK, numel)
        octets = packed[start // 2 : (stop + 1) // 2]
        codes = torch.stack((octets >> 4, octets & 15), dim=1).view(-1)[: stop - start]
        blocks = scale[start // blocksize : -(-stop // blocksize)]
        flat[start:stop] = code[codes.int()] * blocks.repeat_interleave(blocksize)[: stop - start]
    if not out.is_contiguous():
        out.copy_(flat.view(out.shape))


def _quantize_blocks(values: Tensor, thresholds: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Return the nearest codes (uint8) of float32 values over their block's absmax, and that."""
    numel = len(values)
    padded = F.pad(values, (0, -numel % blocksize)).view(-1, blocksize)
    absmax = padded.abs().amax(dim=1)
    scaled = padded * (1.0 / absmax.clamp(min=ABSMAX_FLOOR)).unsqueeze(1)
    codes = torch.bucketize(scaled.view(-1)[:numel], thresholds, out_int32=True)
    return codes.to(torch.uint8), absmax
