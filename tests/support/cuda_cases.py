"""Checks of the CUDA kernels, compiled for this CPU or on a GPU, and of NF4 on any back end."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import ModuleType

import pytest
import torch
from gpu_cases import NF4Operands
from linear_cases import F64
from nf4_weights import assert_same_bits, numpy_dequantize, random_weight
from tolerances import assert_as_accurate_as_torch
from torch import Tensor

import peftkern
from peftkern import NF4Weight
from peftkern.backends import ops, reference
from peftkern.backends.cuda.nf4_lora_linear import launch
from peftkern.formats.nf4 import nf4_midpoints

OP = "nf4_lora_linear_forward"
Results = tuple[Tensor, Tensor]


@contextlib.contextmanager
def scheduled(module: ModuleType, schedule: int) -> Iterator[None]:
    """The emulation's threads run in another order."""
    module.set_schedule(schedule)
    try:
        yield
    finally:
        module.set_schedule(0)


def check_refusals(function: Callable, call: Sequence, cases: Iterable[tuple]) -> None:
    """The call is taken; with another value at a position it is an error that names it."""
    function(*call)
    for position, value, name in cases:
        with pytest.raises((ValueError, OverflowError), match=name):
            function(*call[:position], value, *call[position + 1 :])


# nf4_lora_linear


def forward(o: NF4Operands, lora: bool = True) -> Results:
    """y and S by the op, on the back end that is forced."""
    adapters = (o.lora_A, o.lora_B) if lora else (None, None)
    weight = (o.w.tensors, o.w.layout)
    return ops.nf4_lora_linear_forward(o.x, *weight, *adapters, o.bias, o.scaling, None, 0.0)


def with_splits(o: NF4Operands, splits: int, lora: bool = True, prefill: bool = False) -> Results:
    """By the kernel for few rows, or `prefill`'s, K split over so many blocks of threads."""
    adapters = (o.lora_A, o.lora_B) if lora else (None, None)
    weight = (o.w.tensors, o.w.layout)
    return launch(o.x, *weight, *adapters, o.bias, o.scaling, splits, prefill=prefill)


def exact(o: NF4Operands, lora: bool = True) -> Results:
    """In float64."""
    o = o.to(F64)
    y, S = o.x @ o.weight.t(), o.x @ o.lora_A.t()
    y = y + o.scaling * S @ o.lora_B.t() if lora else y
    return y if o.bias is None else y + o.bias, S if lora else S.new_empty(0)


def check(cases: list[NF4Operands], lora: bool = True, splits: int | None = None) -> None:
    """y and S are as accurate as the reference's."""
    runs = [[forward(o, lora) if splits is None else with_splits(o, splits, lora) for o in cases]]
    with peftkern.use_backend("reference"):
        runs.append([forward(o, lora) for o in cases])
        runs.append([exact(o, lora) for o in cases])
    for i in range(2):
        got, eager, oracle = (torch.stack([results[i] for results in run]) for run in runs)
        assert_as_accurate_as_torch(got, eager, oracle)


# NF4


def assert_equal_but_for_payloads(got: Tensor, wanted: Tensor) -> None:
    """The same bits, and NaN where the other is NaN."""
    got = got.cpu()
    assert torch.equal(got.isnan(), wanted.isnan())
    assert_same_bits(got.nan_to_num(nan=0.0), wanted.nan_to_num(nan=0.0))


def assert_quantized_alike(dense: Tensor, blocksize: int, device: str = "cpu") -> None:
    got = ops.nf4_quantize(dense.to(device), blocksize)
    wanted = reference.nf4_quantize(dense, blocksize)
    assert_same_bits(got[0].cpu(), wanted[0])
    assert_equal_but_for_payloads(got[1], wanted[1])


def check_extreme_blocks(
    value: float, dtype: torch.dtype, device: str = "cpu", blocksizes: Sequence[int] = (64, 4096)
) -> None:
    for blocksize in blocksizes:
        dense = random_weight((4, blocksize), dtype)
        dense[1] = value  # a whole block
        dense[2, 5] = value
        assert_quantized_alike(dense, blocksize, device)


def check_extreme_absmax(value: float, dtype: torch.dtype, device: str = "cpu") -> None:
    packed = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    absmax = torch.tensor([value, 1.0, -value, 0.5]).repeat(2)
    w = NF4Weight(packed, absmax, (512,), 64, dtype)
    got = peftkern.dequantize_nf4(w.to(device))
    assert_equal_but_for_payloads(got, numpy_dequantize(w, dtype))


def check_ties(dtype: torch.dtype, device: str = "cpu") -> None:
    """Midpoints and their neighbours, in a block whose absmax is 1: the lower code."""
    midpoints = torch.tensor(nf4_midpoints()).to(dtype)
    inf = torch.tensor(float("inf"), dtype=dtype)
    near = torch.cat([midpoints, midpoints.nextafter(inf), midpoints.nextafter(-inf)])
    dense = torch.cat([near, torch.ones(64 - len(near), dtype=dtype)])
    assert_quantized_alike(dense, 64, device)
