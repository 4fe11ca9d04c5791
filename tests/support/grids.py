"""Grids of cases, thinned for `make test`, less for CI; `make test-long` runs all of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import settings


def thinned(*axes: Sequence[Any], diagonals: int = 1) -> list[Any]:
    """The product of the axes: one diagonal unmarked, further ones `ci`, the rest `long`.

    On a diagonal every value of every axis occurs; each further one pairs the values otherwise.
    """
    places = list(itertools.product(*(range(len(axis)) for axis in axes)))
    marks = dict.fromkeys(places, (pytest.mark.long,))
    for shift in reversed(range(diagonals)):
        for i in range(max(map(len, axes))):
            on_it = tuple((i + shift * k) % len(axis) for k, axis in enumerate(axes))
            marks[on_it] = (pytest.mark.ci,) if shift else ()
    cases = []
    for place in places:
        case = [axis[i] for axis, i in zip(axes, place, strict=True)]
        names = (getattr(value, "__name__", str(value)) for value in case)
        cases.append(pytest.param(*case, marks=marks[place], id="-".join(names)))
    return cases


def examples(share: float) -> settings:
    """A share of the examples that the profile of hypothesis draws."""
    return settings(max_examples=max(1, round(settings.default.max_examples * share)))
