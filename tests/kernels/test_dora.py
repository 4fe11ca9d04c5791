"""The Triton kernels of DoRA's norms under the interpreter, against float64 and the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from dora_cases import (
    ADAPTERS,
    check_finite,
    check_norms,
    check_undone_weight,
    norm_case,
    norm_cases,
)
from grids import examples, thinned
from hypothesis import given
from hypothesis import strategies as st
from interpreted import INSIDE_TENSORS, RUNS
from linear_cases import BF16, F16, F32, F64, layouts
from nf4_weights import assert_same_bits, assert_same_every_time, numpy_dequantize
from tolerances import DORA_NORM_RTOL
from torch import Tensor

import peftkern
from peftkern.backends import ops
from peftkern.functional.dora import dora_norm
from peftkern.kernels import launch
from peftkern.kernels.configs import Problem

pytestmark = INSIDE_TENSORS

SHAPES = [(1, 1, 1), (1, 64, 5), (33, 31, 1), (40, 320, 17), (7, 129, 16), (130, 257, 3)]
NF4_LAYOUTS = [(32, True), (64, True), (64, False), (128, False), (4096, True)]
TENSORS = {"weight": (4, 9), "lora_A": (1, 7), "lora_B": (5, 1)}  # and an element of each


@pytest.mark.parametrize(
    ("shape", "dtype", "adapters"), thinned(SHAPES, [F32, F16, BF16], ADAPTERS)
)
def test_dense_norms(shape, dtype, adapters):
    check_norms(norm_cases(shape, dtype, adapters))


@pytest.mark.parametrize(
    ("shape", "dtype", "layout"),
    thinned([(1, 64, 1), (40, 384, 17), (19, 70, 3)], [F32, F16, BF16], NF4_LAYOUTS, diagonals=2),
)
def test_nf4_norms(shape, dtype, layout):
    """Decoded in the kernel where blocks end with rows, else made dense first; an odd size, too."""
    check_norms(norm_cases(shape, dtype, (F32, F32), layout))
    N, K, r = shape
    check_norms(norm_cases((N, K - 1, r), dtype, (BF16, BF16), layout))


def test_nf4_blocks_that_are_longer_than_tiles():
    for layout in ((4096, True), (4096, False), (256, True)):
        check_norms(norm_cases((16, 4096, 5), BF16, (F32, F32), layout))


@pytest.mark.parametrize(
    ("r", "adapters"), thinned([15, 32, 33, 64, 65, 130, 256], [(F32, F32), (BF16, BF16)])
)
def test_every_tile_of_the_rank(r, adapters):
    check_norms(norm_cases((21, 100, r), BF16, adapters))
    check_norms(norm_cases((21, 128, r), BF16, adapters, (64, True)))


def test_shapes_reach_every_count_of_rows():
    assert [rows(N) for N in (33, 70, 300)] == [16, 32, 64]
    for N in (33, 70, 300):
        check_norms(norm_cases((N, 65, 3), BF16, (F32, F32)))
        check_norms(norm_cases((N, 64, 3), BF16, (F32, F32), (64, True)))


def rows(N: int) -> int:
    """Rows of a program."""
    problem = Problem("dora_norm", 1, N, 64, 3, 16)
    return launch.config_for(problem, torch.device("cpu")).block_n


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_packed_weight_counts_as_the_reference_decodes_it(dtype):
    """Values rounded to the weight's own type before the sum: as the kernel over dense ones."""
    case = norm_case((37, 192, 5), dtype, (F32, F32), (64, True))
    dense = replace(case, weight=numpy_dequantize(case.weight, dtype))
    packed = dora_norm(*case.arguments, scaling=case.scaling)
    torch.testing.assert_close(
        packed, dora_norm(*dense.arguments, scaling=case.scaling), rtol=DORA_NORM_RTOL, atol=0
    )
    if dtype is not F32:  # were they not rounded, the norms would be others
        wide = numpy_dequantize(replace(case.weight, dtype=F32), F32)
        other = dora_norm(wide, *dense.arguments[1:], scaling=case.scaling)
        assert ((other - packed).abs() > 4 * DORA_NORM_RTOL * packed).any()


@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize("left", [1e-2, 1e-4, 0.0])
def test_update_that_undoes_the_weight(left, nf4):
    """As on the other back ends (tests/functional/test_dora.py)."""
    check_undone_weight(left, nf4)


@pytest.mark.parametrize("layout", [None, (64, True)], ids=str)
@pytest.mark.parametrize("strides", ["transposed", "sliced", "misaligned"])
def test_layouts_give_the_same_bits(strides, layout):
    case = norm_case((37, 128, 5), BF16, (F32, F32), layout)
    names = ["lora_A", "lora_B"] + (["weight"] if layout is None else [])
    changed = replace(case, **{n: layouts(getattr(case, n))[strides] for n in names})
    wanted = dora_norm(*case.arguments, scaling=case.scaling)
    assert_same_bits(dora_norm(*changed.arguments, scaling=case.scaling), wanted)


def test_stride_0_weight():
    A, B, row = torch.randn(3, 70), torch.randn(20, 3), torch.randn(1, 70)
    got = dora_norm(row.expand(20, 70), A, B, scaling=0.5)
    assert_same_bits(got, dora_norm(row.repeat(20, 1), A, B, scaling=0.5))


@pytest.mark.parametrize(
    ("dtypes", "r", "name", "value"),
    thinned(
        [(F32, (F32, F32)), (BF16, (F32, F32)), (BF16, (BF16, BF16))],
        [5, 130],
        list(TENSORS),
        [float("nan"), float("inf")],
        diagonals=2,
    ),
)
def test_nan_and_inf_propagate(dtypes, r, name, value):
    case = norm_case((37, 70, r), *dtypes)
    getattr(case, name)[TENSORS[name]] = value
    check_finite(case.arguments)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_nan_and_inf_of_absmax_and_of_an_overflow_propagate(dtype, value):
    case = norm_case((37, 128, 5), dtype, (F32, F32), (64, False))
    case.weight.absmax[5] = value
    check_finite(case.arguments)
    check_finite((torch.tensor([[1e30, 1.0], [1.0, 2.0]]), torch.ones(1, 2), torch.ones(2, 1)))


@pytest.mark.parametrize("runs", RUNS)
@pytest.mark.parametrize("layout", [None, (64, True)], ids=str)
def test_equal_bits_every_time_and_nothing_is_written_to(layout, runs):
    case = norm_case((70, 128, 65), BF16, (F32, F32), layout)
    pieces = [t for t in vars(case).values() if isinstance(t, Tensor)]
    if layout:
        pieces += [t for t in vars(case.weight).values() if isinstance(t, Tensor)]
    before = [t.clone() for t in pieces]
    assert_same_every_time(lambda: [dora_norm(*case.arguments, scaling=case.scaling)], runs)
    assert all(torch.equal(t, old) for t, old in zip(pieces, before, strict=True))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"weight": torch.zeros(3, 8, dtype=F64)}, r"the dtype is torch\.float64"),
        ({"lora_A": torch.zeros(2, 8, dtype=F64)}, r"the dtype of lora_A is torch\.float64"),
        ({"lora_B": torch.zeros(3, 2, dtype=F64)}, r"the dtype of lora_B is torch\.float64"),
        ({"lora_A": torch.zeros(257, 8), "lora_B": torch.zeros(3, 257)}, "the rank is 257"),
        ({"lora_A": torch.zeros(0, 8), "lora_B": torch.zeros(3, 0)}, "the rank is 0, not 1 to 256"),
        ({"weight": torch.zeros(0, 8), "lora_B": torch.zeros(0, 2)}, "the weight is empty"),
        ({"weight": torch.zeros(3, 0), "lora_A": torch.zeros(2, 0)}, "the weight is empty"),
    ],
)
def test_reasons_against_it(change, reason):
    given_ = {"weight": torch.ones(3, 8), "lora_A": torch.ones(2, 8), "lora_B": torch.ones(3, 2)}
    arguments = (*(given_ | change).values(), 1.0)
    with pytest.raises(peftkern.BackendUnavailableError, match=reason):
        ops.dora_norm(*arguments)
    with peftkern.use_backend(None):  # and another serves
        assert ops.dora_norm(*arguments).shape == arguments[0].shape[:1]


def test_nf4_reasons_against_it():
    w = norm_case((3, 64, 2), BF16, (F32, F32), (64, True)).weight
    with pytest.raises(peftkern.BackendUnavailableError, match="the rank is 300"):
        dora_norm(w, torch.ones(300, 64), torch.ones(3, 300), scaling=1.0)


@examples(1 / 15)
@given(
    shape=st.tuples(st.integers(1, 150), st.integers(1, 300), st.integers(1, 70)),
    dtype=st.sampled_from([F32, F16, BF16]),
    adapters=st.sampled_from(ADAPTERS),
    layout=st.sampled_from([None, *NF4_LAYOUTS]),
    whole_blocks=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape(shape, dtype, adapters, layout, whole_blocks, seed):
    torch.manual_seed(seed)
    N, K, r = shape
    if layout is not None and whole_blocks and layout[0] < 4096:
        K = -(-K // layout[0]) * layout[0]
    check_norms(norm_cases((N, K, r), dtype, adapters, layout))
