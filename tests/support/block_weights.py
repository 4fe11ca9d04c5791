"""Weights of every 4-bit format, and the formats once more in NumPy, from their bits."""

from __future__ import annotations

import math

import numpy as np
import torch
from nf4_weights import BITS, absmax_of, codes_of
from torch import Tensor

from peftkern.formats.block_weight import NAMES, BlockWeight, QuantizedWeight
from peftkern.formats.nf4 import NF4Weight, dynamic_map
from peftkern.formats.table import FORMATS, NUMBERS

ALL = tuple(row.name for row in FORMATS)
# What int4's scales and zero points may be, the awkward among them.
INT4_SCALES = (0.0, 1e-40, 0.0123, -2.5, 65504.0, 3e38, float("inf"), float("nan"))
INT4_ZEROS = (0.0, 7.0, 8.0, 8.37, 15.0, 16.0, -1.0, float("nan"))


def e2m1(code: int) -> float:
    """Value of one code: a sign, two bits of exponent of bias 1, one of mantissa."""
    exponent, mantissa = code >> 1 & 3, code & 1
    size = mantissa / 2 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa / 2)
    return -size if code & 8 else size


def e4m3(byte: int) -> float:
    """Value of one byte of float8_e4m3fn: bias 7, no infinity, NaN where all bits are set."""
    exponent, mantissa = byte >> 3 & 15, byte & 7
    if byte & 127 == 127:
        return math.nan
    size = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -size if byte & 128 else size


def e8m0(byte: int) -> float:
    return math.nan if byte == 255 else math.ldexp(1.0, byte - 127)


@np.errstate(all="ignore")
def numpy_values(w: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """The format's definition, which shares no code with any back end."""
    name, zero = FORMATS[w.layout[0]].name, None
    if isinstance(w, NF4Weight):
        code, codes, scale = FORMATS[NUMBERS[name]].code, codes_of(w), absmax_of(w)
    else:
        octets, raw = w.packed.numpy(), w.scale.tolist()
        codes = np.stack((octets & 15, octets >> 4), axis=1).reshape(-1)
        code = range(16) if name == "int4" else [e2m1(i) for i in range(16)]
        if name == "mxfp4":
            scale = np.array([e8m0(i) for i in raw], np.float32)
        elif name == "nvfp4":
            scale = np.array([e4m3(i) for i in raw], np.float32) * w.tensor_scale.numpy()
        else:
            scale, zero = w.scale.numpy(), w.zero.numpy()
    values = np.array(code, np.float32)[codes[: w.numel]]

    def spread(blocks: np.ndarray) -> np.ndarray:
        return np.repeat(blocks, w.blocksize)[: w.numel]

    if zero is not None:
        values = values - spread(zero)
    values = values * spread(scale)
    assert values.dtype == np.float32
    return torch.from_numpy(values).to(dtype).reshape(w.shape)


def assert_same_values(got: Tensor, expected: Tensor) -> None:
    """Bit for bit, signs of zeros too; a NaN is any NaN."""
    assert got.dtype == expected.dtype and got.shape == expected.shape
    assert torch.equal(got.isnan(), expected.isnan())
    got, expected = (t.masked_fill(t.isnan(), 0).contiguous() for t in (got, expected))
    assert torch.equal(got.view(BITS[got.dtype]), expected.view(BITS[got.dtype]))


def every_pair_weight(name: str, dtype: torch.dtype, blocksize: int = 32) -> BlockWeight:
    """Every code beside every scale byte, or every scale and zero point of INT4."""
    if name == "int4":
        pairs = [(scale, zero) for scale in INT4_SCALES for zero in INT4_ZEROS]
        scale, zero = (torch.tensor(values) for values in zip(*pairs, strict=True))
        options = {"scale": scale, "zero": zero}
    else:
        blocksize = {"mxfp4": 32, "nvfp4": 16}[name]
        options = {"scale": torch.arange(256, dtype=torch.int32).to(torch.uint8)}
        if name == "nvfp4":
            options["tensor_scale"] = torch.tensor([0.0123])
    nblocks = len(options["scale"])
    rows = [torch.cat([torch.randperm(16) for _ in range(blocksize // 16)]) for _ in range(nblocks)]
    return block_weight(name, torch.stack(rows), dtype, blocksize, **options)


def block_weight(
    name: str, codes: Tensor, dtype: torch.dtype, blocksize: int, **options: Tensor
) -> BlockWeight:
    """Weight of these codes, whose shape it has."""
    flat = codes.reshape(-1).to(torch.uint8)
    packed = flat[1::2] << 4 | flat[::2]
    return BlockWeight(
        name, packed, shape=tuple(codes.shape), dtype=dtype, blocksize=blocksize, **options
    )


def random_weight_of(
    name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, blocksize: int = 32
) -> QuantizedWeight:
    """Random codes and scales of about 1 / 20, in any format."""
    numel = math.prod(shape)
    if name in ("nf4", "fp4"):
        nblocks = -(-numel // blocksize)
        packed = torch.randint(0, 256, ((numel + 1) // 2,), dtype=torch.uint8)
        q = torch.randint(0, 256, (nblocks,), dtype=torch.uint8)
        nested = (torch.rand(-(-nblocks // 256)) * 0.1, torch.tensor(dynamic_map()))
        offset = torch.tensor(0.1234567)
        return NF4Weight(packed, q, shape, blocksize, dtype, *nested, offset, 256, name)
    assert name in NAMES
    blocksize = {"mxfp4": 32, "nvfp4": 16}.get(name, blocksize)
    nblocks = numel // blocksize
    if name == "int4":
        options = {"scale": torch.rand(nblocks) / 40, "zero": torch.rand(nblocks) * 15}
    elif name == "mxfp4":
        options = {"scale": torch.randint(119, 123, (nblocks,), dtype=torch.uint8)}
    else:
        scale = torch.rand(nblocks).mul(448).to(torch.float8_e4m3fn)
        options = {"scale": scale, "tensor_scale": torch.tensor([1e-4])}
    return block_weight(name, torch.randint(0, 16, shape), dtype, blocksize, **options)
