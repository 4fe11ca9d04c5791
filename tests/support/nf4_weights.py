"""Weights, and the NF4 format once more in NumPy, that the tests of the format share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tolerances import DETERMINISM_RUNS, paired
from torch import Tensor

from peftkern.formats.nf4 import NF4Weight, dynamic_map
from peftkern.formats.table import FORMATS, NUMBERS

if TYPE_CHECKING:  # not at run time: a GPU machine may lack it
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Params4bit

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


def assert_same_numbers(got: Tensor, expected: Tensor) -> None:
    """But for signs of zeros: without AVX-512 bitsandbytes decodes FP4's code 8 as -0, not 0."""
    assert got.dtype == expected.dtype and torch.equal(got, expected)


def assert_same_bits(got: Any, expected: Any) -> None:
    """Of two tensors, or of each pair in lists or dicts of them."""
    if not isinstance(got, Tensor):
        for pair in paired(got, expected):
            assert_same_bits(*pair)
        return
    assert got.dtype == expected.dtype and got.shape == expected.shape
    bits = BITS.get(got.dtype, got.dtype)
    assert torch.equal(got.contiguous().view(bits), expected.contiguous().view(bits))


def assert_same_every_time(
    call: Callable[[], Iterable[Any]], runs: int = DETERMINISM_RUNS, threads: Sequence[int] = ()
) -> None:
    """Every run gives the same bits, each on the next of these numbers of threads.

    The next test has its own number again, by a fixture that all tests have.
    """
    first = None
    for run in range(runs):
        if threads:
            torch.set_num_threads(threads[run % len(threads)])
        found = tuple(call())
        first = found if first is None else first
        assert_same_bits(found, first)


def random_weight(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(shape) * 0.05).to(dtype)


def codes_of(w: NF4Weight) -> np.ndarray:
    """The code of every value, and of the pad of an odd tail."""
    octets = w.packed.numpy()
    return np.stack((octets >> 4, octets & 15), axis=1).reshape(-1)


def absmax_of(w: NF4Weight) -> np.ndarray:
    if not w.nested:
        return w.absmax.numpy()
    scale = np.repeat(w.nested_absmax.numpy(), w.nested_blocksize)[: w.nblocks]
    product = w.nested_code.numpy()[w.absmax.numpy()] * scale
    return product + np.float32(w.nested_offset.item())


def numpy_dequantize(w: NF4Weight, dtype: torch.dtype) -> Tensor:
    """The format's definition in NumPy, which shares no code with any back end."""
    code = np.array(FORMATS[NUMBERS[w.quant_type]].code, dtype=np.float32)
    scale = np.repeat(absmax_of(w), w.blocksize)[: w.numel]
    with np.errstate(invalid="ignore"):  # 0 * inf is NaN here as it is there
        values = code[codes_of(w)[: w.numel]] * scale
    return torch.from_numpy(values).to(dtype).reshape(w.shape)


def every_byte_weight(
    blocksize: int, nested: bool, dtype: torch.dtype, quant_type: str = "nf4"
) -> NF4Weight:
    """300 blocks, so that a nested block ends too, over a shuffle of all bytes."""
    nblocks = 300
    n = nblocks * blocksize // 2
    packed = torch.arange(n, dtype=torch.int32).bitwise_and(255).to(torch.uint8)
    packed = packed[torch.randperm(n)]
    common = {"shape": (nblocks, blocksize), "blocksize": blocksize, "dtype": dtype}
    common["quant_type"] = quant_type
    absmax = torch.rand(nblocks) * 0.2
    if not nested:
        return NF4Weight(packed, absmax, **common)
    q = torch.randint(0, 256, (nblocks,), dtype=torch.uint8)
    return NF4Weight(
        packed,
        q,
        **common,
        nested_absmax=torch.rand(2) * 0.1,
        nested_code=torch.tensor(dynamic_map()),
        nested_offset=torch.tensor(0.1234567),
        nested_blocksize=256,
    )


def bitsandbytes_state(w: NF4Weight) -> QuantState:
    from bitsandbytes.functional import QuantState, get_4bit_type

    state2 = None
    if w.nested:
        state2 = QuantState(w.nested_absmax, code=w.nested_code, blocksize=256, dtype=torch.float32)
    return QuantState(
        absmax=w.absmax,
        shape=torch.Size(w.shape),
        code=get_4bit_type(w.quant_type, device="cpu"),
        blocksize=w.blocksize,
        quant_type=w.quant_type,
        dtype=w.dtype,
        offset=w.nested_offset,
        state2=state2,
    )


def bitsandbytes_param(
    shape: tuple[int, int] = (96, 128), dtype: torch.dtype = torch.bfloat16, **options
) -> Params4bit:
    from bitsandbytes.nn import Params4bit

    data = random_weight(shape, dtype)
    options = {"quant_type": "nf4", **options}
    return Params4bit(data, requires_grad=False, **options).to("cpu")
