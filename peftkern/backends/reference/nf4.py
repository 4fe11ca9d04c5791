"""Oracle of the codec of every 4-bit format, in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkern.formats.nf4 import ABSMAX_FLOOR
from peftkern.formats.table import NF4, Format, code_of, stored

CHUNK = 1 << 20  # values handled at once: scratch stays near 12 MB whatever the weight's size


def nf4_quantize(weight: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Quantize a float32, float16 or bfloat16 tensor of any shape to NF4.

    Returns: packed uint8 [(numel + 1) // 2] and absmax float32 [ceil(numel / blocksize)].
    """
    return absmax_quantize(weight, blocksize, NF4)


def absmax_quantize(weight: Tensor, blocksize: int, row: Format) -> tuple[Tensor, Tensor]:
    """Quantize to NF4 or FP4; of codes whose value is the same the first is for x <= 0."""
    flat = weight.detach().reshape(-1)
    numel = flat.numel()
    packed = torch.empty((numel + 1) // 2, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(-numel // blocksize), dtype=torch.float32, device=flat.device)
    ascending, order = code_of(row, flat.device).sort(stable=True)
    thresholds = (ascending[:-1] + ascending[1:]) / 2
    for start in range(0, numel, CHUNK):  # a multiple of every blocksize
        stop = min(start + CHUNK, numel)
        codes, scale = _quantize_blocks(flat[start:stop].float(), thresholds, blocksize)
        codes = order.to(torch.uint8)[codes.int()]
        if len(codes) % 2:
            codes = F.pad(codes, (0, 1), value=row.code.index(0.0))
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


def block_scales(w: list[Tensor], layout: list[int]) -> tuple[Tensor, Tensor | None]:
    """Return scale and zero point of every block in float32, as they are or rebuilt.

    absmax, nested: nested_code[q] * nested_absmax + nested_offset, each step rounded.
    e8m0: 2^(s - 127), NaN for 255. e4m3: the value of float8_e4m3fn times tensor_scale.
    """
    part = stored(w, layout)
    scales = part.format.scales
    if part.nested_blocksize:
        nested = part.aux.repeat_interleave(part.nested_blocksize)
        values = part.nested_code[part.scale.int()]
        return values * nested[: values.numel()] + part.nested_offset, None
    if scales == "e8m0":
        return e8m0_scales(part.scale), None
    if scales == "e4m3":
        return part.scale.view(torch.float8_e4m3fn).float() * part.aux, None
    return part.scale, part.aux


def e8m0_scales(scale: Tensor) -> Tensor:
    """Return 2^(scale - 127) in float32 of integers from 0 to 254, NaN of 255."""
    bits = scale.int() << 23
    bits = bits.masked_fill(scale == 0, 0x00400000)  # 2^-127 is subnormal
    return bits.masked_fill(scale == 255, 0x7FC00000).view(torch.float32)


def unnested(w: list[Tensor], layout: list[int]) -> tuple[list[Tensor], list[int]]:
    """Return a weight that `cut` takes: its absmax in float32 if that was nested, or the same."""
    form, blocksize, nested_blocksize, *shape = layout
    if not nested_blocksize:
        return w, layout
    return [w[0], block_scales(w, layout)[0]], [form, blocksize, 0, *shape]


def nf4_dequantize(w: list[Tensor], layout: list[int], dtype: torch.dtype) -> Tensor:
    """Rebuild a weight of any format: (code - zero) * scale in float32, rounded once to `dtype`."""
    out = torch.empty(stored(w, layout).shape, dtype=dtype, device=w[0].device)
    nf4_dequantize_out(w, layout, out)
    return out


def nf4_dequantize_out(w: list[Tensor], layout: list[int], out: Tensor) -> None:
    """Rebuild the weight in `out`, which has its shape and the dtype wanted."""
    part = stored(w, layout)
    packed, blocksize = part.packed, part.blocksize
    flat = out.view(-1) if out.is_contiguous() else out.new_empty(out.numel())
    numel = flat.numel()
    (scale, zero), code = block_scales(w, layout), code_of(part.format, packed.device)
    for start in range(0, numel, CHUNK):  # a multiple of every blocksize
        stop = min(start + CHUNK, numel)
        octets = packed[start // 2 : (stop + 1) // 2]
        halves = (octets >> 4, octets & 15)
        codes = torch.stack(halves[::-1] if part.format.low_first else halves, dim=1)
        values = code[codes.view(-1)[: stop - start].int()]
        blocks = slice(start // blocksize, -(-stop // blocksize))
        if zero is not None:
            values = values - zero[blocks].repeat_interleave(blocksize)[: stop - start]
        flat[start:stop] = values * scale[blocks].repeat_interleave(blocksize)[: stop - start]
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
