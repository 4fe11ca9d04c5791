"""Ranks before training: spectra against dense float64, ranks that are known, budgets."""

from __future__ import annotations

import math
import weakref

import pytest
import torch
from low_rank_svd_cases import power_law
from torch import Tensor

from peftkern.functional.nf4 import dequantize_nf4, quantize_nf4
from peftkern.methods import rank_choice
from peftkern.methods.rank_choice import (
    LayerSpectrum,
    LoraBudget,
    choose_layer_ranks,
    gora_importance,
    matrix_spectra,
)


def spectrum(name: str, values: list[float], shape: tuple[int, int] = (32, 32)) -> LayerSpectrum:
    S = torch.tensor(values, dtype=torch.float64)
    return LayerSpectrum(name, shape, S, float(S.norm()))


def chosen(spectra: list[LayerSpectrum], by: str = "gradients", **budget) -> list[int]:
    layers, total = choose_layer_ranks(spectra, LoraBudget(**budget), by)
    assert sum(layer.rank * layer.cost for layer in layers) <= total
    return [layer.rank for layer in layers]


def test_spectra_are_those_of_dense_float64_and_within_their_certificate():
    sizes = {"large": (640, 720), "small": (96, 64), "wide": (40, 600)}
    # About the singular values of language models.
    dense = {name: power_law(*size, 0.5) for name, size in sizes.items()}
    packed = {f"{name} nf4": quantize_nf4(weight) for name, weight in dense.items()}
    half = {"bf16": power_law(560, 800, 0.5).bfloat16()}
    matrices = {**dense, **packed, **half}
    found = list(matrix_spectra(matrices.items(), 12, tol=1e-5, certify=True))
    assert [one.name for one in found] == list(matrices)
    for one, matrix in zip(found, matrices.values(), strict=True):
        whole = matrix if isinstance(matrix, Tensor) else dequantize_nf4(matrix, torch.float32)
        S = torch.linalg.svdvals(whole.double())
        torch.testing.assert_close(one.S.double(), S[:12], rtol=2e-4, atol=0)
        assert one.norm == pytest.approx(S.norm().item(), rel=1e-6)
        assert one.shape == tuple(whole.shape)
        least = S[12:].norm().item()
        error = math.sqrt(one.norm**2 - one.S.double().square().sum().item())
        assert (error - least) / least <= one.certificate + 1e-6


def test_one_large_matrix_is_held_at_a_time(monkeypatch):
    monkeypatch.setattr(rank_choice, "_TOGETHER", 64 * 64)
    live, most = weakref.WeakSet(), []

    def matrices():
        for index in range(4):
            matrix = torch.randn(64, 64)
            live.add(matrix)
            most.append(len(live))
            yield str(index), matrix
            del matrix

    assert len(list(matrix_spectra(matrices(), 4))) == 4
    assert most == [1, 1, 1, 1]


def test_matrices_of_one_name_are_a_stack():
    generator = torch.Generator().manual_seed(2)
    experts = torch.randn(3, 24, 16, generator=generator)
    alone = torch.randn(16, 16, generator=generator)
    matrices = [("a", alone), *(("b", matrix) for matrix in experts), ("c", alone)]
    found = list(matrix_spectra(matrices, 4, certify=True))
    assert [(one.name, one.experts) for one in found] == [("a", 1), ("b", 3), ("c", 1)]
    S = torch.linalg.svdvals(experts.double())[:, :4].square().sum(0).sqrt()
    torch.testing.assert_close(found[1].S, S, rtol=1e-5, atol=0)
    assert found[1].norm == pytest.approx(experts.double().norm().item())
    for cost, times in (("rank", 1), ("parameters", 3 * 40), ("bytes", 3 * 160)):
        assert LoraBudget(2, cost=cost).costs(found[1:2]) == [times]
    layers, total = choose_layer_ranks(found, LoraBudget(2, cost="parameters"), "weights")
    assert total == 2 * (32 + 3 * 40 + 32) >= sum(layer.parameters for layer in layers)
    assert layers[1].parameters == 3 * 40 * layers[1].rank and layers[1].kept < 1


def test_the_layer_that_is_not_finite_is_named():
    bad = torch.randn(16, 16)
    bad[3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"^b: weight: expected finite values"):
        list(matrix_spectra([("a", torch.randn(16, 16)), ("b", bad)], 4))


def test_planted_ranks_are_found():
    """Every layer has as many large values as it should get ranks, above the others' tails."""
    planted = [0, 7, 2, 5, 0, 4]
    spectra = [
        spectrum(str(i), [5.0 - 0.1 * j for j in range(r)] + [0.01] * (8 - r))
        for i, r in enumerate(planted)
    ]
    assert chosen(spectra, rank=3, min_rank=0, max_rank=8) == planted
    assert chosen(spectra, rank=3, cost="parameters", min_rank=0, max_rank=8) == planted
    kept = choose_layer_ranks(spectra, LoraBudget(3, min_rank=0, max_rank=8), "gradients")[0]
    assert all(layer.kept > 0.999 for layer in kept if layer.rank)


def test_shares_of_a_layer_do_not_depend_on_its_scale_and_gradients_do():
    small, large = [3.0, 1.0, 0.1, 0.1], [300.0, 100.0, 10.0, 10.0]
    spectra = [spectrum("a", small), spectrum("b", large)]
    assert chosen(spectra, "weights", rank=2, max_rank=4) == [2, 2]
    assert chosen(spectra, "gradients", rank=2, max_rank=4) == [1, 3]
    layers, _ = choose_layer_ranks(spectra, LoraBudget(2, max_rank=4), "weights", False)
    assert [layer.rank for layer in layers] == [1, 3]


def test_budgets_floors_and_caps():
    flat = [spectrum(str(i), [1.0] * 8, (16 * (i + 1), 16)) for i in range(3)]
    assert chosen(flat, rank=4, min_rank=0) == [8, 4, 0]  # of equals the first
    ranks = chosen(flat, rank=4, cost="parameters", min_rank=2, max_rank=6)
    assert all(2 <= rank <= 6 for rank in ranks)
    costs = [32, 48, 64]
    assert sum(r * c for r, c in zip(ranks, costs, strict=True)) <= 4 * sum(costs)
    assert ranks[0] == 6  # the cheapest of equals comes first
    assert chosen(flat, rank=1, total=500, cost={"0": 1, "1": 100, "2": 1000}, min_rank=0) == [
        2,
        2,
        0,
    ]
    tiny = [spectrum("a", [1.0, 1.0], (2, 64)), spectrum("b", [1.0] * 16, (64, 64))]
    assert chosen(tiny, rank=8) == [2, 8]  # no layer beyond its smaller side


def test_gora_gives_its_ranks_within_the_budget():
    generator = torch.Generator().manual_seed(1)
    shapes = [(24, 24), (24, 72), (48, 24), (24, 24)]
    pairs = [[torch.randn(*s, generator=generator) for _ in range(2)] for s in shapes]
    pairs[1][1] *= 3
    spectra = [gora_importance(str(i), W, G) for i, (W, G) in enumerate(pairs)]
    for one, (W, G) in zip(spectra, pairs, strict=True):
        assert one.norm == pytest.approx((W * G).abs().mean().item(), rel=1e-5)
    packed = gora_importance("nf4", quantize_nf4(pairs[1][0]), pairs[1][1])
    decoded = dequantize_nf4(quantize_nf4(pairs[1][0]), torch.float32)
    assert packed.norm == pytest.approx((decoded * pairs[1][1]).abs().mean().item(), rel=1e-5)
    root = [math.sqrt(sum(s)) for s in shapes]
    share = [one.norm / sum(one.norm for one in spectra) for one in spectra]
    paper = [6 * sum(root) * a / r for a, r in zip(share, root, strict=True)]
    budget = sum(round(r) for r in paper)
    ranks = chosen(spectra, "gora", rank=6, total=budget, min_rank=0, max_rank=24)
    assert sum(ranks) == budget
    assert all(abs(a - b) < 1 for a, b in zip(ranks, paper, strict=True))
    layers, _ = choose_layer_ranks(spectra, LoraBudget(6), "gora")
    assert sum(layer.kept for layer in layers) == pytest.approx(1.0)


def test_layers_without_any_worth_get_what_they_must():
    spectra = [spectrum("a", [0.0, 0.0]), spectrum("b", [1.0, 0.5])]
    for by in ("weights", "gradients"):
        assert chosen(spectra, by, rank=2, max_rank=2) == [1, 2]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"rank": 0}, "rank: expected an integer of at least 1, got 0"),
        ({"rank": 2.0}, "rank: expected an integer"),
        ({"total": float("nan")}, "budget: expected a number above 0"),
        ({"total": -1}, "budget: expected a number above 0"),
        ({"cost": "energy"}, "cost: expected one of"),
        ({"cost": {"a": 1}}, "cost: expected a number above 0 for b, got None"),
        ({"cost": {"a": 1, "b": 0}}, "cost: expected a number above 0 for b, got 0"),
        ({"min_rank": -1}, "min_rank: expected an integer of at least 0"),
        ({"min_rank": 3, "max_rank": 2}, "max_rank: expected an integer of at least 3"),
        (
            {"min_rank": 40, "rank": 40},
            "min_rank: expected at most 32, the smaller side of a, got 40",
        ),
        ({"rank": 1, "min_rank": 4}, "budget: expected at least 8, what min_rank=4 costs in 2"),
    ],
)
def test_bad_budgets_are_told(arguments, says):
    spectra = [spectrum("a", [1.0]), spectrum("b", [1.0])]
    with pytest.raises(ValueError, match="^" + says.replace("(", r"\(")):
        choose_layer_ranks(spectra, LoraBudget(**arguments), "weights")
    with pytest.raises(ValueError, match="model: expected layers"):
        choose_layer_ranks([], LoraBudget(), "weights")
