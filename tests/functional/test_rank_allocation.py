"""Spectral statistics, rank budgets, truncation and merging: what rests on the low-rank SVD."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from linear_cases import BF16, F32, F64
from low_rank_svd_cases import equal, of_layer
from tolerances import SVD_BOUNDS, SVD_STATS_RTOL
from torch import Tensor

from peftkern.functional.low_rank_svd import (
    allocate_rank,
    low_rank_svd,
    merge_lora,
    rank_costs,
    spectral_stats,
    truncate_lora,
)

B0, A0 = torch.ones(6, 2), torch.ones(2, 5)


def test_spectral_stats():
    flat, steep, zero = torch.ones(4), torch.tensor([2.0, 1.0, 0.0]), torch.zeros(3)
    energy, stable, effective = spectral_stats([flat, steep, zero, torch.zeros(0)])
    entropy = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    for got, want in [
        (energy, [4.0, 5.0, 0.0, 0.0]),
        (stable, [4.0, 1.25, 0.0, 0.0]),
        (effective, [4.0, math.exp(entropy), 0.0, 0.0]),
    ]:
        assert torch.allclose(got, torch.tensor(want, dtype=F64), rtol=SVD_STATS_RTOL)
    assert torch.allclose(spectral_stats(steep).effective_rank, effective[1])
    assert [t.shape for t in spectral_stats([])] == [(0,)] * 3
    with pytest.raises(ValueError, match=r"S: expected \[k\], layer 1"):
        spectral_stats([flat, flat[None]])


def test_energy_needs_no_svd():
    B, A = torch.randn(40, 5), torch.randn(5, 30)
    energy = spectral_stats(low_rank_svd(B, A, 3.0).S).energy
    assert torch.allclose(energy, (3 * B.double() @ A.double()).square().sum(), rtol=SVD_BOUNDS[0])


def energy_of(S: list[Tensor], ranks: Iterable[int]) -> float:
    return sum(s[:k].square().sum().item() for s, k in zip(S, ranks, strict=True))


def best_energy(S: list[Tensor], budget: float, cost: list[float], lows: list[int], high: int):
    """The largest energy over all allocations."""
    choices = itertools.product(
        *(range(low, min(high, len(s)) + 1) for low, s in zip(lows, S, strict=True))
    )
    affordable = (c for c in choices if sum(k * p for k, p in zip(c, cost, strict=True)) <= budget)
    return max(energy_of(S, c) for c in affordable)


layers = st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0, 7.0]), max_size=4), max_size=4)


@given(layers, st.integers(0, 12), st.integers(0, 2), st.integers(1, 4))
def test_allocate_rank_is_optimal(values, budget, low, high):
    S = [torch.tensor(sorted(v, reverse=True), dtype=F64) for v in values]
    lows = [min(low, high, len(s)) for s in S]
    if sum(lows) > budget:
        with pytest.raises(ValueError, match=f"budget: expected at least {sum(lows)}"):
            allocate_rank(S, budget, r_min=lows, r_max=high)
        return
    ranks = allocate_rank(S, budget, r_min=lows, r_max=high)
    assert sum(ranks) <= budget
    assert all(lo <= k <= high for lo, k in zip(lows, ranks, strict=True))
    assert energy_of(S, ranks) == best_energy(S, budget, [1] * len(S), lows, high)


COSTS = {
    "whole": st.integers(1, 9),
    "equal sums": st.sampled_from([2, 4, 6]),
    "any": st.floats(0.1, 9.0),
}


@pytest.mark.parametrize("kind", COSTS)
@given(layers, st.integers(0, 40), st.data())
def test_allocate_rank_with_cost_is_optimal(kind, values, budget, data):
    S = [torch.tensor(sorted(v, reverse=True), dtype=F64) for v in values]
    cost = [data.draw(COSTS[kind]) for _ in S]
    low = data.draw(st.integers(0, 1))
    lows = [min(low, len(s)) for s in S]
    if sum(k * c for k, c in zip(lows, cost, strict=True)) > budget:
        return
    limits = {"cost": cost, "r_min": lows, "r_max": 3}
    best = best_energy(S, budget, cost, lows, 3)
    ranks, greedy = (allocate_rank(S, budget, **limits, exact=exact) for exact in (True, False))
    for found in (ranks, greedy):
        assert sum(k * c for k, c in zip(found, cost, strict=True)) <= budget
        assert all(lo <= k <= 3 for lo, k in zip(lows, found, strict=True))
    assert energy_of(S, ranks) == pytest.approx(best, rel=SVD_STATS_RTOL)
    largest = max((s[0].item() ** 2 for s in S if len(s)), default=0.0)
    assert best - largest <= energy_of(S, greedy) <= energy_of(S, ranks)


def test_the_greedy_choice_is_not_the_best_one():
    S = [torch.tensor([2.0]), torch.tensor([1.9]), torch.tensor([1.9])]
    cost = [1.1, 1.0, 1.0]
    assert allocate_rank(S, 2.0, cost=cost, exact=False) == [1, 0, 0]
    assert allocate_rank(S, 2.0, cost=cost) == [0, 1, 1]


def test_allocate_rank_of_many_layers_is_optimal_by_dynamic_programming():
    """Shapes as in a model of 7 layers a block; costs in units of 1024."""
    torch.manual_seed(4)
    units, budget = [8, 5, 5, 8, 18, 18, 18] * 3, 701
    S = [torch.rand(12, dtype=F64).sort(descending=True).values for _ in units]
    best = torch.zeros(budget + 1, dtype=F64)
    for unit, sigma in zip(units, S, strict=True):
        for value in sigma.square().tolist():
            best[unit:] = torch.maximum(best[unit:], best[:-unit] + value)
    ranks = allocate_rank(S, 1024 * budget, cost=[1024 * unit for unit in units])
    assert energy_of(S, ranks) == pytest.approx(best[-1].item(), rel=SVD_STATS_RTOL)


def test_costs_by_name():
    S, shapes = [torch.ones(2), torch.ones(2)], [(30, 10), (10, 10)]
    for kind, wanted in {
        "rank": [1.0, 1.0],
        "parameters": [40.0, 20.0],
        "bytes": [80.0, 40.0],
        "flops": [80.0, 40.0],
    }.items():
        assert rank_costs(kind, shapes, itemsize=2) == wanted
        ranks = [allocate_rank(S, 120, cost=c, shapes=shapes, itemsize=2) for c in (kind, wanted)]
        assert ranks[0] == ranks[1]
    with pytest.raises(ValueError, match=r"cost: expected one of rank, .*got 'time'"):
        allocate_rank(S, 2, cost="time", shapes=shapes)
    with pytest.raises(ValueError, match=r"shapes: expected \(m, n\) of every layer, got None"):
        allocate_rank(S, 2, cost="bytes")
    with pytest.raises(ValueError, match=r"shapes: expected \(m, n\) of 2 layers, got 1"):
        allocate_rank(S, 2, cost="bytes", shapes=shapes[:1])


@pytest.mark.parametrize("scale", [1.0, 1e250])
def test_experts_share_a_rank_and_add_up(scale):
    experts = torch.tensor([[3.0, 2.0, 0.0], [3.0, 1.0, 1.0]], dtype=F64)
    joined = experts.square().sum(0).sqrt()
    single = torch.tensor([4.0, 2.5], dtype=F64)
    S, shapes = [experts * scale, single * scale], [(3, 1), (3, 1)]
    for budget in range(4, 40):
        got = allocate_rank(S, budget, cost="parameters", shapes=shapes)
        assert got == allocate_rank([joined, single], budget, cost=[8.0, 4.0])
    assert allocate_rank(S, 1) == [1, 0]


@pytest.mark.parametrize("scale", [1e-250, 1e-30, 1e30, 1e250])
def test_allocate_rank_does_not_depend_on_the_scale(scale):
    S = [torch.tensor(values, dtype=F64) for values in ([3.0, 1.0], [2.5, 2.0], [0.5, 0.0])]
    costs = [1.0, 1.5, 0.25]
    for budget in (1, 2, 3, 4.25, 100):
        wanted = allocate_rank(S, budget, cost=costs)
        assert allocate_rank([sigma * scale for sigma in S], budget, cost=costs) == wanted


@pytest.mark.parametrize("scale", [1e-250, 1e250])
def test_stats_of_values_whose_squares_are_beyond_float64(scale):
    S = torch.tensor([3.0, 2.0, 1.0], dtype=F64)
    stats, ordinary = spectral_stats(S * scale), spectral_stats(S)
    assert stats.energy == (math.inf if scale > 1 else 0.0)
    for got, wanted in zip(stats[1:], ordinary[1:], strict=True):
        assert got.item() == pytest.approx(wanted.item(), rel=SVD_STATS_RTOL)
    stats = spectral_stats(torch.tensor([math.inf, 1.0]))
    assert stats.energy == math.inf and stats.stable_rank.isnan() and stats.effective_rank.isnan()


def test_allocate_rank_ties_and_zeros():
    S = [torch.tensor([1.0, 1.0]), torch.tensor([1.0, 0.0]), torch.tensor([1.0])]
    assert allocate_rank(S, 2) == [2, 0, 0]
    assert allocate_rank(S, 100) == [2, 1, 1]
    assert allocate_rank(S, 100, r_min=[0, 2, 0]) == [2, 2, 1]
    assert allocate_rank([], 3) == []


@pytest.mark.parametrize(
    ("S", "kwargs", "message"),
    [
        ([torch.tensor([1.0, math.nan])], {}, "S: expected finite .* layer 0 holds NaN or Inf"),
        ([torch.tensor([math.inf, 1.0])], {}, "S: expected finite .* layer 0 holds NaN or Inf"),
        ([torch.tensor([1.0, 2.0])], {}, "S: expected descending values, those of layer 0"),
        ([torch.ones(2)], {"cost": [0.0]}, "cost: expected positive numbers, layer 0 has 0.0"),
        ([torch.ones(2)], {"cost": [1.0, 1.0]}, "cost: expected 1 numbers, got 2"),
        ([torch.ones(2)], {"r_min": 3}, "r_min, r_max: .*layer 0 has 3 and 2"),
        ([torch.ones(2)], {"r_min": -1}, "r_min: expected an integer of at least 0, got -1"),
        ([torch.ones(2)] * 3, {"r_min": 1}, "budget: expected at least 3, r_min's cost, got 2"),
    ],
)
def test_allocate_rank_bad_arguments(S, kwargs, message):
    with pytest.raises(ValueError, match=message):
        allocate_rank(S, 2, **kwargs)


@pytest.mark.parametrize("form", ["balanced", "adalora"])
def test_truncate_is_the_best_approximation(every_backend, form):
    Bs, As = [torch.randn(40, 6), torch.randn(30, 6)], [torch.randn(6, 50), torch.randn(6, 20)]
    ranks = [3, 0]
    svd = low_rank_svd(Bs, As, 2.0)
    for i, factors in enumerate(truncate_lora(svd, ranks, form)):
        dense = 2.0 * Bs[i].double() @ As[i].double()
        U, S, Vh = torch.linalg.svd(dense, full_matrices=False)
        best = (U[:, : ranks[i]] * S[: ranks[i]]) @ Vh[: ranks[i]]
        if form == "adalora":
            B, E, A = (tensor.double() for tensor in factors)
            assert E.shape == (ranks[i], 1)
            got = B @ (E * A)
        else:
            B, A = (tensor.double() for tensor in factors)
            got = B @ A
            assert torch.allclose(B.norm(dim=0), A.norm(dim=1), rtol=SVD_BOUNDS[2])
        assert (got - best).norm() <= SVD_BOUNDS[3] * dense.norm()
        assert all(t.untyped_storage().nbytes() == t.nbytes for t in factors)
    single = truncate_lora(low_rank_svd(Bs[0], As[0]), 2, form)
    assert single.lora_B.shape == (40, 2) and single.lora_A.shape == (2, 50)


def test_truncate_bad_arguments():
    svd = low_rank_svd(B0, A0)
    with pytest.raises(ValueError, match=r"form: expected one of .*got 'dense'"):
        truncate_lora(svd, 1, "dense")
    with pytest.raises(
        ValueError, match="ranks: expected an integer of at least 0 and at most 2, got 3"
    ):
        truncate_lora(svd, 3)
    with pytest.raises(ValueError, match="ranks: expected 1 numbers, got 2"):
        truncate_lora(svd, [1, 1])


def test_merge_equals_the_dense_sum(every_backend):
    adapters = [(torch.randn(40, r).to(d), torch.randn(r, 30)) for r, d in ((4, F32), (7, BF16))]
    weights = [0.75, -2.0]
    dense = sum(w * (B.double() @ A.double()) for w, (B, A) in zip(weights, adapters, strict=True))
    svd = merge_lora(adapters, weights)
    assert len(svd.S) == 11
    got = (svd.U.double() * svd.S.double()) @ svd.Vh.double()
    assert (got - dense).norm() <= SVD_BOUNDS[3] * dense.norm()
    lists = merge_lora([([B, B], [A, 2 * A]) for B, A in adapters], weights)
    assert equal(of_layer(lists, 0), svd)
    assert torch.allclose(lists.S[1], 2 * svd.S, rtol=SVD_BOUNDS[0])


@pytest.mark.parametrize("weight", [1e-30, 1e30, -1e38])
def test_merge_with_any_weights(every_backend, weight):
    """Weights and factors that are none together in float32; their product is."""
    adapters = [(torch.randn(40, 4), torch.randn(4, 30)), (torch.randn(40, 3), torch.randn(3, 30))]
    for power in (0.0, 0.5):  # of the size of A
        size = abs(1.0 / weight)
        scaled = [(B * size ** (1 - power), A * size**power) for B, A in adapters]
        for pairs in (scaled, [(A.T, B.T) for B, A in scaled]):
            dense = sum(weight * (B.double() @ A.double()) for B, A in pairs)
            svd = merge_lora(pairs, [weight, weight])
            got = (svd.U.double() * svd.S.double()) @ svd.Vh.double()
            assert int(svd.info) == 0 and (got - dense).norm() <= SVD_BOUNDS[3] * dense.norm()
    assert int(merge_lora(adapters, [0.0, 0.0]).rank) == 0
    assert int(merge_lora(adapters, [math.inf, 1.0]).info) == -1


def test_merge_of_opposites_is_zero(every_backend):
    B, A = torch.randn(20, 3), torch.randn(3, 30)
    svd = merge_lora([(B, A), (B, A)], [1.0, -1.0])
    assert int(svd.rank) == 0


def test_merge_bad_arguments():
    for adapters, weights, error, message in [
        ([], None, ValueError, "adapters: expected at least one"),
        ([B0], None, TypeError, r"adapters: expected pairs .*number 0"),
        ([(B0, A0), (B0[1:], A0)], None, ValueError, "adapters: expected one m x n in layer 0"),
        ([(B0, A0), ([B0], [A0])], None, ValueError, "adapters: expected the same layers"),
        ([([B0], [A0]), ([], [])], None, ValueError, "adapters: expected the same layers"),
        ([(B0, A0)], [1.0, 2.0], ValueError, "weights: expected 1 numbers, got 2"),
    ]:
        with pytest.raises(error, match=message):
            merge_lora(adapters, weights)
