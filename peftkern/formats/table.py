"""The 4-bit formats, a row each, and the two values by which a quantized weight crosses the ops.

    tensors   packed codes, then the block scales as the format stores them
    layout    [format, blocksize, nested_blocksize, *shape]

`format` is the row's index, `nested_blocksize` is 0 where block scales are stored plainly. Only
`stored` and `backends.pointers.weight` know how many tensors that makes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Format(NamedTuple):
    """One format: its code values, and the sizes of its blocks and of blocks of their scales."""

    name: str
    code: tuple[float, ...]
    blocksizes: tuple[int, ...]
    nested_blocksize: int


NF4_CODE = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
NF4 = Format("nf4", NF4_CODE, (32, 64, 128, 256, 512, 1024, 2048, 4096), 256)
FORMATS = (NF4,)


class Stored(NamedTuple):
    """A weight by field, for back ends; None and 0 where block scales are plain."""

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_code: Tensor | None
    nested_offset: Tensor | None
    blocksize: int
    nested_blocksize: int
    shape: tuple[int, ...]

    @property
    def pointers(self) -> tuple[Tensor | None, ...]:
        """The five tensors in the order of every kernel's parameters."""
        return self[:5]


def stored(tensors: Sequence[Tensor], layout: Sequence[int]) -> Stored:
    """Name the parts of a weight.

    Raises: ValueError on a layout or a number of tensors that no format has.
    """
    if len(layout) < 3 or not 0 <= layout[0] < len(FORMATS):
        raise ValueError(
            f"layout: expected [format, blocksize, nested_blocksize, *shape] with "
            f"format below {len(FORMATS)}, got {list(layout)}"
        )
    _, blocksize, nested_blocksize, *shape = layout
    if len(tensors) != (5 if nested_blocksize else 2):
        raise ValueError(f"w: expected {5 if nested_blocksize else 2} tensors, got {len(tensors)}")
    packed, absmax, *nested = tensors
    nested = nested or (None, None, None)
    return Stored(packed, absmax, *nested, blocksize, nested_blocksize, tuple(shape))
