"""Sums and truncations of updates against dense matrices in float64."""

from __future__ import annotations

import pytest
import torch
from linear_cases import BF16, F16, F32, F64
from tolerances import SVD_BOUNDS
from torch import Tensor

from peftkern.methods import low_rank_algebra
from peftkern.methods.low_rank_algebra import (
    above,
    best_pair,
    concatenate,
    keeping,
    total_error,
    truncate,
)
from peftkern.methods.rank_rules import RankRule

RECONSTRUCTION = SVD_BOUNDS[3]
SHAPES = [(40, 30, 6), (7, 50, 9), (64, 64, 16), (3, 5, 1)]  # m, n, r


def layers(dtype: torch.dtype = F32) -> tuple[list[Tensor], list[Tensor], list[float]]:
    Bs = [torch.randn(m, r).to(dtype) for m, _, r in SHAPES]
    As = [torch.randn(r, n).to(dtype) for _, n, r in SHAPES]
    return Bs, As, [2.0, -0.3, 1.0, 0.0]


def product(B: Tensor, A: Tensor, scaling: float = 1.0) -> Tensor:
    return scaling * (B.double() @ A.double())


def best(dense: Tensor, rank: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(dense, full_matrices=False)
    return (U[..., :rank] * S[..., None, :rank]) @ Vh[..., :rank, :]


def assert_near(got: Tensor, want: Tensor, scale: Tensor) -> None:
    assert (got - want).norm() <= RECONSTRUCTION * scale.norm()


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
def test_truncation_is_the_dense_one(dtype):
    Bs, As, scaling = layers(dtype)
    factors, losses = truncate(Bs, As, scaling, RankRule("rank", 4))
    for B, A, s, pair, loss in zip(Bs, As, scaling, factors, losses, strict=True):
        dense = product(B, A, s)
        kept = min(4, B.shape[1], *dense.shape)
        assert pair.lora_B.shape == (B.shape[0], kept) and pair.lora_A.shape == (kept, A.shape[1])
        assert pair.lora_B.dtype == (F64 if dtype is F64 else F32)
        assert_near(product(*pair), best(dense, kept), dense)
        sigma = torch.linalg.svdvals(dense)
        lost = sigma[kept:].square().sum()
        assert loss.energy == pytest.approx(dense.square().sum().item(), rel=1e-5)
        assert loss.lost == pytest.approx(lost.item(), rel=1e-4, abs=1e-9 * loss.energy)
        if s:
            assert loss.error == pytest.approx((lost.sqrt() / dense.norm()).item(), abs=1e-4)
            assert loss.top == pytest.approx(sigma[0].item(), rel=1e-5)
    energy, lost = (
        sum(values) for values in zip(*((x.energy, x.lost) for x in losses), strict=True)
    )
    assert total_error(losses) == pytest.approx((lost / energy) ** 0.5)
    assert total_error([]) == 0.0


def test_a_stack_keeps_one_rank_by_the_energy_of_all_its_pairs():
    B, A = torch.randn(3, 20, 6), torch.randn(3, 6, 12)
    B[1] *= 100.0
    dense = B.double() @ A.double()
    sigma = torch.linalg.svdvals(dense).square().sum(0)  # what each rank adds
    share = (sigma[:3].sum() / sigma.sum()).item()
    (pair,), (loss,) = truncate([B], [A], [1.0], RankRule("energy", share - 1e-6))
    assert pair.lora_B.shape == (3, 20, 3) and pair.lora_A.shape == (3, 3, 12)
    assert loss.share == pytest.approx(1 - share, rel=1e-3)
    for got, want in zip(pair.lora_B.double() @ pair.lora_A.double(), dense, strict=True):
        assert_near(got, best(want, 3), want)


def test_chunks_change_nothing(monkeypatch):
    Bs, As, scaling = layers()
    for rule in (RankRule("energy", 0.8), RankRule("average_rank", 3)):
        whole, losses = truncate(Bs, As, scaling, rule)
        done = []
        with monkeypatch.context() as patch:
            patch.setattr(low_rank_algebra, "CHUNK_BYTES", 1)
            parts, again = truncate(Bs, As, scaling, rule, progress=done.append)
        assert losses == again and done == [1] * len(Bs)
        for one, other in zip(whole, parts, strict=True):
            assert torch.equal(one.lora_B, other.lora_B) and torch.equal(one.lora_A, other.lora_A)


def test_a_budget_of_bytes_counts_values_as_they_are_written():
    Bs, As, _ = layers()
    budget = 2 * sum(m + n for m, n, _ in SHAPES) * 3
    for itemsize in (2, 4):
        factors, _ = truncate(
            Bs, As, [1.0] * 4, RankRule("budget_bytes", budget), itemsize=itemsize
        )
        size = itemsize * sum(t.numel() for pair in factors for t in pair)
        assert budget - itemsize * max(m + n for m, n, _ in SHAPES) < size <= budget


def test_what_is_not_finite_is_named():
    Bs, As, scaling = layers()
    Bs[2][0, 0] = torch.nan
    for rule in (RankRule("rank", 2), RankRule("average_rank", 2)):
        with pytest.raises(ValueError, match=r"^third: its update is not finite in float32$"):
            truncate(Bs, As, scaling, rule, names=["first", "second", "third", "fourth"])


def test_a_concatenation_is_the_sum():
    terms = [(torch.randn(30, r).to(d), torch.randn(r, 20), w)
             for r, d, w in ((3, F32, 0.5), (1, BF16, -2.0), (5, F32, 4.0))]  # fmt: skip
    B, A = concatenate(terms)
    assert B.shape == (30, 9) and A.shape == (9, 20) and B.dtype == F32
    # Powers of two and 16-bit factors round nothing.
    exact = sum(product(b, a, w) for b, a, w in terms)
    assert torch.equal(product(B, A).float(), exact.float())
    stack = [(torch.randn(4, 9, 2), torch.randn(4, 2, 7), 0.3) for _ in range(2)]
    B, A = concatenate(stack)
    want = sum(0.3 * (b.double() @ a.double()) for b, a, _ in stack)
    assert torch.allclose(B.double() @ A.double(), want, atol=1e-5)


def test_the_best_pair_of_a_difference():
    weight, minus = torch.randn(50, 80), torch.randn(50, 80)
    dense = weight.double() - minus.double()
    sigma = torch.linalg.svdvals(dense)
    pair, S, norm = best_pair(weight, 5, minus=minus)
    assert_near(product(*pair), best(dense, 5), dense)
    assert torch.allclose(S.double(), sigma[:5], rtol=1e-5) and len(S) == 5
    assert norm == pytest.approx(dense.norm().item(), rel=1e-5)
    assert len(best_pair(weight, 99)[1]) == 50


@pytest.mark.parametrize("first", [1, 7, 64])
def test_ranks_of_the_best_pair_are_chosen(monkeypatch, first):
    monkeypatch.setattr(low_rank_algebra, "FIRST", first)
    weight = torch.randn(50, 80)
    sigma = torch.linalg.svdvals(weight.double())
    energy = sigma.square().cumsum(0) / sigma.square().sum()
    share = ((energy[19] + energy[20]) / 2).item()
    assert len(best_pair(weight, keeping(share))[1]) == 21
    assert len(best_pair(weight, keeping(share), most=4)[1]) == 4
    assert len(best_pair(weight, keeping(1.0))[1]) == 50
    edge = ((sigma[10] + sigma[11]) / 2).item()
    assert len(best_pair(weight, above(edge))[1]) == 11
    assert len(best_pair(weight, above(2 * sigma[0].item()))[1]) == 1
    assert len(best_pair(weight, above(0.0))[1]) == 50
    exact = torch.randn(50, 6) @ torch.randn(6, 80)
    assert len(best_pair(exact, above(0.0))[1]) == 6
