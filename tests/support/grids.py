"""Grids of cases, thinned for `make test`; `make test-long` runs all of them."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from typing import Any

import pytest
from hypothesis import settings

MOST_CASES = 3  # of a test that `make test` runs whatever their parameters are


def thinned(*axes: Sequence[Any], diagonals: int = 1) -> list[Any]:
    """The product of the axes: one diagonal unmarked, further ones `more`, the rest `long`.

    On a diagonal every value of every axis occurs; each further one pairs the values otherwise.
    """
    places = list(itertools.product(*(range(len(axis)) for axis in axes)))
    marks = dict.fromkeys(places, (pytest.mark.long,))
    for shift in reversed(range(diagonals)):
        for i in range(max(map(len, axes))):
            on_it = tuple((i + shift * k) % len(axis) for k, axis in enumerate(axes))
            marks[on_it] = (pytest.mark.more,) if shift else ()
    cases = []
    for place in places:
        case = [axis[i] for axis, i in zip(axes, place, strict=True)]
        names = (getattr(value, "__name__", str(value)) for value in case)
        cases.append(pytest.param(*case, marks=marks[place], id="-".join(names)))
    return cases


def examples(share: float) -> settings:
    """A share of the examples that the profile of hypothesis draws."""
    return settings(max_examples=max(1, round(settings.default.max_examples * share)))


def axes_of(item: pytest.Item, back_ends: Collection[str]) -> dict[str, Any]:
    """What a test varies: a list of `parametrize` is one axis, a fixture another.

    Returns: {name: what tells its value here from others, for a fixture in back_ends the value}.
    """
    params, axes = item.callspec.params, {}
    names = set(params)
    for mark in item.iter_markers("parametrize"):
        listed = mark.args[0] if mark.args else mark.kwargs["argnames"]
        if isinstance(listed, str):
            listed = listed.replace(" ", "").split(",")
        axes[listed[0]] = tuple(id(params[name]) for name in listed)
        names.difference_update(listed)
    for name in sorted(names):
        axes[name] = params[name] if name in back_ends else id(params[name])
    return axes


def covering(cases: Sequence[dict[str, Any]], best: dict[str, Any]) -> set[int]:
    """Numbers of those cases that `make test` runs: every value of every axis occurs in them.

    Args: best, {axis of back ends: the one beside which all values occur; others have one case}.
    """
    for axis, name in best.items():
        main = [i for i, case in enumerate(cases) if case.get(axis) == name]
        if main:
            rest = [{k: v for k, v in cases[i].items() if k != axis} for i in main]
            last = {case[axis]: i for i, case in enumerate(cases)}
            return {main[i] for i in covering(rest, best)} | {*last.values()} - {*main}
    rows = [tuple(case.values()) for case in cases]
    axes = [list(dict.fromkeys(values)) for values in zip(*rows, strict=True)]
    diagonal = {
        tuple(axis[i % len(axis)] for axis in axes) for i in range(max(map(len, axes), default=1))
    }
    kept = {i for i, row in enumerate(rows) if row in diagonal}
    seen = {value for i in kept for value in enumerate(rows[i])}
    for i, row in enumerate(rows):  # where the product has gaps
        if not seen.issuperset(enumerate(row)):
            kept.add(i)
            seen.update(enumerate(row))
    return kept
