"""The Triton kernels of both linear functions under the interpreter: the reference and float64."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from gpu_cases import (
    RESULTS,
    check_finite,
    check_ops_against_reference,
    check_subsets,
    dense_cases,
    draw_seed,
    nf4_cases,
    nf4_operands,
    ours,
    run_ops,
)
from grids import examples, thinned
from hypothesis import given
from hypothesis import strategies as st
from interpreted import INSIDE_TENSORS, RUNS
from linear_cases import (
    BF16,
    DTYPES,
    F16,
    F32,
    SHAPES,
    check_accuracy,
    layouts,
    operands,
)
from nf4_weights import assert_same_bits, assert_same_every_time, numpy_dequantize
from tolerances import assert_as_accurate_as_torch
from torch import Tensor

import peftkern
from peftkern.kernels import launch, low_rank_update
from peftkern.kernels.configs import Problem, nf4_fused_rows

pytestmark = INSIDE_TENSORS

CPU = torch.device("cpu")
FUSED_ROWS = nf4_fused_rows("interpreter", 1, 4, "")  # of results as narrow as those here
RANKS = [1, 17, 64, 65, 130, 256]
NF4_SHAPES = [(1, 33, 64, 3), (5, 40, 320, 17), (130, 20, 64, 4), (3, 21, 70, 5), (17, 7, 129, 2)]


def splits(kernel: str, M: int, N: int, K: int, r: int, bits: int = 32) -> int:
    """Into how many slabs the launch cuts its reduction (columns for lora_forward)."""
    return launch.config_for(Problem(kernel, M, N, K, r, bits), CPU).splits


# Values and gradients


@pytest.mark.parametrize(("shape", "dtypes"), thinned(SHAPES, DTYPES))
def test_lora_values_and_gradients(shape, dtypes):
    if shape == (33, 31, 257, 1):
        shape = (33, 31, 257, 2)  # half the draws
    check_accuracy(dense_cases(shape, *dtypes, bias=shape[0] != 5), ours)


@pytest.mark.parametrize(("shape", "dtypes"), thinned(NF4_SHAPES, DTYPES))
def test_nf4_lora_values_and_gradients(shape, dtypes):
    """Fused (few rows, blocks that end with rows) and composed (the others)."""
    check_accuracy(nf4_cases(shape, *dtypes, bias=shape[0] != 5), ours)


def test_nf4_shapes_reach_both_paths():
    fused = {M <= FUSED_ROWS and K % 64 == 0 for M, _, K, _ in NF4_SHAPES}
    assert fused == {True, False}
    assert any(M > FUSED_ROWS and K % 64 == 0 for M, _, K, _ in NF4_SHAPES)
    assert any(M <= FUSED_ROWS and K % 64 for M, _, K, _ in NF4_SHAPES)


@pytest.mark.parametrize(
    ("dtype", "blocksize", "double_quant"), thinned([F32, BF16], [32, 128, 4096], [True, False])
)
def test_nf4_lora_blocksizes(dtype, blocksize, double_quant):
    """A block that is a part of a tile of columns, several tiles, or longer than a row."""
    layout = {"blocksize": blocksize, "double_quant": double_quant}
    for K in (96, 128, 4096 if blocksize == 4096 else 384):
        check_accuracy(nf4_cases((8, 32, K, 8), dtype, F32, **layout), ours)


@pytest.mark.parametrize(("r", "dtypes"), thinned(RANKS, [(BF16, F32), (F32, F32)]))
def test_every_rank(r, dtypes):
    for M in (8, 40) if r > 1 else (8,):
        check_accuracy(dense_cases((M, 33, 50, r), *dtypes), ours)
        check_accuracy(nf4_cases((M, 33, 64, r), *dtypes), ours)


@pytest.mark.parametrize(
    ("cores", "r", "dtypes"),
    thinned(["mma", "wgmma"], [16, 32, 64], [(BF16, F32), (BF16, BF16), (F16, F32)]),
)
def test_tiles_of_every_kind_of_tensor_cores(cores, r, dtypes, monkeypatch):
    """And their products, in tf32 too: the interpreter's own tiles and precision are AMD's."""
    as_gpu = replace(launch._INTERPRETER, cores=cores, precision="tf32x3")
    monkeypatch.setattr(launch, "_traits", lambda device: as_gpu)
    check_ops_against_reference(dense_cases((520, 70, 130, r), *dtypes), 0.1)


@pytest.mark.parametrize("r", [4, 64])
def test_partial_sums_beyond_the_cap_are_a_second_read(r, monkeypatch):
    """Where partial dS would be more memory than that, dS has the same value by itself."""
    shrinks = []
    shrink = low_rank_update.shrink
    monkeypatch.setattr(low_rank_update, "shrink", lambda *a: shrinks.append(a) or shrink(*a))
    o = operands((40, 300, 50, r), BF16, F32)
    for cap in (low_rank_update.PARTIAL_BYTES, 4 * 3 * 40 * r - 1):
        monkeypatch.setattr(low_rank_update, "PARTIAL_BYTES", cap)
        check_ops_against_reference([o])
    assert len(shrinks) == (1 if r == 4 else 2)  # of r = 64 partial sums are the more bytes anyway


@pytest.mark.parametrize(("dtypes", "dropout_p", "r"), thinned(DTYPES, [0.1, 0.5, 1.0], [8, 65]))
def test_dropout_from_a_seed(dtypes, dropout_p, r):
    check_ops_against_reference(dense_cases((21, 33, 77, r), *dtypes), dropout_p)
    for M in (21, FUSED_ROWS + 1):
        check_ops_against_reference(nf4_cases((M, 33, 64, r), *dtypes), dropout_p)


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("M", [9, FUSED_ROWS + 1])
def test_nf4_linear_without_adapters(M, bias, dtype):
    o = nf4_operands((M, 37, 128, 1), dtype, F32, bias=bias)
    plain = replace(o, lora_B=torch.zeros_like(o.lora_B))
    needs = (True, False, False, bias)
    got = run_ops(o, needs=needs, lora=False)
    with peftkern.use_backend("reference"):
        eager, oracle = run_ops(plain), run_ops(plain.to(torch.float64))
    for name in ("y", "dx", "dbias") if bias else ("y", "dx"):
        assert_as_accurate_as_torch(got[name], eager[name], oracle[name])
    assert got["S"].shape == (0,) and got["dA"].shape == (0,) and got["dB"].shape == (0,)


@pytest.mark.parametrize(
    ("make", "r", "seeded"), thinned([operands, nf4_operands], [4, 65], [False, True])
)
def test_every_subset_of_gradients(make, r, seeded):
    o = replace(make((7, 19, 64, r), BF16, F32), dropout_p=0.5 if seeded else 0.0)
    subsets = itertools.product((False, True), repeat=4)
    check_subsets(o, subsets, draw_seed() if seeded else None)


# Layouts and values that are not ordinary


@pytest.mark.parametrize("make", [operands, nf4_operands])
@pytest.mark.parametrize("layout", ["transposed", "sliced", "misaligned", "3-d"])
def test_layouts_give_the_same_bits(layout, make):
    o = make((6, 20, 64, 4), BF16, F32)
    changed = {k: layouts(getattr(o, k))[layout] for k in ("x", "dy")}
    if layout != "3-d":
        changed |= {k: layouts(getattr(o, k))[layout] for k in ("lora_A", "lora_B")}
    wanted, got = run_ops(o), run_ops(replace(o, **changed))
    for name in RESULTS:
        assert_same_bits(got[name].reshape(wanted[name].shape), wanted[name])


@pytest.mark.parametrize("make", [operands, nf4_operands])
def test_stride_0_activation_and_gradient(make):
    o = make((1, 20, 64, 4), BF16, F32)
    dense = replace(o, x=o.x.repeat(5, 1), dy=o.dy.repeat(5, 1))
    expanded = replace(o, x=o.x.expand(5, 64), dy=o.dy.expand(5, 20))
    wanted, got = run_ops(dense), run_ops(expanded)
    assert_same_bits(got, wanted)
    zero = replace(o, dy=o.dy.new_ones(()).expand(1, 20))  # what sum() sends
    for name, value in run_ops(zero).items():
        assert torch.isfinite(value).all(), name


@pytest.mark.parametrize("make", [operands, nf4_operands])
@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0, 3)], ids=str)
def test_empty_batch(make, shape):
    o = make((1, 20, 64, 4), F32, F32)
    o = replace(o, x=torch.zeros(*shape, 64), dy=torch.zeros(*shape, 20))
    got = run_ops(o)
    assert got["y"].shape == (*shape, 20) and got["dx"].shape == (*shape, 64)
    for name in ("dA", "dB", "dbias"):
        assert (got[name] == 0).all()
    assert got["dA"].shape == o.lora_A.shape and got["dB"].shape == o.lora_B.shape


@pytest.mark.parametrize("make", [operands, nf4_operands])
def test_inputs_are_not_changed(make):
    o = replace(make((6, 20, 64, 4), BF16, F32), dropout_p=0.2)
    everything = vars(o) | (vars(o.w) if hasattr(o, "w") else {})
    tensors = {k: v for k, v in everything.items() if isinstance(v, Tensor)}
    before = {k: v.clone() for k, v in tensors.items()}
    run_ops(o, draw_seed())
    for name, value in before.items():
        assert torch.equal(tensors[name], value), name


@pytest.mark.parametrize(
    ("dtypes", "dropout_p", "name", "value"),
    thinned(
        [(F32, F32), (BF16, F32), (BF16, BF16), (F16, F32)],
        [0.0, 0.5],
        ["x", "lora_A", "lora_B", "dy", "bias"],
        [float("nan"), float("inf")],
        diagonals=2,
    ),
)
def test_nan_and_inf_propagate(dtypes, dropout_p, name, value):
    keep = draw_seed() if dropout_p else None
    for make, M in ((operands, 20), (nf4_operands, 20), (nf4_operands, FUSED_ROWS + 1)):
        o = replace(make((M, 20, 64, 4), *dtypes), dropout_p=dropout_p)
        getattr(o, name).view(-1)[3] = value
        check_finite(o, keep)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_nan_and_inf_of_absmax_propagate(dtype, value):
    for M in (6, FUSED_ROWS + 1):
        o = nf4_operands((M, 20, 128, 4), dtype, F32, double_quant=False)
        o.w.absmax[5] = value
        o = replace(o, weight=numpy_dequantize(o.w, dtype))
        assert not check_finite(o)["y"].isfinite().all()


# Split reductions


def test_launches_split_their_reductions():
    assert splits("lora_forward", 8, 257, 40, 4) > 1
    assert splits("lora_backward_sb", 100, 40, 1, 4) > 1
    assert splits("lora_backward_xa", 100, 1, 40, 4) > 1
    assert splits("nf4_forward", 8, 40, 512, 4) > 1
    assert splits("nf4_backward", 8, 512, 64, 1) > 1


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_split_reductions(dtype):
    check_accuracy(dense_cases((8, 257, 40, 4), dtype, F32), ours)
    check_accuracy(dense_cases((100, 40, 40, 4), dtype, F32), ours)
    check_accuracy(nf4_cases((8, 40, 512, 8), dtype, F32), ours)
    check_accuracy(nf4_cases((8, 512, 64, 8), dtype, F32), ours)


@pytest.mark.parametrize("runs", RUNS)
@pytest.mark.parametrize("case", [(operands, (100, 40, 40, 4)), (nf4_operands, (5, 40, 512, 4))])
def test_equal_bits_every_time(case, runs):
    make, shape = case
    o = replace(make(shape, BF16, F32), dropout_p=0.1)
    keep = draw_seed()
    assert_same_every_time(lambda: run_ops(o, keep).values(), runs)


@examples(1 / 25)
@given(
    shape=st.tuples(*(st.integers(8, n) for n in (150, 70, 200, 70))),
    dtypes=st.sampled_from(DTYPES),
    bias=st.booleans(),
    dropout_p=st.sampled_from([0.0, 0.5]),
    blocksize=st.sampled_from([None, 32, 64, 128]),
    whole_blocks=st.booleans(),
    double_quant=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape(shape, dtypes, bias, dropout_p, blocksize, whole_blocks, double_quant, seed):
    torch.manual_seed(seed)
    M, N, K, r = shape
    if blocksize is None:
        cases = dense_cases(shape, *dtypes, bias=bias)
    else:
        if whole_blocks:
            K = -(-K // blocksize) * blocksize
        layout = {"blocksize": blocksize, "double_quant": double_quant}
        cases = nf4_cases((M, N, K, r), *dtypes, bias=bias, **layout)
    check_ops_against_reference(cases, dropout_p)
