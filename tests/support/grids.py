"""Grids of cases, thinned for `make test`; `make test-long` runs all of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import settings


def thinned(*axes: Sequence[Any], diagonals: int = 1) -> list[Any]:
    """The product of the axes, of which all but some diagonals are marked `long`.

    On a diagonal every value of every axis occurs; each further one pairs the values otherwise.
    """
    kept = {
        tuple(axis[(i + shift * k) % len(axis)] for k, axis in enumerate(axes))
        for shift in range(diagonals)
        for i in range(max(map(len, axes)))
    }
    long = pytest.mark.long
    return [
        case if case in kept else pytest.param(*case, marks=long)
        for case in itertools.product(*axes)
    ]


def examples(share: float) -> settings:
    """A share of the examples that the profile of hypothesis draws."""
    return settings(max_examples=max(1, round(settings.default.max_examples * share)))
