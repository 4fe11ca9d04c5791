"""Comparison of a record with an earlier one: regressions of peftkern.

The ratio to a baseline measured in the same run is compared, because it survives another machine,
load and clock; our own time only if no baseline is common to both runs and the machine is the same
one.
"""

from __future__ import annotations

from dataclasses import dataclass

from peftkern.tools.bench.record import OURS, Case, Record

SAME_MACHINE = ("cpu", "isa", "threads", "gpu")


@dataclass(frozen=True)
class Change:
    """Regression of a case. `slower`: relative growth of the ratio (or time): 0.05 is 5%."""

    case: str
    by: str  # the compared quantity, in words
    before: float
    after: float
    slower: float


def changes(old: Record, new: Record) -> tuple[list[Change], dict[str, str]]:
    """Compare the common cases; return changes, and reasons against the others of `new`."""
    earlier = {case["name"]: case for case in old["cases"]}
    same = all(old["environment"].get(k) == new["environment"].get(k) for k in SAME_MACHINE)
    found, silent = [], {}
    for case in new["cases"]:
        name = case["name"]
        if name not in earlier:
            silent[name] = "not in the earlier record"
        elif _median(case, OURS) is None or _median(earlier[name], OURS) is None:
            silent[name] = "peftkern has no time in one of the two"
        elif (change := _change(earlier[name], case, same)) is None:
            silent[name] = "no baseline in both, and another machine"
        else:
            found.append(change)
    return found, silent


def _change(old: Case, new: Case, same_machine: bool) -> Change | None:
    common = [
        name
        for name in (old["against"], new["against"], *new["providers"])
        if name and name != OURS and _median(old, name) and _median(new, name)
    ]
    if common:
        peer = common[0]
        before, after = (_median(case, peer) / _median(case, OURS) for case in (old, new))
        by = f"ratio to {new['providers'][peer]['label']}"
        return Change(new["name"], by, before, after, before / after - 1)
    if same_machine:
        before, after = _median(old, OURS), _median(new, OURS)
        return Change(new["name"], "ms on the same machine", before, after, after / before - 1)
    return None


def _median(case: Case, name: str) -> float | None:
    return case["providers"].get(name, {}).get("median_ms")
