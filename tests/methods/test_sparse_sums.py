"""TIES, DARE and magnitude pruning against PEFT's own on dense matrices."""

from __future__ import annotations

import pytest
import torch
from peft.utils import merge_utils
from torch import Tensor

from peftkern.methods.sparse_sums import METHODS, sparse_sum

WEIGHTS = [0.7, -0.3, 1.5]


def updates() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(31, 17, generator=generator) for _ in WEIGHTS]


def summed(method: str, density: float, **more) -> Tensor:
    made = [lambda update=update: update.clone() for update in updates()]
    return sparse_sum(method, made, WEIGHTS, density, **more)


@pytest.mark.parametrize("density", [0.001, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("method", METHODS)
def test_as_peft(method, density):
    torch.manual_seed(9)
    got = summed(method, density)
    torch.manual_seed(9)  # DARE draws the same elements
    want = getattr(merge_utils, method)(updates(), torch.tensor(WEIGHTS), density)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", ["ties", "dare_ties"])
def test_signs_by_count(method):
    torch.manual_seed(9)
    got = summed(method, 0.6, signs="frequency")
    torch.manual_seed(9)
    more = {"majority_sign_method": "frequency"}
    want = getattr(merge_utils, method)(updates(), torch.tensor(WEIGHTS), 0.6, **more)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    torch.manual_seed(9)
    assert not torch.equal(got, summed(method, 0.6))


def test_all_of_a_density_of_one():
    plain = sum(w * update for w, update in zip(WEIGHTS, updates(), strict=True))
    for method in ("magnitude_prune", "dare_linear"):
        torch.testing.assert_close(summed(method, 1.0), plain, rtol=1e-6, atol=1e-6)


def test_equal_magnitudes_stay_together():
    made = [lambda: torch.tensor([[1.0, -1.0, 0.5, 2.0]])]
    assert sparse_sum("magnitude_prune", made, [1.0], 0.5).tolist() == [[1.0, -1.0, 0.0, 2.0]]


def test_random_choices_are_the_generators():
    first, again, other = (
        summed("dare_linear", 0.5, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_dare_keeps_the_sum_on_average():
    total = torch.zeros(31, 17)
    generator = torch.Generator().manual_seed(0)
    count = 2000
    for _ in range(count):
        total += summed("dare_linear", 0.5, generator=generator) / count
    plain = sum(w * update for w, update in zip(WEIGHTS, updates(), strict=True))
    # At density 1/2 the variance of each term is its square: 5 deviations of the mean.
    bound = sum((w * update) ** 2 for w, update in zip(WEIGHTS, updates(), strict=True)).sqrt()
    assert ((total - plain).abs() <= 5 / count**0.5 * bound + 1e-5).all()


@pytest.mark.parametrize(
    ("method", "density", "signs", "message"),
    [
        ("mean", 0.5, "total", "method: expected one of ties, dare_linear"),
        ("ties", 0.0, "total", r"density: expected a number in \(0, 1\], got 0.0"),
        ("ties", None, "total", r"density: expected a number in \(0, 1\], got None"),
        ("ties", 0.5, "mean", "signs: expected one of total, frequency, got 'mean'"),
    ],
)
def test_bad_arguments(method, density, signs, message):
    with pytest.raises(ValueError, match=message):
        summed(method, density, signs=signs)
