"""Quantizers of the formats whose blocks end with rows: MXFP4, NVFP4, INT4. In plain torch.

Each takes a weight of whole blocks of any shape and returns packed codes, low nibble first, and its
scales as the format stores them: kernels/FORMATS.md.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from peftkern.backends.reference.nf4 import CHUNK, e8m0_scales

E2M1_MAX, E4M3_MAX = 6.0, 448.0
_E4M3_LEAST = 2.0**-6  # the smallest normal one: torchao lets no scale be less
# x is above as many of these as its code counts: halfway between neighbors, from which a tie goes
# to the even code, down where that is the lower and up where the threshold lies just below it.
_BELOW = 1 - 2.0**-24  # of a float32 from 0.5 on, times which it is rounded to the one below
_E2M1_STEPS = (0.25, 0.75 * _BELOW, 1.25, 1.75 * _BELOW, 2.5, 3.5 * _BELOW, 5.0)


def mxfp4_quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize with scales 2^(floor(log2(largest)) - 2); a block with a NaN or Inf is NaN.

    Values beyond 6 * scale saturate, ties go to the even code, as in section 6.3 of the OCP
    specification and torchao's `to_mx` with `ScaleCalculationMode.FLOOR`.
    """

    def blocks(x: Tensor) -> tuple[Tensor, Tensor]:
        largest = x.abs().amax(1)
        scale = ((largest.view(torch.int32) >> 23) - 2).clamp(min=0)
        scale = scale.where(largest.isfinite(), 255)
        inverse = (254 - scale).where(scale < 255, 255)
        return _e2m1(x * e8m0_scales(inverse)[:, None]), scale.to(torch.uint8)

    return _by_chunks(weight, 32, blocks)


def nvfp4_quantize(weight: Tensor, tensor_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize with scales e4m3(largest / 6 / tensor_scale) of at least 2^-6, as torchao does.

    Args: tensor_scale float32 [1]; that of `nvfp4_tensor_scale` uses all of e4m3's range.
    """

    def blocks(x: Tensor) -> tuple[Tensor, Tensor]:
        scale = x.abs().amax(1) / E2M1_MAX / tensor_scale
        scale = scale.clamp(_E4M3_LEAST, E4M3_MAX).to(torch.float8_e4m3fn)
        inverse = (1.0 / tensor_scale) / scale.float()
        return _e2m1(x * inverse[:, None]), scale.view(torch.uint8)

    return _by_chunks(weight, 16, blocks)


def nvfp4_tensor_scale(weight: Tensor) -> Tensor:
    """Return largest / (448 * 6), by which the largest block's scale is e4m3's largest; 1 for 0."""
    flat = weight.detach().reshape(-1)
    largest = flat.abs().amax() if flat.numel() else flat.new_zeros(())
    scale = largest.float() / (E4M3_MAX * E2M1_MAX)
    return scale.masked_fill(scale == 0, 1.0).view(1)


def int4_quantize(weight: Tensor, blocksize: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize with scale and zero point of each block, as torchao's affine primitives do.

    scale = (max(x, 0) - min(x, 0)) / 15 and zero = round(-min(x, 0) / scale), or symmetric
    scale = max(|x|) / 7.5 and zero = 8; code = clamp(round(x / scale) + zero, 0, 15).

    Returns: packed, scale and zero, both float32.
    """
    zeros = []

    def blocks(x: Tensor) -> tuple[Tensor, Tensor]:
        least, most = x.amin(1).clamp(max=0), x.amax(1).clamp(min=0)
        span = torch.maximum(-least, most) / 7.5 if symmetric else (most - least) / 15
        scale = span.clamp(min=torch.finfo(torch.float32).smallest_normal)
        zero = (0 - (least / scale).round()).clamp(0, 15)
        zeros.append(torch.full_like(zero, 8.0) if symmetric else zero)
        codes = ((x * (1.0 / scale)[:, None]).round() + zeros[-1][:, None]).clamp(0, 15)
        return codes.nan_to_num().to(torch.uint8), scale

    packed, scale = _by_chunks(weight, blocksize, blocks)
    return packed, scale, torch.cat(zeros) if zeros else torch.empty_like(scale)


def _e2m1(x: Tensor) -> Tensor:
    """Return the nearest codes, with the sign of x even where that is zero; NaN saturates."""
    steps = torch.tensor(_E2M1_STEPS, dtype=torch.float32, device=x.device)
    codes = torch.bucketize(x.abs(), steps, out_int32=True)
    return (codes | x.signbit().int() << 3).to(torch.uint8)


def _by_chunks(
    weight: Tensor, blocksize: int, blocks: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Quantize float32 blocks [n, blocksize] at a time to codes and scales, and pack the codes."""
    flat = weight.detach().reshape(-1)
    packed, scales = [], []
    for start in range(0, max(flat.numel(), 1), CHUNK):
        codes, scale = blocks(flat[start : start + CHUNK].float().view(-1, blocksize))
        codes = codes.view(-1)
        packed.append(codes[1::2] << 4 | codes[::2])
        scales.append(scale)
    return torch.cat(packed), torch.cat(scales)
