"""Charts of a run, or of two on the same axes: as one SVG file, and as a page for a browser."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

from matplotlib.figure import Figure

from peftkern.monitor.records import name_of
from peftkern.tools import charts, pages
from peftkern.tools.monitor.run import COUNTS, Run
from peftkern.tools.monitor.summary import (
    COUNTED,
    counts,
    loss_difference,
    losses_apart,
    names,
    state,
    table,
)

POINTS = 400  # of a curve, at most: it has fewer pixels
COLUMNS, GAP = 3, 24  # of an SVG file: charts beside each other, and pixels around them
UNITS = {
    "step_seconds": ("ms/step", 1e3),
    "tokens_per_second": ("tokens/s", 1.0),
    **{name: (f"{name_of(name)} per step", 1.0) for name in COUNTS},
}
Curve = tuple[list[int], list[float]]


def figures(runs: Sequence[Run]) -> Iterator[Figure]:
    """Draw every quantity over the steps, the losses' difference, and the ranks of each run."""
    called = names(runs)
    own = dict.fromkeys(name for run in runs for name in run.values())
    memory = ("cuda_allocated_bytes", "nvml_used_bytes", "process_rss_bytes")
    for name in (*own, "step_seconds", "tokens_per_second", *memory, *COUNTS):
        curves = [run.curve(name) for run in runs]
        if any(value for _, values in curves for value in values):
            label, scale = UNITS.get(name, (name_of(name), 1.0))
            if name.endswith("_bytes"):
                label, scale = f"{label}, GB", 1e-9
            scaled = [(at, [value * scale for value in values]) for at, values in curves]
            yield _lines(label, called, scaled, from_zero=name not in own)
    if runs[1:] and loss_difference(*runs)[0]:
        label = f"{called[1]} - {called[0]}"
        yield _lines("difference of the losses", [label], [loss_difference(*runs)])
    for name, run in zip(called, runs, strict=True):
        if run.ranks:
            yield _ranks(name, run)


def html(runs: Sequence[Run]) -> str:
    """Return the page."""
    return pages.render(
        "monitor.html.j2",
        names=names(runs),
        states=[state(run) for run in runs],
        apart=losses_apart(*runs) if runs[1:] else None,
        figures=list(figures(runs)),
        rows=table(runs),
        counts={title: counts(runs, of) for of, title in COUNTED.items()},
    )


def svg(runs: Sequence[Run]) -> str:
    """Return one drawing of all charts, on white."""
    y, inner = GAP, ""
    drawn = [(charts.svg(f, "light", f"monitor-{i}"), f) for i, f in enumerate(figures(runs))]
    for first in range(0, len(drawn), COLUMNS):
        row = drawn[first : first + COLUMNS]
        for column, (text, _) in enumerate(row):
            x = GAP + column * (charts.NARROW + GAP)
            inner += text.replace("<svg ", f'<svg x="{x}" y="{y}" ', 1)
        y += GAP + round(max(figure.get_figheight() for _, figure in row) * 72)
    width = GAP + min(len(drawn), COLUMNS) * (charts.NARROW + GAP)
    return (
        f'<svg xmlns="{charts.NAMESPACE}" viewBox="0 0 {width} {y}" width="{width}" height="{y}">'
        f'<rect width="100%" height="100%" fill="#fff"/>\n{inner}</svg>\n'
    )


def _lines(label: str, called: list[str], curves: list[Curve], from_zero: bool = False) -> Figure:
    series = [
        charts.Series(name, number, *_thinned(*curve))
        for number, (name, curve) in enumerate(zip(called, curves, strict=True))
    ]
    said = {"title": label, "y_label": label, "x_label": "step"}
    return charts.lines(series, **said, markers=False, from_zero=from_zero)


def _thinned(at: list[int], values: list[float]) -> tuple[list[float], list[float]]:
    """Return the means of at most POINTS stretches of a curve; what is not finite is left out."""
    curve = [point for point in zip(at, values, strict=True) if math.isfinite(point[1])]
    size = -(-len(curve) // POINTS) or 1
    parts = [curve[i : i + size] for i in range(0, len(curve), size)]
    means = [[sum(one) / len(part) for one in zip(*part, strict=True)] for part in parts]
    return [x for x, _ in means], [y for _, y in means]


def _ranks(name: str, run: Run) -> Figure:
    """Draw the rank of each layer over the steps, layers of a kind together."""
    last = max(run.ranks[-1][0] + 1, run.points[-1][0] if run.points else 0)
    kinds = {layer: layer.rpartition(".")[2] for layer in run.ranks[-1][1]}
    order, rows = list(kinds.values()), []
    for layer in sorted(kinds, key=lambda layer: order.index(kinds[layer])):
        history = [(step, ranks.get(layer, 0)) for step, ranks in run.ranks]
        changes = history[:1] + [b for a, b in itertools.pairwise(history) if a[1] != b[1]]
        ends = [step for step, _ in changes[1:]] + [last]
        parts = [(step, end, rank) for (step, rank), end in zip(changes, ends, strict=True)]
        tip = f"{layer}: {history[0][1]} to {history[-1][1]}"
        rows.append((kinds[layer], tip, parts))
    label = f"rank of each layer, {name}"
    return charts.stretches(rows, title=label, y_label=label, x_label="step")
