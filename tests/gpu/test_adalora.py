"""AdaLoRA's kernels and the low-rank SVD on a GPU: numerics, streams, launches, no waiting.

CUDA graphs are left out: these ops copy a table of addresses from pinned memory at every call, and
a replayed graph would read that memory again after torch has given it to others.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from adalora_cases import (
    SHAPES,
    assert_near,
    check_allocation,
    importance,
    layers,
    random_scores,
)
from gpu_runs import CUDA, NEEDS_GPU, launches, nothing_waits, on_a_busy_stream
from linear_cases import BF16, F16, F32
from low_rank_svd_cases import check, graded, on_cpu
from nf4_weights import assert_same_every_time
from tolerances import SVD_SIGMA
from torch import Tensor, nn

import peftkern
from peftkern.functional.adalora import adalora_allocate_
from peftkern.functional.low_rank_svd import LowRankSVD, low_rank_svd, low_rank_svdvals
from peftkern.layers import SVDLinear
from peftkern.methods.adalora import RankAllocator

pytestmark = NEEDS_GPU

LLAMA_BLOCK = [(12, 4096, 4096)] * 4 + [(12, 4096, 11008)] * 2 + [(12, 11008, 4096)]  # r, K, N
PAIRS = [(4096, 4096, 16), (11008, 4096, 16), (1300, 700, 33), (40, 5, 12), (97, 80, 64), (5, 3, 1)]
LAUNCHES_MOST = 4  # of update_and_allocate
SVD_LAUNCHES_MOST = 11  # of a list of one dtype and one block of ranks


@pytest.fixture(autouse=True)
def nothing_falls_back() -> Iterator[None]:
    """No call on the device may go elsewhere by itself."""
    peftkern.reset_stats()
    yield
    assert not peftkern.stats().fallbacks


def to_cuda(tensors: list[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.to(CUDA) for t in tensors]


def drawn(shapes, dtype: torch.dtype = F32, grad_dtype: torch.dtype = F32) -> tuple:
    params, grads, numel = layers(shapes, dtype, grad_dtype)
    state = torch.rand(numel, device=CUDA), torch.rand(numel, device=CUDA)
    return to_cuda(params), to_cuda(grads), *state


# AdaLoRA


@pytest.mark.parametrize(
    ("dtype", "grad_dtype"), [(F32, F32), (BF16, BF16), (BF16, F32), (F16, F16)]
)
@pytest.mark.parametrize("shapes", [SHAPES, LLAMA_BLOCK], ids=["ragged", "llama"])
def test_importance(shapes, dtype, grad_dtype):
    case = drawn(shapes, dtype, grad_dtype)
    assert_near(importance("triton", *case), importance("reference", *case))


@pytest.mark.parametrize("kind", ["any", "ties", "zero", "nan"])
@pytest.mark.parametrize("scale", [1, 1e-7])  # costs that are integers, and times
def test_allocation_with_limits_is_that_of_the_cpu_and_nothing_waits(kind, scale):
    ranks = [12] * 224
    cost = [c * scale for c in (8192, 5120, 5120, 8192, 18432, 18432, 18432)] * 32
    limits = {"cost": cost, "r_min": 1, "r_max": [3, 12] * 112}
    scores, budget = random_scores(kind, sum(ranks)), 4 * sum(cost)
    on_device, lora_E = scores.to(CUDA), [torch.ones(r, 1, device=CUDA) for r in ranks]
    adalora_allocate_(on_device, lora_E, budget, **limits)  # its tables are copied once
    with nothing_waits():
        mask = adalora_allocate_(on_device, lora_E, budget, **limits)
    wanted = adalora_allocate_(scores, [torch.ones(r, 1) for r in ranks], budget, **limits)
    assert torch.equal(mask.cpu(), wanted)


@pytest.mark.parametrize("threshold", [False, True])
@pytest.mark.parametrize("kind", ["any", "ties", "zero", "nan", "inf"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_allocation(dtype, kind, threshold):
    ranks = [12] * 224 + [1, 0, 40]
    total = sum(ranks)
    scores = random_scores(kind, total)
    lora_E = [torch.randn(r, 1).to(dtype) for r in ranks]
    for budget in (0, 1, total // 3, total - 1, total, total + 5):
        check_allocation(scores, lora_E, budget, threshold, CUDA)


def test_importance_on_another_stream():
    """What it reads arrives late, on that stream alone."""
    params, grads, ipt, unc = drawn(LLAMA_BLOCK)
    wanted = importance("triton", params, grads, ipt, unc)
    late = [torch.zeros_like(p) for p in params]
    got = on_a_busy_stream(lambda: importance("triton", late, grads, ipt, unc), late, params)
    assert_near(got, wanted)


def test_equal_bits_of_importance_every_time():
    case = drawn(LLAMA_BLOCK)
    assert_same_every_time(lambda: importance("triton", *case))


def allocator_on(device: str, shapes) -> RankAllocator:
    """Layers over a weight of one zero: nobody multiplies by it here."""
    torch.manual_seed(0)
    model = nn.ModuleList()
    for r, K, N in shapes:
        base = nn.Linear(1, 1, bias=False, device=device)
        base.in_features, base.out_features = K, N
        base.weight = nn.Parameter(torch.zeros(1, 1, device=device).expand(N, K))
        model.append(SVDLinear(base, r=r))
    allocator = RankAllocator(model, target_r=4, total_step=20, tinit=1, tfinal=4, deltaT=2)
    for layer in allocator.layers.values():
        for p in (layer.lora_E, layer.lora_A, layer.lora_B):
            p.data.copy_(torch.randn(p.shape))
            p.grad = torch.randn(p.shape).to(device)
    return allocator


def test_schedule_gives_the_masks_of_the_reference():
    gpu, cpu = (allocator_on(device, SHAPES[:4]) for device in (CUDA, "cpu"))
    for step in range(1, 21):
        budget, mask = gpu.update_and_allocate(step)
        with peftkern.use_backend("reference"):
            wanted = cpu.update_and_allocate(step)
        assert budget == wanted[0] and (mask is None) == (wanted[1] is None)
        assert mask is None or torch.equal(mask.cpu(), wanted[1])
        for got, other in zip(gpu.layers.values(), cpu.layers.values(), strict=True):
            assert torch.equal(got.lora_E.cpu(), other.lora_E)


def test_update_and_allocate_waits_for_nothing():
    torch.use_deterministic_algorithms(False)
    allocator = allocator_on(CUDA, LLAMA_BLOCK * 2)
    for step in (1, 2):  # compiles, and remembers the tables of these shapes
        allocator.update_and_allocate(step)
    with nothing_waits():
        for step in (3, 4):
            allocator.update_and_allocate(step)
    assert allocator.mask.sum() == allocator.schedule(4)[0]


def test_few_launches_of_update_and_allocate():
    allocator = allocator_on(CUDA, LLAMA_BLOCK * 32)
    names = launches(lambda: allocator.update_and_allocate(4))
    assert 0 < len(names) <= LAUNCHES_MOST, names


# Low-rank SVD


def pairs(shapes, dtype: torch.dtype = F32) -> tuple[list[Tensor], list[Tensor]]:
    Bs = [torch.randn(m, r).to(dtype) for m, _, r in shapes]
    return Bs, [torch.randn(r, n).to(dtype) for _, n, r in shapes]


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("shape", PAIRS[2:], ids=str)
def test_svd_shapes(shape, dtype):
    (B,), (A,) = pairs([shape], dtype)
    check(on_cpu(low_rank_svd(B.to(CUDA), A.to(CUDA), -1.5)), B, A, -1.5)


@pytest.mark.parametrize("kappa", [1, 1e4, 9e4, 3e5, 1e6])
@pytest.mark.parametrize("r", [2, 16, 33, 64])
def test_svd_condition_numbers(r, kappa):
    B, A = (factor.float() for factor in graded(1300, 1100, r, kappa))
    check(on_cpu(low_rank_svd(B.to(CUDA), A.to(CUDA), 0.5)), B, A, 0.5)


def test_svd_of_a_list_against_the_reference():
    Bs, As = pairs(PAIRS)
    got = low_rank_svd(to_cuda(Bs), to_cuda(As))
    with peftkern.use_backend("reference"):
        wanted = low_rank_svd(Bs, As)
    assert torch.equal(got.rank.cpu(), wanted.rank) and not got.info.any()
    for i, (B, A) in enumerate(zip(Bs, As, strict=True)):
        one = LowRankSVD(*(column[i] for column in got))
        difference = (one.S.cpu() - wanted.S[i]).abs().max()
        assert difference <= 2 * SVD_SIGMA * wanted.S[i][0]  # either may be off by one bound
        alone = low_rank_svd(B.to(CUDA), A.to(CUDA))
        assert all(torch.equal(a, b) for a, b in zip(one, alone, strict=True))
        assert torch.equal(low_rank_svdvals(B.to(CUDA), A.to(CUDA)), alone.S)


def test_svd_of_what_is_not_finite_and_of_nothing():
    Bs, As = pairs([(40, 30, 5)] * 3)
    Bs[1][3, 2], As[2] = float("nan"), torch.zeros(5, 30)
    svd = low_rank_svd(to_cuda(Bs), to_cuda(As))
    assert svd.info.tolist() == [0, -1, 0] and svd.rank.tolist() == [5, 0, 0]
    assert svd.S[1].isnan().all() and not svd.S[2].any()


def test_svd_on_another_stream():
    Bs, As = (to_cuda(factors) for factors in pairs([(2048, 1024, 16)] * 8))
    wanted = low_rank_svd(Bs, As)
    late = [torch.zeros_like(B) for B in Bs]
    got = on_a_busy_stream(lambda: low_rank_svd(late, As), late, Bs)
    for one, other in zip(got, wanted, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_equal_bits_of_the_svd_every_time():
    Bs, As = (to_cuda(factors) for factors in pairs(PAIRS))
    assert_same_every_time(lambda: itertools.chain(*low_rank_svd(Bs, As)))


def test_svd_waits_for_nothing_in_few_launches():
    Bs, As = (to_cuda(factors) for factors in pairs([(4096, 4096, 16)] * 8))
    names = launches(lambda: low_rank_svd(Bs, As))
    assert 0 < len(names) <= SVD_LAUNCHES_MOST + 2, names  # rank and info start at zero
    with nothing_waits():
        low_rank_svd(Bs, As)
