"""The 4-bit formats, a row each, and the two values by which a quantized weight crosses the ops.

    tensors   packed codes, then the block scales as the format stores them
    layout    [format, blocksize, nested_blocksize, *shape]

`format` is the row's index, `nested_blocksize` is 0 where block scales are stored plainly. A weight
is flattened row-major and cut into blocks. Value i, of block b = i // blocksize, is

    value[i] = cast((code[q[i]] - zero[b]) * scale[b])

in float32, difference and product rounded one after the other, and then once to the dtype wanted.
Only `fields`, `stored`, `cut` and `backends.pointers.weight` know how many tensors that makes.
kernels/FORMATS.md has sources and edge cases.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Format(NamedTuple):
    """One format.

    Fields:
        code: the value of each of the 16 codes, in float32.
        blocksizes: the sizes that blocks may have.
        nested_blocksize: that of blocks of 8-bit scales; 0 where scales are never nested.
        scales: how a block's scale is stored, a key of `SCALES`.
        low_first: whether the low nibble of a byte is the value with the even index.
    """

    name: str
    code: tuple[float, ...]
    blocksizes: tuple[int, ...]
    nested_blocksize: int
    scales: str
    low_first: bool

    @property
    def crosses_rows(self) -> bool:
        """Whether blocks may run over the end of a row, and the last of them be cut."""
        return self.scales == "absmax"

    def chosen_blocksize(self, blocksize: int | None) -> int:
        """Return a block size if blocks may have it; the usual one, of the standard's, for None.

        Raises: ValueError naming those that the format has.
        """
        if blocksize is None:
            return self.blocksizes[0] if len(self.blocksizes) == 1 else _USUAL_BLOCK[self.scales]
        if type(blocksize) is not int or blocksize not in self.blocksizes:
            accepted = "one of " * (len(self.blocksizes) > 1) + ", ".join(map(str, self.blocksizes))
            raise ValueError(f"blocksize: expected {accepted} in {self.name}, got {blocksize!r}")
        return blocksize


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
# bitsandbytes' own: neither ascending nor e2m1 over 6, and code 8 is +0.
FP4_CODE = (
    0.0,
    0.005208333488553762,
    0.6666666865348816,
    1.0,
    0.3333333432674408,
    0.5,
    0.1666666716337204,
    0.25,
    0.0,
    -0.005208333488553762,
    -0.6666666865348816,
    -1.0,
    -0.3333333432674408,
    -0.5,
    -0.1666666716337204,
    -0.25,
)
# One bit of sign, two of exponent, one of mantissa; code 8 is -0.
E2M1_CODE = (
    0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0,
    -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0,
)  # fmt: skip
UINT4_CODE = (
    0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0,
)  # fmt: skip
_USUAL_BLOCK = {"absmax": 64, "scale_zero": 128}
_ANY_BLOCK = (32, 64, 128, 256, 512, 1024, 2048, 4096)

NF4 = Format("nf4", NF4_CODE, _ANY_BLOCK, 256, "absmax", False)
FP4 = Format("fp4", FP4_CODE, _ANY_BLOCK, 256, "absmax", False)
MXFP4 = Format("mxfp4", E2M1_CODE, (32,), 0, "e8m0", True)
NVFP4 = Format("nvfp4", E2M1_CODE, (16,), 0, "e4m3", True)
INT4 = Format("int4", UINT4_CODE, (32, 64, 128, 256), 0, "scale_zero", True)
FORMATS = (NF4, FP4, MXFP4, NVFP4, INT4)
NUMBERS = {row.name: number for number, row in enumerate(FORMATS)}

_BLOCK, _NESTED_BLOCK = "a value for each block", "a value for each block of scales"
# Tensors after the packed codes: name, dtype, and the length or what there is a value for.
SCALES: dict[str, tuple[tuple[str, torch.dtype, int | str], ...]] = {
    "absmax": (("absmax", torch.float32, _BLOCK),),
    "nested": (
        ("absmax", torch.uint8, _BLOCK),
        ("nested_absmax", torch.float32, _NESTED_BLOCK),
        ("nested_code", torch.float32, 256),
        ("nested_offset", torch.float32, 1),
    ),
    "e8m0": (("scale", torch.uint8, _BLOCK),),
    "e4m3": (("scale", torch.uint8, _BLOCK), ("tensor_scale", torch.float32, 1)),
    "scale_zero": (("scale", torch.float32, _BLOCK), ("zero", torch.float32, _BLOCK)),
}


class Field(NamedTuple):
    """One tensor of a weight."""

    name: str
    dtype: torch.dtype
    length: int


class Stored(NamedTuple):
    """A weight by field, for back ends; None and 0 for what its format does not have.

    aux: nested_absmax, tensor_scale or zero, whatever the format has.
    """

    packed: Tensor
    scale: Tensor
    aux: Tensor | None
    nested_code: Tensor | None
    nested_offset: Tensor | None
    format: Format
    blocksize: int
    nested_blocksize: int
    shape: tuple[int, ...]

    @property
    def pointers(self) -> tuple[Tensor | None, ...]:
        """The five tensors in the order of every kernel's parameters."""
        return self[:5]


def code_of(row: Format, device: torch.device | str = "cpu") -> Tensor:
    """Return the sixteen values of a format as a new float32 tensor."""
    return torch.tensor(row.code, dtype=torch.float32, device=device)


def fields(layout: Sequence[int]) -> tuple[Field, ...]:
    """Give name, dtype and length of every tensor of a weight, in the order of ops and kernels.

    Raises: ValueError naming what of the layout no format has.
    """
    row = _format(layout)
    _, blocksize, nested_blocksize, *shape = layout
    nested = row.blocksizes if row.nested_blocksize else ()
    if nested_blocksize not in (0, *nested):
        accepted = (0, *nested)
        raise ValueError(f"nested_blocksize: expected one of {accepted}, got {nested_blocksize}")
    numel = math.prod(shape)
    nblocks = -(-numel // blocksize)
    lengths = {_BLOCK: nblocks, _NESTED_BLOCK: -(-nblocks // (nested_blocksize or 1))}
    scales = SCALES["nested" if nested_blocksize else row.scales]
    return (
        Field("packed", torch.uint8, (numel + 1) // 2),
        *(Field(name, dtype, lengths.get(length, length)) for name, dtype, length in scales),
    )


def stored(tensors: Sequence[Tensor], layout: Sequence[int]) -> Stored:
    """Name the parts of a weight.

    Raises: ValueError on a format that there is not, or tensors that are another format's: their
        number, or the dtype of the scales.
    """
    is_nf4 = len(layout) > 2 and layout[0] == 0 and layout[1] in NF4.blocksizes
    row = NF4 if is_nf4 else _format(layout)  # a call less: host time counts
    _, blocksize, nested_blocksize, *shape = layout
    scales = SCALES["nested" if nested_blocksize else row.scales]
    expected = 1 + len(scales)
    if len(tensors) != expected:
        raise ValueError(f"w: expected {expected} tensors, got {len(tensors)}")
    name, dtype, _ = scales[0]
    if tensors[1].dtype is not dtype:
        raise ValueError(f"{name}: expected {dtype} in {row.name}, got {tensors[1].dtype}")
    absent = (None,) * (5 - expected)
    return Stored(*tensors, *absent, row, blocksize, nested_blocksize, tuple(shape))


def cut(
    tensors: Sequence[Tensor], layout: Sequence[int], blocks: slice | Tensor, shape: Sequence[int]
) -> tuple[list[Tensor], list[int]]:
    """Take blocks out of a weight whose scales are not nested, as one of another shape.

    Args: blocks, from one to another, the last of which may be cut, or indices of whole ones.
    Returns: tensors, views of the weight's where blocks are a slice, and layout.
    """
    row, (form, blocksize) = _format(layout), layout[:2]
    packed, *others = tensors
    octets = blocksize // 2
    if isinstance(blocks, slice):
        codes = packed[blocks.start * octets : blocks.stop * octets]
    else:
        whole = math.prod(layout[3:]) // blocksize * octets
        codes = packed[:whole].view(-1, octets)[blocks].reshape(-1)
    scales = zip(others, SCALES[row.scales], strict=True)
    return (
        [codes, *(t[blocks] if length is _BLOCK else t for t, (_, _, length) in scales)],
        [form, blocksize, 0, *shape],
    )


def _format(layout: Sequence[int]) -> Format:
    """Return the row of a layout. Raises: ValueError naming what of it no format has."""
    if len(layout) < 3 or not 0 <= layout[0] < len(FORMATS):
        raise ValueError(
            f"layout: expected a format from 0 to {len(FORMATS) - 1} in [format, blocksize, "
            f"nested_blocksize, *shape], got {list(layout)}"
        )
    row, blocksize = FORMATS[layout[0]], layout[1]
    if blocksize not in row.blocksizes:
        raise ValueError(f"blocksize: expected one of {row.blocksizes}, got {blocksize}")
    if not row.crosses_rows and (len(layout) == 3 or layout[-1] % blocksize):
        raise ValueError(
            f"shape: expected rows of a multiple of {blocksize} values in {row.name}, got "
            f"{list(layout[3:])}"
        )
    return row
