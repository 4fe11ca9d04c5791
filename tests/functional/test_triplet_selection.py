"""AdaLoRA's masks under costs, floors and caps, against brute force."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from linear_cases import F64
from torch._subclasses.fake_tensor import FakeTensorMode

from peftkern.functional.adalora import adalora_allocate_
from peftkern.functional.triplet_selection import select_triplets

RANKS = st.lists(st.integers(0, 3), min_size=1, max_size=3)
COSTS = {"one": st.just(2), "whole": st.integers(1, 9), "any": st.floats(0.1, 9.0)}


def draw(data, ranks: list[int], kind: str) -> tuple:
    """Scores with ties, cost, floors and caps of layers."""
    scores = [data.draw(st.sampled_from([0.0, 0.25, 1.0, 1.5, 4.0])) for _ in range(sum(ranks))]
    if kind == "one":
        cost = [data.draw(COSTS["one"])] * len(ranks)
    else:
        cost = [data.draw(COSTS[kind]) for _ in ranks]
    high = [data.draw(st.integers(0, 4)) for _ in ranks]
    low = [data.draw(st.integers(0, min(h, 2))) for h in high]
    return scores, cost, low, high


def in_layers(ranks: list[int], values) -> list[list]:
    values = iter(values)
    return [list(itertools.islice(values, r)) for r in ranks]


def one_by_one(scores, ranks, budget, cost, low, high) -> list[bool]:
    """The rule as it is said: the best of each floor, then by density whatever fits."""
    owner = [layer for layer, r in enumerate(ranks) for _ in range(r)]
    best = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    kept, counts = set(), [0] * len(ranks)
    for i in best:
        if counts[owner[i]] < low[owner[i]]:
            kept.add(i)
            counts[owner[i]] += 1
    left = budget - sum(cost[owner[i]] for i in kept)
    for i in sorted(range(len(scores)), key=lambda i: (-(scores[i] / cost[owner[i]]), i)):
        layer = owner[i]
        if i not in kept and counts[layer] < high[layer] and cost[layer] <= left:
            kept.add(i)
            counts[layer] += 1
            left -= cost[layer]
    return [i in kept for i in range(len(scores))]


@pytest.mark.parametrize("kind", COSTS)
@given(RANKS, st.integers(0, 40), st.data())
def test_masks_against_every_other_mask(kind, ranks, budget, data):
    scores, cost, low, high = draw(data, ranks, kind)
    floors = [min(lo, r) for lo, r in zip(low, ranks, strict=True)]
    arguments = (torch.tensor(scores), ranks, budget, cost, low, high)
    if math.fsum(c * lo for c, lo in zip(cost, floors, strict=True)) > budget:
        with pytest.raises(ValueError, match="budget: expected at least"):
            select_triplets(*arguments)
        return
    mask = select_triplets(*arguments).tolist()

    def allowed(choice) -> bool:
        counts = [sum(kept) for kept in in_layers(ranks, choice)]
        spent = sum(c * k for c, k in zip(cost, counts, strict=True))
        bounds = zip(floors, counts, high, strict=True)
        within = spent <= budget * (1 + 1e-9)  # costs that are no integers are rounded
        return within and all(lo <= k <= hi for lo, k, hi in bounds)

    assert allowed(mask)
    if kind != "any":  # sums of these are exact, in any order
        assert mask == one_by_one(scores, ranks, budget, cost, low, high)
    every = itertools.product([False, True], repeat=len(scores))
    worth = [sum(itertools.compress(scores, c)) for c in every if allowed(c)]
    got = sum(itertools.compress(scores, mask))
    if kind == "one":
        assert got == max(worth)
    left_out = [s for s, kept in zip(scores, mask, strict=True) if not kept]
    assert got + max(left_out, default=0.0) >= max(worth)


def test_floors_caps_ties_and_nan():
    def run(scores, budget, **limits) -> list[bool]:
        lora_E = [torch.full((3, 1), 2.0), torch.full((2, 1), 2.0)]
        mask = adalora_allocate_(torch.tensor(scores), lora_E, budget, **limits)
        assert [float(e) for E in lora_E for e in E] == [2.0 * kept for kept in mask.tolist()]
        return mask.tolist()

    scores = [5.0, 4.0, 3.0, 2.0, 1.0]
    assert run(scores, 3, r_min=1) == [True, True, False, True, False]
    assert run(scores, 3, r_max=1) == [True, False, False, True, False]
    assert run(scores, 3, r_max=[2, 2]) == [True, True, False, True, False]
    assert run(scores, 4.9, cost=[2, 1]) == [True, True, False, False, False]  # 2.5 2 1.5, 2 1
    assert run(scores, 3, cost=[2, 1]) == [True, False, False, True, False]
    assert run([1.0] * 5, 3, r_min=[0, 1]) == [True, True, False, True, False]
    assert run([0.0] * 5, 2, cost=0.5) == [True, True, True, True, False]
    nan = float("nan")
    assert run([1.0, nan, 3.0, 2.0, 1.0], 1, r_max=1) == [False, True, False, False, False]
    assert run(scores, 10**30, cost=0.1) == [True] * 5


def test_a_large_model_s_sums_are_exact():
    """Parameters of 7 B models: 14 k triplets; and times as a clock measures them."""
    torch.manual_seed(0)
    ranks, cost = [12] * 700, [8192, 5120, 5120, 8192, 18432, 18432, 18432] * 100
    scores = torch.rand(sum(ranks), dtype=F64)
    per_triplet = torch.tensor(cost).repeat_interleave(12)
    for scale in (1, 1e-7):
        costs, budget = [c * scale for c in cost], 4 * sum(cost) * scale
        mask = select_triplets(scores, ranks, budget, costs, [0] * 700, [12] * 700)
        spent = int(per_triplet[mask].sum())
        assert 4 * sum(cost) - min(cost) < spent <= 4 * sum(cost)


def test_nothing_waits_for_the_device():
    """A tensor without data cannot tell the host anything."""
    arguments = ([3, 2], 4, [2.0, 1.0], [1, 0], [2, 2])
    select_triplets(torch.rand(5), *arguments)  # its tables are made once
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert select_triplets(torch.rand(5), *arguments).shape == (5,)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"cost": [1.0]}, "cost: expected .* one for each of 2 layers"),
        ({"cost": 0}, "cost: expected a positive number, got 0"),
        ({"r_min": 1.5}, "r_min: expected an integer of at least 0, got 1.5"),
        ({"r_min": [2, 0], "r_max": 1}, "r_min, r_max: expected r_min <= r_max"),
        ({"r_min": 2, "budget": 3}, "budget: expected at least 4, the cost of r_min, got 3"),
        ({"budget": float("nan"), "r_min": 1}, "budget: expected what the triplets may cost"),
        ({"budget": 2.5}, "budget: expected an integer of at least 0, got 2.5"),
    ],
)
def test_a_wrong_limit_is_named(change, complaint):
    lora_E = [torch.ones(2, 1), torch.ones(2, 1)]
    arguments = {"scores": torch.rand(4), "lora_E": lora_E, "budget": 2, **change}
    with pytest.raises(ValueError, match=complaint):
        adalora_allocate_(**arguments)
