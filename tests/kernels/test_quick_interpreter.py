"""What makes Triton's interpreter quicker in these tests changes nothing that it computes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import quick_interpreter
import torch
import triton
import triton.language as tl
from interpreted import INTERPRETED
from linear_cases import BF16, F32
from nf4_weights import assert_same_bits
from torch import Tensor
from triton.runtime import interpreter

pytestmark = INTERPRETED
NAN, INF = float("nan"), float("inf")


@triton.jit
def _largest(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _reduce_kernel(x_ptr, out_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, AXIS: tl.constexpr):
    index = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    x = tl.load(x_ptr + index).to(tl.float32)
    largest = tl.reduce(x, AXIS, _largest) + tl.sum(tl.zeros_like(x), AXIS)
    tl.store(out_ptr + tl.arange(0, COLUMNS if AXIS == 0 else ROWS), largest)


def reduced(x: Tensor, axis: int) -> Tensor:
    rows, columns = x.shape
    out = torch.empty(columns if axis == 0 else rows)
    _reduce_kernel[(1,)](x, out, rows, columns, axis)
    return out


@pytest.fixture
def as_it_is(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """The interpreter as Triton has it, once this is called."""

    def undo() -> None:
        for replaced in quick_interpreter.AS_IT_IS:
            monkeypatch.setattr(*replaced)

    return undo


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("shape", [(1, 1), (8, 16), (32, 4)], ids=str)
def test_values_are_those_of_the_interpreter(shape, dtype, axis, as_it_is):
    x = torch.randn(shape).to(dtype)
    x.view(-1)[[0, -1]] = torch.tensor([NAN, -INF]).to(dtype)
    before, got = interpreter._patch_lang, reduced(x, axis)
    as_it_is()
    assert interpreter._patch_lang is not before
    assert_same_bits(got, reduced(x, axis))
    assert torch.equal(got.isnan(), x.amax(axis).float().isnan())


def test_subnormal_bfloat16_keeps_its_value():
    x = torch.arange(128, dtype=torch.int16).view(BF16)[None]
    assert_same_bits(reduced(x, 0), x[0].float())


def test_the_language_is_as_before_after_a_launch():
    """Also after one that fails."""
    before = {name: getattr(tl, name) for name in ("load", "arange", "sum", "reduce", "range")}
    reduced(torch.randn(4, 4), 1)
    with pytest.raises(Exception, match="arange"):
        _reduce_kernel[(1,)](torch.randn(3, 4), torch.empty(3), 3, 4, 1)
    assert {name: getattr(tl, name) for name in before} == before
    assert not torch.equal(reduced(torch.ones(4, 4), 1), torch.zeros(4))
