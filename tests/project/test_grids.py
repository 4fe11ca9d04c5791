"""What `make test` runs of a test's cases has every value, and the best back end with each."""

from __future__ import annotations

import itertools

from grids import covering, thinned


def cases_of(**axes: list) -> list[dict]:
    return [dict(zip(axes, row, strict=True)) for row in itertools.product(*axes.values())]


def test_every_value_occurs_in_as_few_cases_as_the_longest_axis_has():
    cases = cases_of(a=[0, 1, 2, 3], b=[0, 1], c=[0, 1, 2])
    kept = [cases[i] for i in covering(cases, {})]
    assert len(kept) == 4
    for axis, values in (("a", 4), ("b", 2), ("c", 3)):
        assert len({case[axis] for case in kept}) == values
    gaps = [case for case in cases if case["a"] == 0 or case["c"] == 0]  # without the diagonal
    kept = [gaps[i] for i in covering(gaps, {})]
    assert {case["a"] for case in kept} == {0, 1, 2, 3} and {case["c"] for case in kept} == {
        0,
        1,
        2,
    }


def test_the_best_back_end_meets_every_value_and_others_the_last():
    cases = cases_of(backend=["cpu", "torch", "reference"], kind=[0, 1, 2, 3])
    kept = [cases[i] for i in sorted(covering(cases, {"backend": "cpu", "isa": "avx2"}))]
    assert kept[:4] == cases[:4]
    assert kept[4:] == [{"backend": name, "kind": 3} for name in ("torch", "reference")]


def test_a_list_is_kept_whole_whatever_its_names_are():
    cases = [{"isa": number} for number in range(5)]  # of parametrize("isa, dtype", ...)
    assert covering(cases, {"isa": "avx2"}) == set(range(5))


def test_one_diagonal_is_unmarked_and_further_ones_are_of_ci():
    names = {}
    for case in thinned([0, 1, 2, 3], [0, 1, 2], diagonals=2):
        names.setdefault("".join(mark.name for mark in case.marks), []).append(case.values)
    assert names[""] == [(0, 0), (1, 1), (2, 2), (3, 0)]
    assert names["more"] == [(0, 1), (1, 2), (2, 0), (3, 1)] and len(names["long"]) == 4
