"""Rules that choose ranks: PEFT's and kohya's, on spectra made by hand, and budgets."""

from __future__ import annotations

import pytest
import torch
from linear_cases import F32, F64

from peftkern.methods.rank_rules import RankRule, choose_ranks

STEPS = [8.0, 4.0, 2.0, 1.0, 1.0, 0.0]  # sum 16, squares 64 16 4 1 1: 86
FLAT = [2.0, 2.0, 2.0, 2.0]


def chosen(values: list[float], rule: str, value: float, most: int | None = None, **more) -> int:
    S = torch.tensor(values, dtype=F64)
    (rank,) = choose_ranks([S], RankRule(rule, value, most), **more)
    return rank


@pytest.mark.parametrize(
    ("values", "rule", "value", "rank"),
    [
        (STEPS, "rank", 3, 3),
        (STEPS, "rank", 9, 6),  # there are no more
        # kohya's sv_ratio: S > S_0 / t, strictly
        (STEPS, "ratio", 1, 1),
        (STEPS, "ratio", 2, 1),
        (STEPS, "ratio", 2.01, 2),
        (STEPS, "ratio", 8, 3),
        (STEPS, "ratio", 8.01, 5),  # both of the tied ones
        (STEPS, "ratio", 1e9, 5),
        (FLAT, "ratio", 1, 1),
        (FLAT, "ratio", 1.01, 4),
        # sv_cumulative: the least k with sum_{i<k} S_i >= t sum S
        (STEPS, "sum", 0.5, 1),
        (STEPS, "sum", 0.51, 2),
        (STEPS, "sum", 0.75, 2),
        (STEPS, "sum", 0.9375, 4),
        (STEPS, "sum", 1.0, 5),  # a zero is not needed
        (FLAT, "sum", 0.5, 2),
        (FLAT, "sum", 0.501, 3),
        # sv_fro: the same of squares, at t^2
        (STEPS, "fro", (64 / 86) ** 0.5 - 1e-9, 1),
        (STEPS, "fro", (64 / 86) ** 0.5 + 1e-9, 2),
        (STEPS, "fro", 1.0, 5),
        (FLAT, "fro", 0.5, 1),
        (FLAT, "fro", 0.7072, 3),
        # PEFT's float rank: of squares, at t
        (STEPS, "energy", 64 / 86 - 1e-9, 1),
        (STEPS, "energy", 64 / 86 + 1e-9, 2),
        (STEPS, "energy", 84 / 86 + 1e-9, 4),
        (STEPS, "energy", 1.0, 5),
        (FLAT, "energy", 0.25, 1),
        (FLAT, "energy", 0.26, 2),
    ],
)  # fmt: skip
def test_rules_by_hand(values, rule, value, rank):
    assert chosen(values, rule, value) == rank
    assert chosen(values, rule, value, most=2) == min(rank, 2)


@pytest.mark.parametrize("rule", ["ratio", "sum", "fro", "energy"])
def test_one_value_and_zeros_keep_one(rule):
    value = 5.0 if rule == "ratio" else 1.0
    assert chosen([3.0], rule, value) == 1
    assert chosen([0.0, 0.0, 0.0], rule, value) == 1
    assert chosen([1e-6, 1e-6], rule, value) == 1  # which kohya's tool takes for zero
    assert chosen([1e-5, 1e-5], rule, value) == 2


def test_rules_of_one_layer_look_behind_its_scaling():
    """kohya's tool looks at up @ down, whose values of 1e-5 are no zeros, whatever alpha is."""
    assert chosen([1e-7, 1e-7], "energy", 1.0) == 1
    assert chosen([1e-7, 1e-7], "energy", 1.0, scaling=[-1e-2]) == 2
    assert chosen([0.0, 0.0], "energy", 1.0, scaling=[0.0]) == 1


def test_energy_is_pefts_float_rank():
    from peft.tuners.lora.conversion import _find_cutoff_index

    S = torch.rand(40, generator=torch.Generator().manual_seed(1)).sort(descending=True).values
    for share in (0.1, 0.5, 0.9, 0.99):
        assert chosen(S.tolist(), "energy", share) == _find_cutoff_index(S.to(F64), share)


def test_budgets_are_spent_where_they_save_most():
    S = [torch.tensor([9.0, 1.0], dtype=F32), torch.tensor([8.0, 7.0, 6.0], dtype=F32)]
    assert choose_ranks(S, RankRule("average_rank", 2)) == [1, 3]
    assert choose_ranks(S, RankRule("average_rank", 2, most=2)) == [2, 2]
    # Bytes: one rank of the first layer costs as much as three of the second.
    assert choose_ranks(S, RankRule("budget_bytes", 60), cost=[30, 10]) == [1, 3]
    assert choose_ranks(S, RankRule("budget_bytes", 59), cost=[30, 10]) == [1, 2]


def test_every_layer_keeps_one_or_the_budget_is_refused():
    S = [torch.tensor([1.0, 0.5]), torch.tensor([1e-3, 1e-4]), torch.zeros(2)]
    assert choose_ranks(S, RankRule("average_rank", 4 / 3)) == [2, 1, 1]
    with pytest.raises(ValueError, match="budget_bytes: expected at least 60, one rank in each"):
        choose_ranks(S, RankRule("budget_bytes", 59), cost=[20, 20, 20])


@pytest.mark.parametrize(
    ("rule", "value", "most", "message"),
    [
        ("best", 1, None, "rule: expected one of rank, energy"),
        ("rank", 0, None, "rank: expected a number of at least 1, got 0"),
        ("rank", 1.5, None, "rank: expected a whole number, got 1.5"),
        ("energy", 1.01, None, r"energy: expected a number in \(0, 1\], got 1.01"),
        ("sum", 0.0, None, r"sum: expected a number in \(0, 1\], got 0"),
        ("fro", float("nan"), None, "fro: expected a number"),
        ("ratio", 0.9, None, "ratio: expected a number of at least 1, got 0.9"),
        ("budget_bytes", -1, None, "budget_bytes: expected a number of at least 1"),
        ("energy", 0.5, 0, "rank: expected at least 1, got 0"),
    ],
)
def test_rules_that_make_no_sense_are_refused(rule, value, most, message):
    with pytest.raises(ValueError, match=message):
        RankRule(rule, value, most)
