"""Edges of noise: the largest singular value that the rounding of a weight alone would have.

A matrix [m, n] of independent errors has one near

    sigma* = rms(error) * (sqrt(m) + sqrt(n)).

The error of a 16-bit value has the variance ulp^2 / 12. That of a value in 4 bits lies between the
midpoints of its code and the codes beside it, a below it and b above: (a^2 - a b + b^2) / 3 of the
square of the scale. Of normal values it is 0 to 15 % above what the formats lose (November 2026).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkern.backends.reference.nf4 import block_scales
from peftkern.formats.block_weight import QuantizedWeight
from peftkern.formats.table import FORMATS

_PANEL = 1 << 21  # values
# Bits of a number that are its power of two.
_EXPONENT = {
    torch.bfloat16: (torch.int16, 0x7F80, 7),
    torch.float16: (torch.int16, 0x7C00, 10),
    torch.float32: (torch.int32, 0x7F800000, 23),
}
ROUNDED = tuple(_EXPONENT)  # dtypes


def noise_edge(energy: float, shape: tuple[int, ...]) -> float:
    """Return sigma* of errors [m, n] with a sum of squares."""
    return math.sqrt(energy / math.prod(shape)) * sum(map(math.sqrt, shape))


def dense_rounding(weight: Tensor) -> float:
    """Return the expected sum of squares of the rounding of a weight to its dtype."""
    integer, exponent, bits = _EXPONENT[weight.dtype]
    squares = 0.0
    for rows in weight.split(max(1, _PANEL // weight.shape[1])):
        powers = rows.contiguous().view(integer).bitwise_and(exponent).view(weight.dtype)
        squares += powers.float().square().sum(dtype=torch.float64).item()
    return squares * 4.0**-bits / 12


def quantized_rounding(w: QuantizedWeight) -> float:
    """Return the expected sum of squares of the rounding of a weight to 4 bits."""
    spread = torch.tensor(_variances(FORMATS[w.layout[0]].code))
    of_bytes = (spread[:, None] + spread).flatten()  # of two values, in whatever order
    scales, _ = block_scales(list(w.tensors), list(w.layout))
    octets, squares = w.blocksize // 2, 0.0
    panels = w.packed.flatten().split(_PANEL // 2), scales.split(_PANEL // w.blocksize)
    for packed, scale in zip(*panels, strict=True):
        sums = of_bytes[packed.int()]
        blocks = F.pad(sums, (0, -len(sums) % octets)).view(-1, octets).sum(1)
        squares += (blocks.double() * scale.double().square()).sum().item()
    return squares


def _variances(code: Sequence[float]) -> list[float]:
    """Return that of a value between the midpoints around each code, beyond the last ones none."""
    points, found = sorted(set(code)), {}
    lower, upper = [points[0], *points[:-1]], [*points[1:], points[-1]]
    for low, point, high in zip(lower, points, upper, strict=True):
        below, above = (point - low) / 2, (high - point) / 2
        found[point] = (below**2 - below * above + above**2) / 3
    return [found[point] for point in code]
