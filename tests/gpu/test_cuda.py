"""The CUDA kernels on a GPU: numerics, streams, graphs, large sizes, compute-sanitizer."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from cuda_cases import (
    assert_quantized_alike,
    check,
    check_extreme_absmax,
    check_extreme_blocks,
    check_ties,
    forward,
    with_splits,
)
from gpu_cases import NF4Operands, nf4_cases, same_bits
from gpu_runs import CUDA, NEEDS_GPU, capture, nothing_waits, on_a_busy_stream
from linear_cases import BF16, F16, F32
from low_rank_svd_cases import check as check_svd
from low_rank_svd_cases import check_cores, graded, on_cpu
from nf4_weights import (
    DTYPES,
    assert_same_every_time,
    every_byte_weight,
    numpy_dequantize,
    random_weight,
)
from tolerances import DETERMINISM_RUNS, SVD_BOUNDS_64
from torch import Tensor

import peftkern
from peftkern import NF4Weight
from peftkern.backends import ops, reference
from peftkern.backends.cuda import low_rank_svd as cuda
from peftkern.backends.cuda import nf4
from peftkern.backends.cuda.nf4_lora_linear import launch
from peftkern.formats.nf4 import BLOCKSIZES
from peftkern.functional.low_rank_svd import low_rank_svd

pytestmark = [*NEEDS_GPU, pytest.mark.usefixtures("cuda_serves")]


# Numerics


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_dequantize_every_byte(blocksize, dtype, double_quant):
    w = every_byte_weight(blocksize, double_quant, dtype)
    assert same_bits(peftkern.dequantize_nf4(w.to(CUDA)).cpu(), numpy_dequantize(w, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_quantize_every_blocksize(blocksize, dtype):
    for shape in ((1,), (blocksize - 1,), (9001,), (0, 7), (1024, 4096)):
        assert_quantized_alike(random_weight(shape, dtype), blocksize, CUDA)


@pytest.mark.parametrize(
    "value", [math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-40, 3e38]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_values(dtype, value):
    check_extreme_absmax(value, dtype, CUDA)
    check_extreme_blocks(value, dtype, CUDA)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_take_the_lower_code(dtype):
    check_ties(dtype, CUDA)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_that_begins_anywhere(dtype):
    w = every_byte_weight(64, True, dtype)
    wanted, on_gpu = numpy_dequantize(w, dtype), w.to(CUDA)
    for start in (1, 2, 3, 8):
        memory = torch.full((w.numel + 16,), 42.0, dtype=dtype, device=CUDA)
        out = memory[start : start + w.numel].view(w.shape)
        codes = torch.cat((on_gpu.packed.new_zeros(start), on_gpu.packed))[start:]
        peftkern.dequantize_nf4(replace(on_gpu, packed=codes), out=out)
        assert same_bits(out.cpu(), wanted)
        assert (memory[:start] == 42.0).all() and (memory[start + w.numel :] == 42.0).all()
        packed, absmax = ops.nf4_quantize(out, 64)
        plain = reference.nf4_quantize(wanted, 64)
        assert torch.equal(packed.cpu(), plain[0]) and same_bits(absmax.cpu(), plain[1])
    strided = torch.full((w.shape[1], 2 * w.shape[0]), 42.0, dtype=dtype, device=CUDA).t()
    peftkern.dequantize_nf4(on_gpu, out=strided[::2])
    assert same_bits(strided[::2].cpu(), wanted) and (strided[1::2] == 42.0).all()


def test_equal_bits_every_time():
    w, dense = every_byte_weight(64, True, BF16).to(CUDA), random_weight((1024, 4096)).to(CUDA)
    assert_same_every_time(lambda: (peftkern.dequantize_nf4(w), *ops.nf4_quantize(dense, 64)))


def test_more_than_32_bits_of_elements():
    """Both ends, and what lies around the places where an int32 or a uint32 would start again."""
    numel, blocksize = 2**32 + 3 * 4096 + 5, 4096
    needed = 3 * numel + (1 << 30)  # dense, two sets of codes, and room
    free, _ = torch.cuda.mem_get_info(CUDA)
    if free < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free memory on the GPU, there are {free >> 30}")
    torch.use_deterministic_algorithms(False)  # which fills new memory
    packed = torch.randint(0, 256, ((numel + 1) // 2,), dtype=torch.uint8, device=CUDA)
    absmax = torch.rand(-(-numel // blocksize), device=CUDA)
    w = NF4Weight(packed, absmax, (numel,), blocksize, BF16)
    dense = torch.full((numel,), math.nan, dtype=BF16, device=CUDA)
    peftkern.dequantize_nf4(w, out=dense)
    codes, scale = ops.nf4_quantize(dense, blocksize)
    for place in (0, 2**31, 2**32, numel):
        start = max(0, place // blocksize * blocksize - 2 * blocksize)
        stop = min(numel, start + 4 * blocksize)
        blocks = slice(start // blocksize, -(-stop // blocksize))
        octets = slice(start // 2, (stop + 1) // 2)
        part = NF4Weight(
            packed[octets].cpu(), absmax[blocks].cpu(), (stop - start,), blocksize, BF16
        )
        wanted = numpy_dequantize(part, BF16)
        assert same_bits(dense[start:stop].cpu(), wanted), place
        again = reference.nf4_quantize(wanted, blocksize)
        assert torch.equal(codes[octets].cpu(), again[0]), place
        assert same_bits(scale[blocks].cpu(), again[1]), place


# nf4_lora_linear, up to 32 rows


def linear_operands(shape: tuple[int, int, int, int], **options) -> NF4Operands:
    return nf4_cases(shape, BF16, F32, device=CUDA, **options)[0]


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtypes", [(BF16, F32), (F16, F32), (BF16, BF16), (F16, F16)], ids=str)
@pytest.mark.parametrize("M", [1, 2, 5, 8, 9, 16, 17, 32])
def test_linear_every_number_of_rows(M, dtypes, double_quant):
    for N, K, r in ((37, 192, 5), (1000, 4096, 16), (4096, 1024, 64)):
        cases = nf4_cases(
            (M, N, K, r), *dtypes, device=CUDA, double_quant=double_quant, bias=M % 2 == 0
        )
        check(cases)


@pytest.mark.parametrize("splits", [1, 2, 7, 16])
@pytest.mark.parametrize("M", [1, 16, 32])
def test_linear_split_over_blocks(M, splits):
    check([linear_operands((M, 500, 4096, 16))], splits=splits)


@pytest.mark.parametrize("blocksize", [b for b in BLOCKSIZES if b >= 64])
def test_linear_every_blocksize(blocksize):
    o = linear_operands((3, 200, 2 * max(blocksize, 512), 8), blocksize=blocksize)
    check([o])
    check([o], lora=False)


@pytest.mark.parametrize("M", [1, 16, 32])
def test_linear_equal_bits_every_time(M):
    """One tile for each block, several, and a split K."""
    for shape in ((M, 4096, 4096, 16), (M, 14336, 1024, 16), (M, 256, 8192, 16)):
        o = linear_operands(shape)
        assert_same_every_time(partial(forward, o))


@pytest.mark.parametrize("splits", [1, 4])
def test_linear_on_another_stream_and_in_a_graph(splits):
    """The second launch begins while the first, which makes what it needs, still runs."""
    o = linear_operands((4, 512, 4096, 16))
    wanted = with_splits(o, splits)
    late = replace(o, x=torch.zeros_like(o.x))
    got = on_a_busy_stream(lambda: with_splits(late, splits), [late.x], [o.x])
    assert all(same_bits(a, b) for a, b in zip(got, wanted, strict=True))
    graph, recorded = capture(lambda: [with_splits(late, splits) for _ in range(3)])
    late.x.copy_(o.x.flip(0))
    for _ in range(DETERMINISM_RUNS):
        graph.replay()
    again = with_splits(late, splits)
    for results in recorded:
        assert all(same_bits(a, b) for a, b in zip(results, again, strict=True))


def test_linear_more_than_32_bits_of_elements():
    """The last rows of a weight whose elements an int32 cannot count, against those rows alone."""
    N, K = 2**18 + 40, 2**14
    free, _ = torch.cuda.mem_get_info(CUDA)
    if free < N * K:
        pytest.skip(f"needs {N * K >> 30} GiB of free memory on the GPU, there are {free >> 30}")
    torch.use_deterministic_algorithms(False)  # which fills new memory
    packed = torch.randint(0, 256, (N * K // 2,), dtype=torch.uint8, device=CUDA)
    absmax = torch.rand(N * K // 4096, device=CUDA)
    x = torch.randn(2, K, device=CUDA).to(BF16)
    last = slice(-40 * K // 2, None), slice(-40 * K // 4096, None)
    whole = NF4Weight(packed, absmax, (N, K), 4096, BF16)
    part = NF4Weight(packed[last[0]].clone(), absmax[last[1]].clone(), (40, K), 4096, BF16)
    got, wanted = (launch(x, w.tensors, w.layout, None, None, None, 1.0, 1) for w in (whole, part))
    assert same_bits(got[0][:, -40:].contiguous(), wanted[0])


# Streams, graphs, devices


def test_other_stream():
    w, dense = every_byte_weight(64, True, BF16), random_weight((300, 64))
    ready, source = w.to(CUDA), dense.to(CUDA)
    late = replace(ready, packed=torch.zeros_like(ready.packed))
    late_dense = torch.zeros_like(source)
    got, packed, absmax = on_a_busy_stream(
        lambda: (peftkern.dequantize_nf4(late), *ops.nf4_quantize(late_dense, 64)),
        [late.packed, late_dense],
        [ready.packed, source],
    )
    assert same_bits(got.cpu(), numpy_dequantize(w, BF16))
    wanted = reference.nf4_quantize(dense, 64)
    assert torch.equal(packed.cpu(), wanted[0]) and same_bits(absmax.cpu(), wanted[1])


def test_graph_replays_what_it_recorded_on_new_contents():
    w, dense = every_byte_weight(64, True, BF16).to(CUDA), random_weight((300, 64)).to(CUDA)

    def call() -> tuple[Tensor, ...]:
        return peftkern.dequantize_nf4(w), *ops.nf4_quantize(dense, 64)

    graph, results = capture(call)
    w.packed.copy_(w.packed.flip(0))
    dense.copy_(torch.randn_like(dense))
    graph.replay()
    assert all(same_bits(a, b) for a, b in zip(results, call(), strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_device_that_is_not_current():
    w = every_byte_weight(64, True, BF16)
    assert torch.cuda.current_device() == 0
    got = peftkern.dequantize_nf4(w.to("cuda:1"))
    assert torch.cuda.current_device() == 0 and got.device == torch.device("cuda:1")
    assert same_bits(got.cpu(), numpy_dequantize(w, BF16))


def test_operands_on_two_devices_are_refused_by_name():
    w = every_byte_weight(64, True, BF16).to(CUDA)
    packed, absmax, *nested = w.tensors
    with pytest.raises(ValueError, match=r"^absmax: expected .* on cuda:0, got .* on cpu"):
        nf4.nf4_dequantize([packed, absmax.cpu(), *nested], w.layout, BF16)


# The low-rank SVD


def jacobi(cores: Tensor, shared: int = 0) -> tuple[Tensor, ...]:
    return cuda.jacobi_svd(cores.to(CUDA), cuda.JACOBI_SWEEPS, True, shared)


@pytest.mark.parametrize("r", [1, 2, 3, 5, 16, 17, 31, 32, 33, 64, 65, 100, 128])
def test_jacobi_against_lapack(r):
    cores = torch.randn(300, r, r, dtype=torch.float64)
    if r > 1:
        cores[1, 0], cores[2] = cores[1, 1], 0.0
    cores[3, 0, r - 1] = math.nan
    sigma, left, right, info = (tensor.cpu() for tensor in jacobi(cores))
    assert info.tolist() == [0] * 3 + [-1] + [0] * 296
    assert all(tensor[3].isnan().all() for tensor in (sigma, left, right))
    good = [i for i in range(300) if i != 3]
    check_cores([tensor[good] for tensor in (sigma, left, right, info)], cores[good])


def test_jacobi_with_the_shared_memory_of_other_devices():
    cores = torch.randn(4, 128, 128, dtype=torch.float64)
    wanted = jacobi(cores)
    for limit in (96 << 10, 48 << 10):
        for got, want in zip(jacobi(cores, limit), wanted, strict=True):
            assert (got - want).abs().max() <= SVD_BOUNDS_64[1]


def test_jacobi_has_equal_bits_every_time_and_in_graphs():
    cores = torch.randn(30, 33, 33, dtype=torch.float64, device=CUDA)
    first = jacobi(cores)
    assert_same_every_time(lambda: jacobi(cores))
    graph, recorded = capture(lambda: jacobi(cores))
    cores.copy_(cores.flip(0))
    graph.replay()
    assert all(torch.equal(a, b.flip(0)) for a, b in zip(recorded, first, strict=True))


@pytest.mark.parametrize("kappa", [1, 1e4, 1e6])
@pytest.mark.parametrize("r", [2, 16, 33, 64, 66, 128])
def test_low_rank_svd_of_every_rank(r, kappa):
    B, A = (factor.float() for factor in graded(700, 600, r, kappa))
    check_svd(on_cpu(low_rank_svd(B.to(CUDA), A.to(CUDA), 0.5)), B, A, 0.5)


def test_low_rank_svd_serves_ranks_beyond_triton():
    B, A = torch.randn(300, 80, device=CUDA), torch.randn(80, 200, device=CUDA)
    with peftkern.use_backend(None):
        peftkern.reset_stats()
        low_rank_svd(B, A)
        assert peftkern.stats().calls == {("low_rank_svd", "cuda"): 1}


def test_low_rank_svd_waits_for_nothing_and_keeps_its_stream():
    Bs = [torch.randn(500, 70, device=CUDA) for _ in range(4)]
    As = [torch.randn(70, 400, device=CUDA) for _ in range(4)]
    wanted = low_rank_svd(Bs, As)
    late = [torch.zeros_like(B) for B in Bs]
    with nothing_waits():
        got = on_a_busy_stream(lambda: low_rank_svd(late, As), late, Bs)
    for one, other in zip(got[:3], wanted[:3], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
