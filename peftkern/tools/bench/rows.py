"""Rows of a record: what a run found out about each implementation, and whether it is right."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

import peftkern
from peftkern.backends.tolerances import FLOOR_MAX, FLOOR_RMS, PEER_WRONG, RATIO
from peftkern.tools.bench.cases import ITEMSIZE
from peftkern.tools.bench.record import FORMAT, OURS, Case, Provider, Record, Target
from peftkern.tools.bench.timer import Timing


@dataclass
class Row:
    """State of one provider in one case."""

    error_rms: float | None = None
    error_max: float | None = None
    wrong: str | None = None
    failed: str | None = None
    note: str | None = None
    peak_bytes: int | None = None
    planned_bytes: int | None = None
    held_bytes: int | None = None
    kernels: list[str] | None = None
    graph: float | None = None  # seconds of a call in a replayed graph
    no_graph: str | None = None
    samples: list[float] = field(default_factory=list)
    unfinished: bool = False  # the budget ended before it had enough calls
    at_least: float | None = None  # seconds after which its first call was stopped

    @property
    def good(self) -> bool:
        return self.wrong is None and self.failed is None and self.at_least is None

    def judge(
        self,
        dtype: torch.dtype,
        eager: tuple[float, float] | None,
        peer_wrong: float = PEER_WRONG,
    ) -> None:
        """Mark a wrong result: ours by the rule of the tests, from the error (rms, max) of `eager`
        torch in the same dtype; a peer, with none to compare, by the wider `peer_wrong`."""
        rms, top = peer_wrong, math.inf
        if eager is not None:
            rms, top = RATIO * eager[0] + FLOOR_RMS[dtype], RATIO * eager[1] + FLOOR_MAX[dtype]
        if not (self.error_rms <= rms and self.error_max <= top):  # NaN is wrong too
            self.wrong = f"error {self.error_rms:.2g} rms, {self.error_max:.2g} max; bound"
            self.wrong += f" {rms:.2g} rms" + (f", {top:.2g} max" if eager is not None else "")

    def record(
        self, label: str, work: tuple[int, int], floor: float, tokens: int | None
    ) -> Provider:
        timing = Timing(tuple(self.samples)) if self.good and self.samples else None
        median = timing.median if timing else None
        times = dict.fromkeys(("median_ms", "p20_ms", "p80_ms")) | {"samples_ms": []}
        return {
            "label": label,
            **(timing.in_milliseconds() if timing else times),
            "error_rms": _finite(self.error_rms),
            "error_max": _finite(self.error_max),
            "wrong": self.wrong,
            "failed": self.failed,
            "note": self.note,
            "peak_bytes": self.peak_bytes if self.good else None,
            "gb_s": work[0] / median / 1e9 if timing and work[0] else None,
            "tflop_s": work[1] / median / 1e12 if timing and work[1] else None,
            "share_of_roof": floor / median if timing and floor else None,
            "planned_bytes": self.planned_bytes,
            "held_bytes": self.held_bytes if self.good else None,
            "tokens_s": tokens / median if timing and tokens else None,
            "launches": None if self.kernels is None else len(self.kernels),
            "kernels": self.kernels,
            "graph_ms": None if self.graph is None else self.graph * 1e3,
            "no_graph": self.no_graph,
            "at_least_ms": None if self.at_least is None else self.at_least * 1e3,
        }


def _finite(value: float | None) -> float | None:
    """Replace NaN, which JSON lacks, by None; `wrong` reports it."""
    return value if value is None or math.isfinite(value) else None


def product_rate(dtype: str, roof: Mapping[str, float]) -> float | None:
    """Return the FLOPs per second of a case's products: in 16 bits float32's where those are
    faster, for the numbers can be widened."""
    names = (dtype, "float32") if ITEMSIZE.get(dtype) == 2 else (dtype,)
    return max((roof[name] for name in names if name in roof), default=None)


def floor_seconds(work: tuple[int, int], dtype: str, roof: Mapping[str, float]) -> float:
    """Return the least time of a call: of its bytes at the copy's rate, and of its products; 0 for
    work that was not counted."""
    rates = roof.get("copy"), product_rate(dtype, roof)
    return max(amount / rate if amount else 0.0 for amount, rate in zip(work, rates, strict=True))


def case_record(
    facts: dict,
    rows: Mapping[str, Row],
    *,
    work: tuple[int, int],
    roof: Mapping[str, float],
    labels: Mapping[str, str],
    against: Iterable[str] = (),
    targets: Iterable[Target] = (),
    tokens: int | None = None,
    said: Iterable[str] = (),
    command: str = "",
) -> Case:
    """Make a case's record of its facts (name, op, shape, M, N, K, r, dtype, mode) and its rows.

    `against`: the peers that may stand for the case, the most relevant first; then all others;
    last those of whose time only a bound is known.
    """
    floor = floor_seconds(work, facts["dtype"], roof)
    order = dict.fromkeys([*against, *rows])
    peers = [name for name in order if name in rows and name != OURS]
    first = [name for name in peers if rows[name].good]
    first += [name for name in peers if rows[name].at_least is not None]
    return {
        **facts,
        "bytes": work[0],
        "flops": work[1],
        "floor_ms": floor * 1e3,
        "against": first[0] if first else None,
        "command": command,
        "tokens": tokens,
        "said": list(said),
        "targets": list(targets),
        "served": {},
        "fell_back": {},
        "providers": {
            name: row.record(labels[name], work, floor, tokens) for name, row in rows.items()
        },
    }


def new_record(environment: dict, roof: dict, **more: object) -> Record:
    """Make the record of a run of what it found; the rest is empty."""
    return {
        "format": FORMAT,
        "bench": None,
        "command": "",
        "options": {},
        "environment": {"variables": {}, **environment},
        "roof": roof,
        "cases": [],
        "failed": {},
        "answers": [],
        "not_reached": [],
        "not_installed": {},
        **more,
    }


def calls_of_ours() -> dict[str, dict[str, int]]:
    """Return the fields of a case that say who took our calls since `peftkern.reset_stats()`."""
    stats = peftkern.stats()
    return {
        "served": {f"{op} on {name}": n for (op, name), n in stats.calls.items()},
        "fell_back": {f"{op}: {why}": n for (op, why), n in stats.fallbacks.items()},
    }


def ratio(case: Case, peer: str, key: str = "median_ms") -> float | None:
    """Return the peer's time over ours; None where one of them has none."""
    ours, theirs = (case["providers"].get(name, {}).get(key) for name in (OURS, peer))
    return theirs / ours if ours and theirs else None


def ratio_at_least(case: Case, peer: str) -> float | None:
    """Return a lower bound of the ratio to a peer whose first call was stopped; None otherwise."""
    ours, theirs = (case["providers"].get(name, {}) for name in (OURS, peer))
    bound, median = theirs.get("at_least_ms"), ours.get("median_ms")
    return bound / median if bound and median else None


def target_mark(target: Target) -> str:
    """Return the mark of a target: met, missed, or not known from a lower bound."""
    return {True: "✓", False: "✗", None: "?"}[target["met"]]


def within_noise(ours: Provider, theirs: Provider) -> bool:
    """Return whether the intervals from the 20th to the 80th percentile overlap: then a difference
    is none."""
    return ours["p20_ms"] <= theirs["p80_ms"] and theirs["p20_ms"] <= ours["p80_ms"]
