"""The grouped linear function and routing against a loop over groups: values, gradients, layouts,
memory, errors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from grids import examples, thinned
from grouped_cases import (
    Grouped,
    check,
    check_terms,
    grouped_operands,
    looped,
    ours,
    with_gradients,
)
from hypothesis import given
from hypothesis import strategies as st
from nf4_weights import assert_same_every_time
from peak_memory import LargestTensor
from tolerances import SMALL_ADAPTER_RTOL
from torch import Tensor

import peftkern
from peftkern.backends.programs import PLAIN
from peftkern.functional.grouped_linear import route

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
DTYPES = [(F32, F32), (BF16, F32), (F16, F32), (BF16, BF16), (F32, BF16)]
FLAGS = ("transposed", "shared", "through_rows", "adapter", "bias")
SHAPES = [(48, 64, 4), (31, 96, 1), (17, 32, 3), (64, 160, 16), (33, 32, 64)]  # N, K, r


@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize(
    ("shape", "dtypes", "transposed", "through_rows"),
    thinned(SHAPES, DTYPES, [False, True], [False, True], diagonals=2),
)
def test_values_and_gradients(every_backend, shape, dtypes, transposed, through_rows, nf4):
    N, K, r = shape
    sizes = {"N": N, "K": K, "r": r, "bias": N != 17}
    options = {"transposed": transposed, "through_rows": through_rows, "nf4": nf4}
    check(grouped_operands(*dtypes, **sizes, **options))


@pytest.mark.parametrize(
    "options",
    [
        {"adapter": False},
        {"adapter": False, "nf4": True, "bias": False},
        {"base": False},
        {"base": False, "bias": False, "through_rows": False},
        {"shared": True},
        {"shared": True, "nf4": True, "transposed": True},
        {"K": 41, "N": 27},
        {"K": 41, "N": 27, "transposed": True, "bias": False},
        {"K": 2100, "N": 27, "sizes": (1, 3, 6)},
        {"K": 41, "N": 300, "sizes": (1, 3, 6), "transposed": True},
        {"sizes": (0, 0, 0)},
        {"sizes": (1,) * 40, "nf4": True},
        {"sizes": (300,), "nf4": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_variants(every_backend, dtype, options):
    check(grouped_operands(dtype, F32, **options))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("lying", ["turned", "apart"])
def test_weights_of_any_strides(every_backend, transposed, lying):
    """Nothing is read from a copy that is gone: new tensors take its place at once."""
    o = grouped_operands(BF16, F32, transposed=transposed)
    if lying == "turned":
        weight = o.weight.transpose(1, 2).contiguous().transpose(1, 2)
    else:
        weight = torch.stack([o.weight, o.weight], dim=3)[..., 0]
    assert weight.stride(2) != 1 and weight.equal(o.weight)
    check(replace(o, weight=weight))


@pytest.mark.parametrize("nf4", [False, True])
def test_no_row_is_read(every_backend, nf4):
    """An empty `rows` has no address, and is not for as many rows as x has."""
    o = grouped_operands(F32, F32, sizes=(0, 0), nf4=nf4)
    got = with_gradients(replace(o, rows=o.rows[:0], dy=o.dy[:0]), ours)
    assert got["y"].shape == (0, 48) and got.keys() == {"y", "dx", "dA", "dB", "dbias"}
    assert not any(value.any() for value in got.values())


def apart(t: Tensor) -> Tensor:
    """The same values with NaN between them."""
    return torch.stack([t, torch.full_like(t, torch.nan)], dim=-1)[..., 0]


def turned(t: Tensor) -> Tensor:
    return t.transpose(-1, -2).contiguous().transpose(-1, -2)


@examples(1)
@given(
    sizes=st.lists(
        st.sampled_from([0, 0, 1, 2, 3, 4, 5, 8, 15, 16, 17, 33]), min_size=1, max_size=6
    ),
    shape=st.tuples(*(st.integers(1, n) for n in (270, 150, 33))),
    long=st.booleans(),
    dtypes=st.sampled_from(DTYPES),
    lying=st.sampled_from([Tensor.clone, apart, turned]),
    flags=st.fixed_dictionaries(dict.fromkeys(FLAGS, st.booleans())),
    seed=st.integers(0, 2**31),
)
def test_any_groups(sizes, shape, long, dtypes, lying, flags, seed):
    """Few rows of a group are another kernel than many, and what reads [E, K, N] is another one."""
    torch.manual_seed(seed)
    N, K, r = shape
    options = {"N": N, "K": K + 1000 * long, "r": r, "sizes": tuple(sizes), **flags}
    check_terms(grouped_operands(*dtypes, **options).each(lying))


def test_a_small_adapter_is_not_lost_in_16_bits(every_backend):
    """As in PEFT's fold, whose W + delta is rounded: here the base cancels, the rest is seen."""
    o = grouped_operands(BF16, F32, bias=False)
    half = o.x.shape[1] // 2
    half_of_x, half_of_weight = o.x[:, :half], o.weight[:, :, :half]
    o = replace(
        o,
        x=torch.cat([half_of_x, half_of_x], dim=1),
        weight=torch.cat([half_of_weight, -half_of_weight], dim=2),
    )
    delta = o.scaling * o.lora_B @ o.lora_A
    small = 1e-3 * (o.weight.float().norm() / delta.norm()).item()
    o = replace(o, scaling=o.scaling * small)
    exact = looped(o.to(F64), **o.to(F64).leaves)
    folded = replace(o, weight=o.weight + (small * delta).to(BF16), lora_A=None, lora_B=None)
    of_peft, got = looped(folded, folded.x), ours(o, **o.leaves)
    assert (got.double() - exact).norm() <= SMALL_ADAPTER_RTOL * exact.norm()
    assert (of_peft.double() - exact).norm() > 100 * SMALL_ADAPTER_RTOL * exact.norm()


def test_factors_keep_their_strides(backend):
    """Gradients of PEFT's own matrices come back without a copy."""
    o = grouped_operands(BF16, F32)
    grads = with_gradients(o, ours)
    assert grads["dA"].stride() == o.lora_A.stride()
    assert grads["dB"].stride() == o.lora_B.stride()
    assert grads["dA"][0].eq(0).all() and grads["dB"][0].eq(0).all()  # a group without rows


@pytest.mark.parametrize("nf4", [False, True])
def test_same_bits(every_backend, nf4):
    """On repeat, and of kernels with any number of threads."""
    o = grouped_operands(BF16, F32, N=96, K=128, nf4=nf4)
    threads = (1, 1) if every_backend in PLAIN else (1, 2, 3, 2)
    assert_same_every_time(lambda: with_gradients(o, ours).values(), len(threads), threads=threads)


def test_gradcheck():
    o = grouped_operands(F64, F64, N=5, K=6, r=2, sizes=(2, 0, 3))
    x = o.x[:-1].detach().requires_grad_()
    rows = o.rows.clamp(max=len(x) - 1)
    others = [t.detach().requires_grad_() for t in (o.lora_A, o.lora_B, o.bias)]

    def function(x: Tensor, A: Tensor, B: Tensor, bias: Tensor) -> Tensor:
        options = {"scaling": 0.5, "bias": bias, "rows": rows}
        return peftkern.grouped_lora_linear(x, o.weight, o.offsets, A, B, **options)

    assert torch.autograd.gradcheck(function, (x, *others))
    assert torch.autograd.gradgradcheck(function, (x, *others))


@pytest.mark.parametrize("nf4", [False, True])
def test_nothing_of_the_size_of_the_stack(nf4):
    """Neither a gradient of it, nor a delta, nor what it decodes to."""
    o = grouped_operands(BF16, F32, N=64, K=128, sizes=(1,) * 40, nf4=nf4)
    stack = o.weight.numel()
    with LargestTensor() as largest:
        with_gradients(o, ours)
    assert 0 < largest.numel < stack / 4


# ---- routing


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_route(dtype):
    index = torch.randint(6, (50, 3), dtype=dtype)  # 5 is another rank's
    routing = route(index, 5)
    flat = index.view(-1).tolist()
    order = sorted(range(len(flat)), key=lambda pair: (flat[pair], pair))
    assert routing.rows.tolist() == [pair // 3 for pair in order]
    assert routing.offsets.tolist() == [sum(e <= end for e in flat) for end in range(5)]
    assert [order[row] for row in routing.inverse.view(-1).tolist()] == list(range(150))
    assert (routing.rows.dtype, routing.offsets.dtype) == (torch.int32, torch.int32)


def test_route_of_no_token():
    routing = route(torch.empty(0, 2, dtype=torch.int64), 3)
    assert routing.offsets.tolist() == [0, 0, 0] and routing.inverse.shape == (0, 2)


@pytest.mark.parametrize(
    ("index", "experts", "message"),
    [
        (torch.tensor([[0, -1]]), 2, "top_k_index: expected ids from 0 on, got -1"),
        (torch.tensor([0, 1]), 2, r"top_k_index: expected \[T, top\], got \[2\]"),
        (torch.tensor([[0.0]]), 2, "top_k_index: expected one of"),
        (torch.tensor([[0]]), 0, "num_experts: expected an integer of at least 1, got 0"),
        (torch.tensor([[0]]), 1.5, "num_experts: expected an integer of at least 1, got 1.5"),
    ],
)
def test_route_refuses(index, experts, message):
    with pytest.raises(ValueError, match=message):
        route(index, experts)


# ---- arguments


def refused(o: Grouped, **changed) -> None:
    arguments = {"x": o.x, "weight": o.weight, "offsets": o.offsets, "rows": o.rows}
    arguments |= {"lora_A": o.lora_A, "lora_B": o.lora_B, "bias": o.bias} | changed
    peftkern.grouped_lora_linear(**arguments)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("x", lambda t: t[:, :-1], r"x: expected \[T, 64\] for weights \[48, 64\]"),
        ("x", lambda t: t[0], r"x: expected \[T, K\]"),
        ("x", lambda t: t.double(), "weight: expected torch.float64 like x"),
        ("weight", lambda t: t[:2], r"weight: expected \[E, N, K\] with 11 groups"),
        ("weight", lambda t: t[0], r"weight: expected \[E, N, K\]"),
        ("offsets", lambda t: t.long(), "offsets: expected an int32 vector"),
        ("rows", lambda t: t.long(), "rows: expected an int32 vector"),
        ("lora_A", lambda t: t[1:], r"lora_A: expected \[11, r, 64\]"),
        ("lora_B", lambda t: t[:, :-1], r"lora_B: expected \[11, 48, 4\]"),
        ("lora_B", lambda t: None, "lora_A, lora_B: expected two tensors or none"),
        ("bias", lambda t: t[0], r"bias: expected \[11, 48\]"),
        ("scaling", lambda t: torch.ones(()), "scaling: expected a number"),
    ],
)
def test_refuses(name, change, message):
    o = grouped_operands(F32, F32)
    with pytest.raises(ValueError, match=message):
        refused(o, **{name: change(getattr(o, name))})


def test_refuses_blocks_across_experts():
    w = peftkern.quantize_nf4(torch.randn(2, 5, 10), blocksize=64)
    offsets = torch.tensor([1, 2], dtype=torch.int32)
    with pytest.raises(ValueError, match="weight: expected matrices of whole blocks of 64 values"):
        peftkern.grouped_lora_linear(torch.randn(2, 10), w, offsets)


@pytest.mark.parametrize("r", [1, 5, 16, 17])
def test_inf_is_not_nan(every_backend, r):
    """Behind the last rank Inf times zero would be, of few rows and of many."""
    x, dy = torch.rand(15, 40), torch.rand(15, 24)
    x[[1, 7], 3] = dy[[1, 7], 2] = torch.inf
    x.requires_grad_()
    A, B = torch.rand(2, r, 40) + 0.1, torch.rand(2, 24, r) + 0.1
    offsets = torch.tensor([3, 15], dtype=torch.int32)
    y = peftkern.grouped_lora_linear(x, None, offsets, A, B)
    y.backward(dy)
    infinite = torch.zeros(15, dtype=torch.bool)
    infinite[[1, 7]] = True
    for got in (y, x.grad):
        assert got[infinite].isposinf().all() and got[~infinite].isfinite().all()


@pytest.mark.parametrize(
    ("offsets", "rows"),
    [([3, 2, 5], None), ([-1, 2, 5], None), ([1, 2, 99], None), ([1, 2, 5], [0, 1, 2, 3, 77])],
)
def test_nothing_is_read_beyond_the_tensors(backend, offsets, rows):
    x, weight = torch.randn(5, 8), torch.randn(3, 4, 8)
    offsets = torch.tensor(offsets, dtype=torch.int32)
    rows = None if rows is None else torch.tensor(rows, dtype=torch.int32)
    with pytest.raises((ValueError, IndexError), match=r"offsets|rows|index|out of"):
        peftkern.grouped_lora_linear(x, weight, offsets, rows=rows)
