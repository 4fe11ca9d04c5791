"""The grouped linear layer's Triton kernels under the interpreter, against a loop in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from grids import thinned
from grouped_kernel_cases import EVERY, GRADIENTS, NAN, Groups, check, grouped, kernels
from hypothesis import given
from hypothesis import strategies as st
from interpreted import INSIDE_TENSORS, RUNS
from linear_cases import BF16, F16, F32, F64
from nf4_weights import assert_same_bits, assert_same_every_time
from torch.utils._python_dispatch import TorchDispatchMode

import peftkern
from peftkern.kernels import grouped_linear, grouped_products
from peftkern.kernels.configs import ceil_div, grouped_tile, rows_of_group
from peftkern.kernels.grouped_products import tiles_of_rows

pytestmark = INSIDE_TENSORS

SIZES = [0, 1, 5, 17, 33, 0]
SHAPES = [(41, 33, 3), (64, 128, 16), (70, 31, 1)]  # N, K, r
DTYPES = [(BF16, F32), (F32, F32), (BF16, BF16), (F16, F32)]
PLAIN = {"double_quant": False}
KINDS = {
    "rows": {},
    "tokens": {"rows": False, "bias": False},
    "transposed": {"transposed": True},
    "one weight": {"weights": 1},
    "no weight": {"weights": 0},
    "nf4": {"nf4": PLAIN},
    "nf4 transposed": {"nf4": PLAIN, "transposed": True},
    "nf4 nested": {"nf4": {"blocksize": 32, "double_quant": True}},
    "nf4 one weight": {"nf4": PLAIN, "weights": 1, "transposed": True},
}


def small(dtype: torch.dtype = BF16, **options) -> Groups:
    return grouped([2, 0, 3], (20, 24, 4), dtype, F32, **options)


@pytest.mark.parametrize(("kind", "shape", "dtypes"), thinned(list(KINDS), SHAPES, DTYPES))
def test_groups_of_every_size(kind, shape, dtypes):
    check(grouped(SIZES, shape, *dtypes, **KINDS[kind]))


@pytest.mark.parametrize("kind", ["nf4", "nf4 transposed", "nf4 nested"])
def test_nf4_whose_blocks_end_with_rows(kind):
    """A row of the weight is whole blocks, which are decoded at once."""
    check(grouped([3, 0, 18], (64, 128, 5), BF16, F32, **KINDS[kind]))


@pytest.mark.parametrize("kind", ["transposed", "nf4"])
def test_tiles_of_many_rows(kind):
    sizes = [140, 0, 70]
    assert grouped_tile(rows_of_group(sum(sizes) + 3, 3), 16, "", "").block_m == 128
    check(grouped(sizes, (64, 64, 16), BF16, F32, **KINDS[kind]))


@pytest.mark.parametrize("kind", ["tokens", "nf4"])
def test_without_an_update(kind):
    got = check(grouped([4, 1], (33, 64, 0), BF16, F32, **KINDS[kind] | {"bias": True}))
    assert [got[name].shape for name in ("S", "dA", "dB")] == [(0,)] * 3


def test_ranks_of_several_tiles():
    check(grouped([4, 0, 9], (33, 40, 70), BF16, F32))


def test_sums_that_several_programs_share():
    """Of S, where the groups are few."""
    sizes = (1, 1, 1, 600, 4, 32)
    plan = grouped_products._shrink_plan(torch.device("cpu"), sizes, (0, 0, 1), 1.0, False)
    assert plan.grid[1] > 1
    check(grouped([1], (16, 600, 4), F32, F32, past=0, rows=False))


def test_operands_behind_other_strides():
    """Of everything that may have them: the same bits as contiguous ones."""
    o = grouped([4, 0, 9], (20, 24, 4), BF16, BF16, rows=False)

    def strided(t):
        wide = t.new_full((*t.shape[:-1], 2 * t.shape[-1]), NAN)
        wide[..., ::2] = t
        return wide[..., ::2]

    narrow = torch.full((3, 22, 30), NAN).to(BF16)
    narrow[:, 1:-1, 3:27] = o.weight
    other = replace(
        o,
        weight=narrow[:, 1:-1, 3:27],
        **{name: strided(getattr(o, name)) for name in ("x", "dy", "bias", "lora_A", "lora_B")},
    )
    assert_same_bits(kernels(other), kernels(o))


@pytest.mark.parametrize("runs", RUNS)
def test_equal_bits_every_time(runs):
    o = grouped([3, 0, 18], (41, 64, 3), BF16, F32, nf4=PLAIN)
    assert_same_every_time(lambda: kernels(o).values(), runs)


def test_gradients_that_are_asked_for_alone():
    o = small()
    full = kernels(o)
    for i, name in enumerate(GRADIENTS):
        got = kernels(o, [i == j for j in range(4)])
        for other in GRADIENTS:
            assert_same_bits(got[other], full[other]) if other == name else None
            assert other == name or got[other].shape == (0,)


@pytest.mark.parametrize("sizes", [[0, 0, 0], [0]])
@pytest.mark.parametrize("past", [0, 5])
def test_no_row_of_a_group(sizes, past):
    o = grouped(sizes, (20, 24, 4), BF16, F32, past=past)
    got = kernels(o)
    assert got["y"].shape == (past, 20) and got["dx"].shape == (past, 24)
    assert all(not got[name].any() for name in ("y", "S", *GRADIENTS))


def test_nan_and_inf_stay_in_their_row_and_group():
    o = small(past=0, rows=False)
    o.x[2, 3], o.dy[1, 2] = float("inf"), NAN
    got = kernels(o)
    assert got["y"].isfinite().all(1).tolist() == [True, True, False, True, True]
    assert got["dx"].isfinite().all(1).tolist() == [True, False, True, True, True]
    assert [bool(dA.isfinite().all()) for dA in got["dA"]] == [False, True, False]
    assert [bool(db.isfinite().all()) for db in got["dbias"]] == [False, True, True]


@pytest.mark.parametrize("index", [-1, 4, 2**31 - 1])
def test_a_row_out_of_range_is_not_read_and_gives_nan(index):
    o = small(past=0)
    o = replace(o, x=o.x[:4].nan_to_num(0.5), rows=o.rows.clamp(max=3))
    wanted = kernels(o)
    rows = o.rows.clone()
    rows[3] = index
    got = kernels(replace(o, rows=rows))
    for name in ("y", "S"):
        assert got[name][3].isnan().all()
        others = torch.arange(5) != 3
        assert_same_bits(got[name][others], wanted[name][others])
    assert got["dA"][2].isnan().any() and got["dA"][:2].isfinite().all()
    assert got["dx"].isfinite().all()


@pytest.mark.parametrize("ends", [[-7, 2, 5], [5, 3, 1], [2, 2, 2**31 - 1], [9, -(2**31), 5]])
def test_wrong_offsets_read_nothing_out_of_bounds(ends):
    """Whatever comes out: raising would wait for the GPU."""
    kernels(replace(small(past=0), offsets=torch.tensor(ends, dtype=torch.int32)))


class Allocations(TorchDispatchMode):
    """The most elements that any operation returns."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not result._is_view():
            self.most = max(self.most, result.numel())
        return result


@pytest.mark.parametrize("kind", ["rows", "nf4"])
def test_nothing_of_the_size_of_one_weight_is_made(kind, monkeypatch):
    monkeypatch.setattr(grouped_products, "launch", lambda *args: None)  # interpreters copy
    o = grouped([1, 0, 1, 2], (96, 64, 2), BF16, F32, past=0, **KINDS[kind])
    with Allocations() as seen:
        kernels(o, of=grouped_linear)
    assert 0 < seen.most < 96 * 64


def test_gradients_of_the_public_function():
    o = small(F32, nf4={"blocksize": 32, "double_quant": False})
    x = o.x.nan_to_num(0.25)

    def run():
        leaves = [t.detach().requires_grad_() for t in (x, o.lora_A, o.lora_B, o.bias)]
        x_, A, B, bias = leaves
        options = {"scaling": 0.5, "bias": bias, "rows": o.rows}
        y = peftkern.grouped_lora_linear(x_, o.w, o.offsets, A, B, **options)
        y.square().sum().backward()
        return [y.detach(), *(leaf.grad for leaf in leaves)]

    got = run()
    with peftkern.use_backend("reference"):
        wanted = run()
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
        assert ours.stride() == theirs.stride()


@given(
    sizes=st.lists(st.integers(0, 300), min_size=1, max_size=20),
    past=st.integers(0, 300),
    block_m=st.sampled_from([16, 64, 128]),
)
def test_there_are_tiles_for_any_routing(sizes, past, block_m):
    needed = sum(ceil_div(size, block_m) for size in (*sizes, past))
    assert needed <= tiles_of_rows(sum(sizes) + past, len(sizes), block_m)


def test_refusals():
    o = small()
    weight = (o.weight, False)

    def forward(x=o.x, offsets=o.offsets, A=o.lora_A, B=o.lora_B, rows=o.rows):
        return grouped_linear.refusal_forward(x, rows, offsets, *weight, A, B, o.bias, 1.0)

    assert forward() is None and forward(A=None, B=None) is None
    assert forward(o.x.double()) == "the dtype is torch.float64"
    assert forward(A=o.lora_A.double()) == "the dtype of lora_A is torch.float64"
    assert "0 groups" in forward(offsets=o.offsets[:0])
    assert "4097 groups" in forward(offsets=o.offsets.new_zeros(4097))
    A, B = o.lora_A.new_zeros(3, 257, 24), o.lora_B.new_zeros(3, 20, 257)
    assert "the rank is 257" in forward(A=A, B=B)
    many = o.rows[:1].expand(2**30 + 1)
    assert "more than 1073741824 rows" in forward(rows=many)
    wide = o.weight[:1, :1].expand(1, 1 << 20, 24)
    more = grouped_linear.refusal_forward(
        o.x, many[: 1 << 28], o.offsets, wide, False, None, None, None, 1.0
    )
    assert "more tiles than a launch has" in more
    backward = (o.dy, o.offsets, o.x, o.rows, None)
    rest = (o.lora_A, o.lora_B, 1.0, list(EVERY))
    assert grouped_linear.refusal_backward(*backward, *weight, *rest) is None
    assert grouped_linear.refusal_backward(*backward, None, False, *rest) is None
    nothing = (None, None, 1.0, [False, False, False, True])
    assert grouped_linear.refusal_backward(*backward, None, False, *nothing) is None
    packed = ([], [0, 64, 0, 3, 20, 24], False)
    args = (o.x, o.rows, o.offsets, *packed, o.lora_A, o.lora_B, None, 1.0)
    assert grouped_linear.refusal_nf4_forward(*args) is None
    double = (o.dy.to(F64), *backward[1:], *packed, *rest)
    assert "float64" in grouped_linear.refusal_nf4_backward(*double)
