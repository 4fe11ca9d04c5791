"""CorDA, LoRA-GA and EVA against dense float64 of what their papers and PEFT define."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peftkern.methods.initialization.from_data import (
    DIRECTIONS,
    SCALES,
    Covariance,
    PrincipalComponents,
    corda,
    explained_together,
    lora_ga,
    share_ranks,
)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_covariance_scales_each_call_by_its_maximum():
    covariance = Covariance()
    calls = [randn(12, 6, seed=i) for i in range(3)]
    for x in calls:
        covariance.add(x.bfloat16())
    scaled = [x.bfloat16().double() / x.bfloat16().double().max().abs() for x in calls]
    expected = sum(x.T @ x for x in scaled) / 3
    torch.testing.assert_close(covariance.value().double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("calls", [[], [torch.full((3, 4), float("inf"))], [torch.zeros(3, 4)]])
def test_covariance_of_nothing(calls):
    covariance = Covariance()
    for x in calls:
        covariance.add(x)
    with pytest.raises(ValueError, match="batches: expected finite inputs of the layer, got"):
        covariance.value()


@pytest.mark.parametrize("shape", [(40, 30), (30, 40)])
def test_corda_is_the_projection_on_what_the_inputs_reach(shape):
    """Against PEFT's formula, with the inverse."""
    m, n = shape
    weight, x = randn(m, n), randn(100, n, seed=1) * torch.arange(1, n + 1) ** -0.5
    covariance = x.T @ x / 100
    factors = corda(weight, covariance, 5, 2.0)
    damped = covariance.double() + 0.01 * covariance.double().diagonal().mean() * torch.eye(n)
    U, S, Vh = torch.linalg.svd(weight.double() @ damped, full_matrices=False)
    V = (Vh @ torch.linalg.inv(damped)).T
    root = (S[:5] / 2.0).sqrt()
    lora_A, lora_B = V[:, :5].T * root[:, None], U[:, :5] * root
    signs = (factors.lora_B.double() * lora_B).sum(0).sign()
    torch.testing.assert_close(factors.lora_B.double() * signs, lora_B, rtol=1e-4, atol=1e-4)
    atol = 1e-4 * lora_A.abs().max().item()
    torch.testing.assert_close(factors.lora_A.double() * signs[:, None], lora_A, rtol=0, atol=atol)
    kept = float(S[:5].square().sum() / S.square().sum())
    assert factors.energy == pytest.approx(kept, rel=1e-4)


def test_corda_of_a_weight_with_fewer_directions_than_the_rank():
    weight = randn(20, 1) @ randn(1, 10, seed=1)
    factors = corda(weight, torch.eye(10), 4, 1.0)
    assert factors.lora_A.isfinite().all()
    torch.testing.assert_close(factors.lora_B @ factors.lora_A, weight, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("scale", SCALES)
def test_lora_ga_takes_both_sides_of_the_gradient(direction, scale):
    weight, gradient = randn(40, 30), randn(40, 30, seed=1)
    how = {"direction": direction, "scale": scale, "gamma": 9}
    with torch.device("meta"):  # another default device
        factors = lora_ga(weight, gradient, 3, 2.0, **how, seed=5)
    U, S, Vh = torch.linalg.svd(gradient.double(), full_matrices=False)
    if direction == "random":
        order = torch.randperm(6, generator=torch.Generator().manual_seed(5))[:3]
        of_A = of_B = order.tolist()
    else:
        of_A, of_B = {"ArBr": ([1, 3, 5], [0, 2, 4]), "A2rBr": ([3, 4, 5], [0, 1, 2]),
                      "ArB2r": ([0, 1, 2], [3, 4, 5])}[direction]  # fmt: skip
    lora_A, lora_B = Vh[of_A], U[:, of_B] * S[of_B]
    if scale == "stable":
        lora_B = lora_B * 40**0.25 / 3
    elif scale == "weight_svd":
        lora_B = lora_B * torch.linalg.matrix_norm(weight.double(), 2) / S[of_B[0]]
    elif scale == "gd_scale":
        lora_A, lora_B = lora_A / 2, lora_B / 2
    # Singular vectors are known up to a sign that U and Vh share.
    for got, expected in ((factors.lora_A, lora_A), (factors.lora_B.T, lora_B.T)):
        signs = (got.double() * expected).sum(1, keepdim=True).sign()
        atol = 1e-4 * expected.abs().max().item()
        torch.testing.assert_close(got.double() * signs, expected, rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"rank": 6}, "rank: expected 1 to 5, half the smaller side"),
        ({"direction": "up"}, "direction: expected one of"),
        ({"scale": "large"}, "scale: expected one of"),
    ],
)
def test_lora_ga_names_what_does_not_fit(arguments, complaint):
    options = {"rank": 2, **arguments}
    with pytest.raises(ValueError, match=complaint):
        lora_ga(randn(20, 10), randn(20, 10), options.pop("rank"), 1.0, **options)


@pytest.mark.parametrize("sizes", [[50], [50, 50], [30, 1, 69], [3, 2, 90]])
def test_components_are_those_of_all_rows(sizes):
    """Rows with a few strong directions, about a mean that is not zero and moves."""
    n, count = 24, 12
    strong = randn(5, n) * torch.tensor([9.0, 7, 5, 3, 2])[:, None]
    rows = randn(sum(sizes), 5, seed=1) @ strong + 3 + torch.linspace(0, 2, sum(sizes))[:, None]
    principal = PrincipalComponents(count)
    for part in rows.split(sizes):
        principal.add(part)
    centered = (rows - rows.double().mean(0)).double()
    _, S, Vh = torch.linalg.svd(centered, full_matrices=False)
    explained = S.square() / S.square().sum()
    got = explained_together([principal])
    torch.testing.assert_close(got[:6], explained[:6], rtol=1e-3, atol=1e-6)
    cosines = (principal.components[:5].double() * Vh[:5]).sum(1).abs()
    assert (cosines > 1 - 1e-4).all()


def test_components_of_nothing():
    principal = PrincipalComponents(2)
    principal.add(torch.empty(0, 4))
    with pytest.raises(ValueError, match="batches: expected finite inputs of the layer, got none"):
        explained_together([principal])
    with pytest.raises(ValueError, match=r"batches: expected finite inputs .* got NaN or Inf"):
        principal.add(torch.full((3, 4), float("nan")))


def test_ranks_go_where_they_explain_most():
    shares = {
        "a": torch.tensor([0.9, 0.05, 0.02]),
        "b": torch.tensor([0.3, 0.2, 0.1]),
        "c": torch.tensor([0.01, 0.01]),
        "d": torch.tensor([0.3, 0.2]),
    }
    assert share_ranks(shares, 4) == {"a": 1, "b": 2, "c": 0, "d": 1}  # of two 0.2 the first
    assert share_ranks(shares, 5) == {"a": 1, "b": 2, "c": 0, "d": 2}
    assert share_ranks(shares, 100) == {"a": 3, "b": 3, "c": 2, "d": 2}
