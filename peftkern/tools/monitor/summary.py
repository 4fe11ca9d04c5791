"""Summaries of runs: as JSON, and two side by side as the rows of a table."""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from peftkern.monitor.records import name_of, value_text
from peftkern.tools.monitor.run import COUNTS, MOVED, Mask, Run

MEDIANS = ("step_seconds", "tokens_per_second")
COUNTED = {"calls": "Calls of kernels and of plain torch", "fallback_reasons": "Fallbacks"}
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
    """Summarize a run, for JSON: what was never measured is null or missing."""
    start = run.starts[-1] if run.starts else {}
    return {
        "file": str(run.path),
        "finished": run.finished,
        "starts": len(run.starts),
        **{key: start.get(key) for key in ("device", "device_name", "torch")},
        "last_step": run.points[-1][0] if run.points else 0,
        **{key: run.totals[key] for key in ("steps", "tokens", "seconds", *COUNTS)},
        **{key: _spread(_finite(run, key)) for key in MEDIANS},
        "values": {name: _ends(_finite(run, name)) for name in run.values()},
        "not_finite": {n: len(run.curve(n)[1]) - len(_finite(run, n)) for n in run.values()},
        "peaks": {name: int(max(_finite(run, name))) for name in PEAKS if _finite(run, name)},
        **{key: dict(getattr(run, key).most_common()) for key in COUNTED},
        "ranks": run.ranks[-1][1] if run.ranks else None,
        "masks": [_mask(step, mask) for step, mask in run.masks],
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
        written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(run.changed))
        words.append(f"not finished, last written {written}")
    words += [f"{len(run.starts)} starts"] if len(run.starts) > 1 else []
    lines = "line" if run.ignored == 1 else "lines"
    words += [f"{run.ignored} unfinished {lines} ignored"] if run.ignored else []
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


def counts(runs: Sequence[Run], of: str) -> list[list[str]]:
    """Return rows of what was counted, one of COUNTED, and each run's counts."""
    tallies = [(getattr(run, of), max(run.totals["steps"], 1)) for run in runs]
    return [
        [name, *(f"{one[name]:,} ({one[name] / steps:.3g} per step)" for one, steps in tallies)]
        for name, _ in sum((one for one, _ in tallies), Counter()).most_common()
    ]


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


def _mask(step: int, mask: Mask) -> dict[str, Any]:
    """Return the numbers of a mask; which triplets it moved is in the file."""
    known = [one for one in mask.importance.values() if math.isfinite(one)]
    moved = {kind: sum(map(len, getattr(mask, kind).values())) for kind in MOVED}
    mean = statistics.fmean(known) if known else None
    return {"step": step, "kept": mask.kept, "budget": mask.budget, "importance": mean, **moved}


def _quantities(facts: dict[str, Any]) -> dict[str, tuple[float, str]]:
    """Return the number of each quantity that is there, to be divided, and a text of it."""
    found = {name: (facts[name], f"{facts[name]:,}") for name in ("steps", "tokens")}
    found["seconds"] = (facts["seconds"], f"{facts['seconds']:,.1f} s")
    for name in MEDIANS:
        if facts[name] is not None and facts[name]["median"]:
            unit = 1e3 if name == "step_seconds" else 1
            low, median, high = (f"{value * unit:,.4g}" for value in facts[name].values())
            found[name] = (facts[name]["median"], f"{median} [{low} - {high}]")
    for name, ends in facts["values"].items():
        if ends is not None:
            texts = (value_text(name, value) for value in ends.values())
            found[name] = (ends["last"], " to ".join(texts))
        if odd := facts["not_finite"][name]:
            found[f"{name}, not finite"] = (math.nan, f"{odd:,} records")
    found |= {name: (peak, value_text(name, peak)) for name, peak in facts["peaks"].items()}
    return found | {name: (facts[name], f"{facts[name]:,}") for name in COUNTS}


def _ratio(name: str, one: dict[str, tuple], other: dict[str, tuple]) -> float | None:
    if name not in one or name not in other or not one[name][0]:
        return None
    ratio = other[name][0] / one[name][0]
    return ratio if math.isfinite(ratio) else None


def _finite(run: Run, name: str) -> list[float]:
    return [value for value in run.curve(name)[1] if math.isfinite(value)]


def _ends(values: list[float]) -> dict[str, float] | None:
    return {"first": values[0], "last": values[-1]} if values else None


def _spread(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    cuts = statistics.quantiles(values, n=10, method="inclusive") if values[1:] else values * 9
    return {"p20": cuts[1], "median": statistics.median(values), "p80": cuts[7]}
