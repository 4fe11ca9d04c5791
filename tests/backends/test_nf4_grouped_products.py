"""The C++ products over groups of rows with NF4 weights, against a float64 loop over the groups."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from grids import thinned
from linear_cases import BF16, F32, F64
from nf4_weights import assert_same_every_time
from torch import Tensor

import peftkern
from peftkern.backends.cpu import module as native
from peftkern.backends.cpu.nf4_grouped_products import backward_product, forward_product

SIZES = [0, 1, 2, 5, 6, 15, 16, 17, 33, 0]
T = 11  # rows of x, which `rows` reads several times


@pytest.fixture(params=native.cpu_isas())
def isa(request) -> Iterator[str]:
    with native.use_isa(request.param):
        yield request.param


class Case:
    """A stack of weights stored as [E, N, K] or [1, N, K], and groups of all sizes."""

    def __init__(self, N: int, K: int, *, E: int = len(SIZES), **options) -> None:
        dense = torch.randn(E * N, K) * 0.3
        q = peftkern.quantize_nf4(dense, **options)
        self.w, self.layout = q.tensors, [*q.layout[:3], E, N, K]
        self.weights = peftkern.dequantize_nf4(q, F32).view(E, N, K)
        self.offsets = torch.tensor(SIZES).cumsum(0).int()
        self.end = int(self.offsets[-1])
        self.R = self.end + 3

    def run(
        self, x: Tensor, rows: Tensor | None, transposed: bool, backward: bool, dtype
    ) -> Tensor:
        columns = self.layout[-1 if transposed != backward else -2]
        out = torch.full((self.R, columns), float("nan"), dtype=dtype)
        options = (self.offsets, self.w, self.layout, transposed, out)
        backward_product(x, *options) if backward else forward_product(x, rows, *options)
        return out

    def check(self, dtype, *, transposed: bool, backward: bool, gathered: bool, out_dtype) -> None:
        inner = self.layout[-2 if transposed != backward else -1]
        x = torch.randn(T if gathered else self.R, inner).to(dtype)
        rows, read = None, x[: self.end]
        if gathered:
            rows = torch.randint(0, T, (self.R,), dtype=torch.int32)
            read = x[rows[: self.end].long()]
            rows[self.end :] = -1
        else:
            x[self.end :] = float("nan")
        got = self.run(x, rows, transposed, backward, out_dtype)
        weights = self.weights.double()
        if transposed == backward:
            weights = weights.mT
        weights = weights.expand(len(SIZES), *weights.shape[1:])
        parts = list(zip(read.double().split(SIZES), weights, strict=True))
        exact = torch.cat([a @ b for a, b in parts])
        size = torch.cat([a.abs() @ b.abs() for a, b in parts])
        # bfloat16: each weight may be rounded to it, and the result.
        bound = 1e-5 * size if dtype is F32 else 0.004 * (size + exact.abs())
        assert ((got[: self.end].to(F64) - exact).abs() <= bound + 1e-30).all()
        assert not got[self.end :].any()


@pytest.mark.parametrize(
    ("shape", "dtype", "transposed", "backward", "nested"),
    thinned(
        [(64, 64), (40, 192), (130, 65), (7, 33), (33, 320), (256, 448)],
        [F32, BF16],
        [False, True],
        [False, True],
        [False, True],
        diagonals=2,
    ),
)
def test_products_of_groups(isa, shape, dtype, transposed, backward, nested):
    """Odd sizes, whose rows begin in mid-byte and whose blocks may cross weights, among them."""
    for blocksize, out_dtype in ((32, dtype), (64, F32), (256, dtype)):
        case = Case(*shape, blocksize=blocksize, double_quant=nested)
        options = {"transposed": transposed, "backward": backward, "out_dtype": out_dtype}
        case.check(dtype, gathered=not backward and blocksize != 64, **options)


def test_one_weight_for_all_groups(isa):
    for dtype in (F32, BF16):
        case = Case(40, 192, E=1)
        for backward in (False, True):
            case.check(dtype, transposed=False, backward=backward, gathered=False, out_dtype=dtype)


def test_same_bits_for_any_number_of_threads(isa):
    case = Case(192, 320, double_quant=False)
    for dtype in (F32, BF16):
        for transposed in (False, True):
            x = torch.randn(case.R, 192 if transposed else 320).to(dtype)
            options = (x, None, transposed, False, dtype)
            assert_same_every_time(
                lambda options=options: [case.run(*options)], 9, threads=(1, 2, 3)
            )


def test_no_rows_and_no_groups():
    case = Case(64, 64)
    offsets, options = torch.zeros(len(SIZES), dtype=torch.int32), (case.w, case.layout, False)
    out = torch.full((2, 64), float("nan"))
    forward_product(torch.randn(2, 64), None, offsets, *options, out)
    assert not out.any()
    forward_product(torch.empty(0, 64), None, offsets, *options, torch.empty(0, 64))


@pytest.mark.parametrize(
    ("offsets", "rows"),
    [
        ([-1] * 10, None),
        ([5, 4, *[9] * 8], None),
        ([99] * 10, None),
        ([3] * 10, [0, -1, 2, 3]),
        ([3] * 10, [0, 1, 4, 3]),
        ([3] * 9, None),
    ],
)
def test_wrong_offsets_and_rows_are_refused(offsets, rows):
    case, out = Case(64, 64), torch.zeros(4, 64)
    rows = None if rows is None else torch.tensor(rows, dtype=torch.int32)
    offsets = torch.tensor(offsets, dtype=torch.int32)
    with pytest.raises(ValueError):
        forward_product(torch.zeros(4, 64), rows, offsets, case.w, case.layout, False, out)
    assert not out.any()
