"""The grouped linear layer's compiled kernels on a GPU: values, routing on the device, graphs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gpu_cases import on_device
from gpu_runs import CUDA, NEEDS_GPU, capture, launches, nothing_waits, on_a_busy_stream
from grouped_cases import GRADIENTS, PAST, Grouped, check, grouped_operands, run_ops
from linear_cases import BF16, F16, F32
from nf4_weights import assert_same_bits, assert_same_every_time

import peftkern

pytestmark = [*NEEDS_GPU, pytest.mark.usefixtures("triton_serves")]

DTYPES = [(BF16, F32), (BF16, BF16), (F16, F32), (F32, F32)]
SHAPES = [(256, 320, 16), (192, 96, 64), (96, 33, 5)]  # N, K, r
KINDS = {
    "dense": {},
    "dense transposed": {"transposed": True},
    "one weight": {"shared": True, "through_rows": False},
    "no weight": {"base": False},
    "nf4": {"nf4": True},
    "nf4 transposed": {"nf4": True, "transposed": True},
}


def routed(R: int, E: int, seed: int = 0) -> tuple[int, ...]:
    """Sizes of groups, a few of which are popular and some empty."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(E, generator=generator) ** 3
    ids = torch.multinomial(weights, R, replacement=True, generator=generator)
    return tuple(torch.bincount(ids, minlength=E).tolist())


def drawn(shape: tuple[int, int, int], *dtypes: torch.dtype, **options) -> Grouped:
    N, K, r = shape
    with peftkern.use_backend("reference"):
        o = on_device(grouped_operands(*dtypes, N=N, K=K, r=r, **options), CUDA)
    o.dy[-PAST:] = float("nan")
    return o


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("R", [17, 200, 700, 4300])
def test_values_and_gradients(R, shape, dtypes, kind):
    with peftkern.use_backend("triton"):
        check(drawn(shape, *dtypes, sizes=routed(R, 16), **KINDS[kind]))


@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("sizes", [(0,) * 8, (1,) * 200, (0, 5000, 0, 1), (3,)], ids=len)
def test_lopsided_routing(sizes, kind):
    with peftkern.use_backend("triton"):
        check(drawn((128, 192, 8), BF16, F32, sizes=sizes, **KINDS[kind]))


@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize("R", [8, 900])
def test_equal_bits_every_time(R, nf4):
    o = drawn((256, 512, 16), BF16, F32, sizes=routed(R, 32), nf4=nf4)
    with peftkern.use_backend("triton"):
        assert_same_every_time(lambda: run_ops(o).values())


@pytest.mark.parametrize("nf4", [False, True])
def test_one_graph_serves_every_routing(nf4):
    """Offsets and rows are read on the device alone: a replay follows what they hold by then."""
    R, E = 300, 12
    o = drawn((128, 256, 16), BF16, F32, sizes=routed(R, E), nf4=nf4)
    with peftkern.use_backend("triton"):
        graph, result = capture(lambda: run_ops(o))
        for seed in (1, 2):
            ends = torch.tensor(routed(R, E, seed)).cumsum(0).int()
            o.offsets.copy_(ends)
            o.rows[:R].copy_(torch.randint(R // 2, (R,)))
            graph.replay()
            assert_same_bits(result, run_ops(o))


def test_nothing_waits_for_the_device():
    o = drawn((128, 256, 16), BF16, F32, sizes=routed(100, 12))
    with peftkern.use_backend("triton"):
        run_ops(o)
        with nothing_waits():
            run_ops(o)


@pytest.mark.parametrize(("needs", "most"), [([False] * 4, 2), ([True] * 4, 6)], ids=str)
def test_few_launches(needs, most):
    """S and y; then dS, dx, dA, and dB with dbias."""
    o = drawn((1536, 2048, 16), BF16, F32, sizes=routed(4000, 32))
    with peftkern.use_backend("triton"):
        names = launches(lambda: run_ops(o, needs))
    assert 0 < len(names) <= most, names


@pytest.mark.parametrize("index", [-1, 2**31 - 1])
def test_a_row_out_of_range_gives_nan(index):
    o = drawn((64, 96, 4), BF16, F32, sizes=(2, 0, 3))
    rows = o.rows.clone()
    rows[3] = index
    with peftkern.use_backend("triton"):
        got, wanted = run_ops(replace(o, rows=rows)), run_ops(o)
    others = torch.arange(len(rows), device=CUDA) != 3
    assert got["y"][3].isnan().all()
    assert_same_bits(got["y"][others], wanted["y"][others])
    assert got["dA"][:2].isfinite().all()


@pytest.mark.parametrize("ends", [[-7, 2, 5], [5, 3, 1], [2, 2, 2**31 - 1], [9, -(2**31), 5]])
def test_wrong_offsets_are_survived(ends):
    o = drawn((64, 96, 4), BF16, F32, sizes=(2, 0, 3))
    with peftkern.use_backend("triton"):
        run_ops(replace(o, offsets=torch.tensor(ends, dtype=torch.int32, device=CUDA)))
    torch.cuda.synchronize()


def test_other_stream():
    o = drawn((256, 320, 16), BF16, F32, sizes=routed(300, 8))
    with peftkern.use_backend("triton"):
        wanted = run_ops(o)
        late = replace(o, x=torch.zeros_like(o.x))
        got = on_a_busy_stream(lambda: run_ops(late), [late.x], [o.x])
    for name in ("y", "S", *GRADIENTS):
        assert_same_bits(got[name], wanted[name])
