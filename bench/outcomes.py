"""Outcomes of a bench script: what was measured of each variant, as a record and as a table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from peftkern.tools.bench.record import OURS
from peftkern.tools.bench.timer import Timing, number

MOST_SAMPLES = 200  # in a record; medians and percentiles are of all


@dataclass
class Row:
    """Result of one variant."""

    rms: float | None = None
    max: float | None = None
    wrong: str | None = None
    timing: Timing | None = None
    graph: Timing | None = None
    no_graph: str | None = None
    peak_bytes: int | None = None
    planned_bytes: int | None = None
    tokens: int | None = None
    kernels: list[str] | None = None
    not_measured: str | None = None  # why launches or peak memory are missing

    def record(self) -> dict:
        record = {"error_rms": self.rms, "error_max": self.max, "wrong": self.wrong}
        if self.timing is not None:
            record |= in_milliseconds(self.timing)
        if self.graph is not None:
            record["graph"] = in_milliseconds(self.graph)
        more = {
            "tokens_s": self.tokens_s,
            "no_graph": self.no_graph,
            "not_measured": self.not_measured,
            "peak_bytes": self.peak_bytes,
            "planned_bytes": self.planned_bytes,
            "kernels": self.kernels,
            "launches": None if self.kernels is None else len(self.kernels),
        }
        return record | {key: value for key, value in more.items() if value is not None}

    @property
    def tokens_s(self) -> float | None:
        return self.tokens / self.timing.median if self.tokens and self.timing else None


def in_milliseconds(timing: Timing) -> dict:
    """Record a timing with at most MOST_SAMPLES samples, spread evenly over the run."""
    stride = -(-len(timing.samples) // MOST_SAMPLES)
    return {
        "median_ms": timing.median * 1e3,
        "p20_ms": timing.quantile(0.2) * 1e3,
        "p80_ms": timing.quantile(0.8) * 1e3,
        "samples_ms": [round(s * 1e3, 5) for s in timing.samples[::stride]],
    }


@dataclass
class Outcome:
    """Results of all variants of a case; `spec` is its `suite.Spec`."""

    spec: Any
    case: dict
    rows: dict[str, Row] = field(default_factory=dict)

    def ratio(self, peer: str, kind: str = "timing") -> float | None:
        ours, theirs = (getattr(self.rows[name], kind) for name in (OURS, peer))
        return theirs.median / ours.median if ours and theirs else None

    @property
    def share_of_floor(self) -> float | None:
        ours = self.rows[OURS].timing
        return self.case["floor_ms"] / 1e3 / ours.median if ours else None

    def record(self) -> dict:
        targets = [
            {
                "peer": target.peer,
                "at_least": target.at_least,
                "measured": self.ratio(target.peer),
                "met": (self.ratio(target.peer) or 0.0) >= target.at_least,
            }
            for target in self.spec.targets
        ]
        for target in targets:
            if (graph := self.ratio(target["peer"], "graph")) is not None:
                target["in_graph"] = graph
        most, kernels = self.spec.most_launches, self.rows[OURS].kernels
        if most is not None and kernels is not None:
            met = len(kernels) <= most
            targets.append(
                {"peer": None, "launches_at_most": most, "measured": len(kernels), "met": met}
            )
        rows = {name: row.record() for name, row in self.rows.items()}
        return {
            "name": self.spec.name,
            **self.case,
            "share_of_floor": self.share_of_floor,
            "targets": targets,
            "variants": rows,
        }


def table(outcomes: Iterable[Outcome], title: str, gpu: dict | None) -> Table:
    """Build a line per peer; on a GPU also the ratio of replayed graphs and kernel launches."""
    grid = Table(title=title, title_justify="left")
    grid.add_column("case")
    for name in ("peftkern", "of floor"):
        grid.add_column(name, justify="right")
    grid.add_column("peer")
    for name in ("its time", "ratio", "target", "", "error (ours / its)"):
        grid.add_column(name, justify="right")
    for name in ("in a graph", "launches") if gpu else ():
        grid.add_column(name, justify="right")
    for outcome in outcomes:
        ours, (_, *peers) = outcome.rows[OURS], outcome.rows
        targets = {target.peer: target.at_least for target in outcome.spec.targets}
        share = outcome.share_of_floor
        head = [
            outcome.spec.short_name,
            str(ours.timing) if ours.timing else f"[red]WRONG[/]: {ours.wrong}",
            f"{share:.0%}" if share else "",
        ]
        for peer in peers:
            theirs, ratio, least = outcome.rows[peer], outcome.ratio(peer), targets.get(peer)
            mark = ""
            if least is not None:
                met = ratio is not None and ratio >= least
                mark = "[green]✓[/]" if met else "[red]✗[/]"
            both = ours.rms is not None and theirs.rms is not None
            cells = [
                peer,
                f"{number(theirs.timing.median * 1e3)} ms" if theirs.timing else "WRONG",
                f"{ratio:.2f}x" if ratio else "",
                f"{least:.3g}x" if least else "",
                mark,
                f"{ours.rms:.1e} / {theirs.rms:.1e}" if both else "",
            ]
            if gpu:
                replayed = outcome.ratio(peer, "graph")
                counts = [len(row.kernels) for row in (ours, theirs) if row.kernels is not None]
                cells += [f"{replayed:.2f}x" if replayed else "", " / ".join(map(str, counts))]
            grid.add_row(*head, *cells)
            head = ["", "", ""]
        grid.add_section()
    return grid


def answer(facts: dict) -> str:
    """Format the notes of a `suite.Question` in a line: its own text, or whether something fits,
    measured beside planned."""
    fits, stopped = facts.get("fits"), facts.get("stopped")
    said = facts.get("said") or {True: "fits", False: "does not fit", None: "no answer"}[fits]
    sizes = [
        f"{label} {facts[key] / 1e9:.2f} GB"
        for label, key in (("peak", "peak_bytes"), ("planned", "planned_bytes"))
        if key in facts
    ]
    limit = f" into {facts['cap_bytes'] / 1e9:.0f} GB" if "cap_bytes" in facts else ""
    return "; ".join([f"{facts['name']}: {said}{limit}", *sizes, *([stopped] if stopped else [])])
