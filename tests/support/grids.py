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
        tuple((i + shift * k) % len(axis) for k, axis in enumerate(axes))
        for shift in range(diagonals)
        for i in range(max(map(len, axes)))
    }
    cases = []
    for places in itertools.product(*(range(len(axis)) for axis in axes)):
        case = [axis[place] for axis, place in zip(axes, places, strict=True)]
        marks = () if places in kept else (pytest.mark.long,)
        names = (getattr(value, "__name__", str(value)) for value in case)
        cases.append(pytest.param(*case, marks=marks, id="-".join(names)))
    return cases


def examples(share: float) -> settings:
    """A share of the examples that the profile of hypothesis draws."""
    return settings(max_examples=max(1, round(settings.default.max_examples * share)))
