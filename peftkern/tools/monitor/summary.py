"""Summaries of runs: as JSON, and two side by side as the rows of a table."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

from peftkern.monitor.records import bytes_text, ms_text, name_of
from peftkern.tools.monitor.run import COUNTS, Run

MEDIANS = ("step_seconds", "tokens_per_second")
PEAKS = (
    *("cuda_peak_allocated_bytes", "cuda_peak_reserved_bytes", "nvml_used_bytes"),
    "process_peak_rss_bytes",
)
TITLES = {
    "seconds": "time",
    "step_seconds": "ms/step [p20 - p80]",
    "tokens_per_second": "tokens/s [p20 - p80]",
    "kernel_calls": "calls of kernels",
    "reference_calls": "calls of plain torch",
}


def summary(run: Run) -> dict[str, Any]:
    """Summarize a run, for JSON: what was never measured is null."""
    start = run.starts[-1] if run.starts else {}
    memory = {name for _, values in run.points for name in values if name in PEAKS}
    return {
        "file": str(run.path),
        "finished": run.finished,
        "starts": len(run.starts),
        **{key: start.get(key) for key in ("device", "device_name", "torch")},
        "last_step": run.points[-1][0] if run.points else 0,
        **{key: run.totals[key] for key in ("steps", "tokens", "seconds")},
        **{key: _spread(run.curve(key)[1]) for key in MEDIANS},
        "values": {name: _course(run.curve(name)[1]) for name in run.values()},
        "peaks": {name: int(max(run.curve(name)[1])) for name in PEAKS if name in memory},
        **{key: run.totals[key] for key in COUNTS},
        "calls": dict(run.calls.most_common()),
        "fallback_reasons": dict(run.fallback_reasons.most_common()),
        "ranks": run.ranks[-1][1] if run.ranks else None,
        "ignored_lines": run.ignored,
    }


def names(runs: Sequence[Run]) -> list[str]:
    """Return the files' names, with their folders if they are the same."""
    short = [run.path.name for run in runs]
    return short if len({*short}) == len(runs) else [str(run.path) for run in runs]


def state(run: Run) -> str:
    """Say in one line how far a run is, and on what device."""
    words = [f"at step {run.points[-1][0]:,}" if run.points else "no steps yet"]
    if run.finished:
        words.insert(0, "finished")
    else:
        age = max(time.time() - run.changed, 0)
        text = f"{age:.0f} s" if age < 120 else f"{age / 60:,.0f} min"
        words.append(f"not finished, last written {text} ago")
    words += [f"{len(run.starts)} starts"] if len(run.starts) > 1 else []
    words += [f"{run.ignored} unfinished lines ignored"] if run.ignored else []
    words += [start["device_name"] for start in run.starts[-1:] if start.get("device_name")]
    return ", ".join(map(str, words))


def table(runs: Sequence[Run]) -> list[list[str]]:
    """Return rows of a name and of what each run has; of two runs also the second's ratio."""
    columns = [_quantities(summary(run)) for run in runs]
    rows = []
    for name in {name: None for column in columns for name in column}:
        cells = [column[name][1] if name in column else "" for column in columns]
        if len(columns) > 1:
            ratio = _ratio(name, *columns)
            cells.append("" if ratio is None else f"{ratio:.3g}x")
        rows.append([TITLES.get(name, name_of(name)), *cells])
    return rows


def compare(one: Run, other: Run) -> dict[str, Any]:
    """Compare two runs, for JSON: ratios other / one, and the distance of their losses."""
    columns = [_quantities(summary(run)) for run in (one, other)]
    at, apart = loss_difference(one, other)
    sizes = [abs(value) for value in apart]
    loss = at and {
        "steps": len(at),
        "mean": statistics.fmean(sizes),
        "max": max(sizes),
        "max_at": at[sizes.index(max(sizes))],
        "last": apart[-1],
    }
    return {"ratios": {name: _ratio(name, *columns) for name in columns[0]}, "loss": loss or None}


def losses_apart(one: Run, other: Run) -> str:
    """Say in one line how far two runs' losses are from each other."""
    loss = compare(one, other)["loss"]
    if loss is None:
        return "no step at which both have a loss"
    return (
        f"losses {loss['mean']:.2g} apart on average over {loss['steps']:,} steps, at most "
        f"{loss['max']:.2g} (step {loss['max_at']:,}), at the end {loss['last']:+.2g}"
    )


def loss_difference(one: Run, other: Run) -> tuple[list[int], list[float]]:
    """Return the steps at which both runs have a finite loss, and other - one."""
    first, second = (dict(zip(*run.curve("loss"), strict=True)) for run in (one, other))
    apart = {at: second[at] - first[at] for at in first if at in second}
    apart = {at: value for at, value in apart.items() if math.isfinite(value)}
    return list(apart), list(apart.values())


def value_text(name: str, value: float) -> str:
    """Format a value of a record."""
    if name.endswith("_bytes"):
        return bytes_text(value)
    if name.endswith("seconds"):
        return ms_text(value)
    return f"{value:,.0f}" if name == "tokens_per_second" else f"{value:,.4g}"


def _quantities(facts: dict[str, Any]) -> dict[str, tuple[float, str]]:
    """Return the number of each quantity that is there, to be divided, and a text of it."""
    found = {"steps": (facts["steps"], f"{facts['steps']:,}")}
    if facts["tokens"]:
        found["tokens"] = (facts["tokens"], f"{facts['tokens']:,}")
    found["seconds"] = (facts["seconds"], f"{facts['seconds']:,.1f} s")
    for name in MEDIANS:
        if facts[name] is not None and facts[name]["median"]:
            unit = 1e3 if name == "step_seconds" else 1
            low, median, high = (f"{value * unit:,.4g}" for value in facts[name].values())
            found[name] = (facts[name]["median"], f"{median} [{low} - {high}]")
    for name, course in facts["values"].items():
        if course["last"] is not None:
            text = f"{value_text(name, course['first'])} to {value_text(name, course['last'])}"
            found[name] = (course["last"], text)
        if course["not_finite"]:
            found[f"{name}, not finite"] = (math.nan, f"{course['not_finite']:,} records")
    found |= {name: (peak, bytes_text(peak)) for name, peak in facts["peaks"].items()}
    return found | {name: (facts[name], f"{facts[name]:,}") for name in COUNTS}


def _ratio(name: str, one: dict[str, tuple], other: dict[str, tuple]) -> float | None:
    if name not in one or name not in other or not one[name][0]:
        return None
    ratio = other[name][0] / one[name][0]
    return ratio if math.isfinite(ratio) else None


def _spread(values: list[float]) -> dict[str, float] | None:
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return None
    cuts = statistics.quantiles(values, n=10, method="inclusive") if values[1:] else values * 9
    return {"p20": cuts[1], "median": statistics.median(values), "p80": cuts[7]}


def _course(values: list[float]) -> dict[str, float | None]:
    finite = [value for value in values if math.isfinite(value)]
    ends = {"first": finite[0], "last": finite[-1], "lowest": min(finite)} if finite else {}
    return {"first": None, "last": None, "lowest": None, **ends} | {
        "not_finite": len(values) - len(finite)
    }
