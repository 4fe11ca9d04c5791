"""A weight in MXFP4, NVFP4 or INT4: packed codes, and scales as their format stores them.

The row of the format in `peftkern.formats.table` has code values, block sizes and which nibble is
first; kernels/FORMATS.md has the sources. Blocks end with the rows of a weight: the last dimension
is a multiple of the block size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from peftkern.formats.nf4 import DTYPE_NAMES, NF4Weight, check_tensor, numel_of, refuse
from peftkern.formats.table import FORMATS, NUMBERS, Format, fields

__all__ = ["BlockWeight"]
METHOD = "peftkern_blocks"  # quant_method of a checkpoint of such layers
NAMES = tuple(row.name for row in FORMATS if not row.crosses_rows)
PARTS = ("scale", "tensor_scale", "zero")  # of a weight beside its codes; not each has all
SYMMETRIC_ZERO = 8.0  # of INT4 where no zero points are given: codes stand for -8 to 7
# What holds the bits of a scale; its values are never converted.
_FLOATS = {"e8m0": torch.float8_e8m0fnu, "e4m3": torch.float8_e4m3fn}


@dataclass(frozen=True, eq=False, repr=False)
class BlockWeight:
    """A weight in MXFP4, NVFP4 or INT4, as stored: nothing here is dense.

    value[i] = cast((code[q[i]] - zero[b]) * scale[b]), b = i // blocksize, in float32; zero is 0
    but in INT4. The value with the even index sits in the LOW nibble of byte i // 2.

    Args:
        format: "mxfp4", "nvfp4" or "int4".
        packed: uint8 of numel / 2 bytes, contiguous, of any shape; flattened by a view.
        scale: a value for each block, contiguous, of any shape: bits of e8m0 (MXFP4) or of e4m3
            (NVFP4) as uint8 or as torch's float8 of that name; float32 in INT4.
        shape: shape of the weight, whose rows are whole blocks.
        dtype: float32, float16 or bfloat16: of the weight before it was quantized.
        blocksize: 32 in MXFP4, 16 in NVFP4; 32, 64, 128 or 256 in INT4.
        tensor_scale: float32 of one value, by which all scales of NVFP4 are multiplied; None is 1.
        zero: float32, the code that stands for zero in each block of INT4; None is 8.

    Raises: ValueError that begins with the field, then what is accepted and what came
        (TruncatedWeightError where a tensor is too short). No data is read.
    """

    format: str
    packed: Tensor
    scale: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    blocksize: int
    tensor_scale: Tensor | None = None
    zero: Tensor | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.format, str) or self.format not in NAMES:
            raise refuse("format", f"one of {NAMES}", self.format)
        row = FORMATS[NUMBERS[self.format]]
        numel_of(self.shape)
        object.__setattr__(self, "shape", tuple(self.shape))
        if type(self.blocksize) is not int or self.blocksize not in row.blocksizes:
            raise refuse("blocksize", f"one of {row.blocksizes}", self.blocksize)
        if not isinstance(self.dtype, torch.dtype) or self.dtype not in DTYPE_NAMES:
            raise refuse("dtype", f"one of {list(DTYPE_NAMES.values())}", self.dtype)
        if not self.shape or self.shape[-1] % self.blocksize:
            raise refuse("shape", f"rows of a multiple of {self.blocksize} values", self.shape)
        self._complete(row)
        device = self.packed.device if isinstance(self.packed, Tensor) else None
        for name, dtype, length in fields(self.layout):
            flat = _flat(name, getattr(self, name))
            check_tensor(name, flat, dtype, length, None if name == "packed" else device)
            object.__setattr__(self, name, flat)

    def _complete(self, row: Format) -> None:
        """View scales as bytes, and fill in what may be left out."""
        scale = self.scale
        if isinstance(scale, Tensor) and scale.dtype is _FLOATS.get(row.scales):
            object.__setattr__(self, "scale", scale.view(torch.uint8))
        own = {"e4m3": "tensor_scale", "scale_zero": "zero"}.get(row.scales)
        for name in ("tensor_scale", "zero"):
            value = getattr(self, name)
            if name != own and value is not None:
                raise refuse(name, f"None in {self.format}", value)
            if name == own and value is None and isinstance(scale, Tensor):
                filled = (
                    scale.new_ones(1, dtype=torch.float32)
                    if name == "tensor_scale"
                    else torch.full_like(scale, SYMMETRIC_ZERO)
                )
                object.__setattr__(self, name, filled)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nblocks(self) -> int:
        return math.prod(self.shape) // self.blocksize

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return sum(t.numel() * t.element_size() for t in self.tensors)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Tensors that ops take beside `layout`: packed codes, then scales as stored."""
        aux = self.tensor_scale if self.zero is None else self.zero
        return (self.packed, self.scale) if aux is None else (self.packed, self.scale, aux)

    @property
    def layout(self) -> tuple[int, ...]:
        """Integers by which ops read `tensors`: see `peftkern.formats.table`."""
        return (NUMBERS[self.format], self.blocksize, 0, *self.shape)

    def state_dict(self, prefix: str = "") -> dict[str, Tensor]:
        """Return the weight [N, K] in the keys of `BlockLinear`; it shares its memory with them.

        `{prefix}weight` uint8 [N, K / 2], `{prefix}weight.scale` [N, K / blocksize], and of NVFP4
        `weight.tensor_scale` [1], of INT4 `weight.zero` [N, K / blocksize].
        """
        name, rows, groups = f"{prefix}weight", self.shape[0], self.shape[1] // self.blocksize
        state = {name: self.packed.view(rows, self.shape[1] // 2)}
        for part in PARTS:
            value = getattr(self, part)
            if value is not None:
                shape = (1,) if part == "tensor_scale" else (rows, groups)
                state[f"{name}.{part}"] = value.view(shape)
        return state

    def to(self, device: torch.device | str, non_blocking: bool = False) -> BlockWeight:
        """Return the weight on another device; itself if it is already there."""
        names = ("packed", *PARTS)
        own = {name: value for name in names if (value := getattr(self, name)) is not None}
        moved = {name: t.to(device, non_blocking=non_blocking) for name, t in own.items()}
        if all(moved[name] is t for name, t in own.items()):
            return self
        return replace(self, **moved)

    def __repr__(self) -> str:
        return (
            f"BlockWeight(format='{self.format}', shape={self.shape}, blocksize={self.blocksize}, "
            f"dtype={DTYPE_NAMES[self.dtype]}, device='{self.device}')"
        )


QuantizedWeight = NF4Weight | BlockWeight


def chosen_blocksize(format: str, blocksize: int | None) -> int:
    """Return the block size of a weight in MXFP4, NVFP4 or INT4; the usual one for None.

    Raises: ValueError naming the argument.
    """
    if format not in NAMES:
        raise ValueError(f"format: expected one of {NAMES}, got {format!r}")
    return FORMATS[NUMBERS[format]].chosen_blocksize(blocksize)


def _flat(name: str, tensor: Any) -> Any:
    """View a contiguous tensor in one dimension; what is none is left to the check."""
    if not isinstance(tensor, Tensor) or tensor.dim() == 1:
        return tensor
    if tensor.layout is not torch.strided or not tensor.is_contiguous():
        raise refuse(name, "contiguous memory", tensor)
    return tensor.view(-1)
