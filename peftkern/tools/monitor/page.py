"""Charts of a run, or of two on the same axes: as one SVG file, and as a page for a browser."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

from matplotlib.figure import Figure

from peftkern.monitor.records import name_of
from peftkern.tools import charts, pages
from peftkern.tools.monitor.run import COUNTS, MOVED, Run
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
DECADES = 3  # of importance, below the largest, that have a color
MARKED = 24  # masks that have a mark each
TOLD = 6  # times that triplets of a layer were moved, in its tip
UNITS = {
    "step_seconds": ("ms/step", 1e3),
    "tokens_per_second": ("tokens/s", 1.0),
    **{name: (f"{name_of(name)} per step", 1.0) for name in COUNTS},
}
Curve = tuple[list[int], list[float]]


def figures(runs: Sequence[Run]) -> Iterator[Figure]:
    """Draw every quantity over the steps, the losses' difference, and AdaLoRA's of each run."""
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
        if any(mask.importance for _, mask in run.masks):
            yield _importance(name, run)
        if any(mask.pruned or mask.revived for _, mask in run.masks):
            yield _moves(name, run)


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
    rows = []
    for kind, layer in _by_kind(run):
        history = [(step, ranks.get(layer, 0)) for step, ranks in run.ranks]
        changes = history[:1] + [b for a, b in itertools.pairwise(history) if a[1] != b[1]]
        tip = f"{layer}: {history[0][1]} to {history[-1][1]}{_moves_of(layer, run)}"
        rows.append((kind, tip, _parts(changes, run)))
    label = f"rank of each layer, {name}"
    return charts.stretches(rows, title=label, y_label=label, x_label="step")


def _importance(name: str, run: Run) -> Figure:
    """Draw the importance of each layer in each mask: it is compared with that of other layers.

    A score is a product of two averages of |weight * gradient|; these fall by decades while a model
    learns, and a mask asks only which is larger. So colors are of the ratio to the mask's largest.
    """
    masks = [(step, mask.importance) for step, mask in run.masks if mask.importance]
    tops = [max(filter(math.isfinite, found.values()), default=0.0) for _, found in masks]
    rows = []
    for kind, layer in _by_kind(run):
        shares = [(run.ranks[0][0], 0.0)] if run.ranks[0][0] < masks[0][0] else []  # none yet
        for (step, found), top in zip(masks, tops, strict=True):
            share = found.get(layer, 0.0) / top if top > 0 else 0.0
            share = share if share > 0 else 0.0  # and of what is not finite
            shares.append((step, max(1 + math.log10(share) / DECADES, 0.0) if share else 0.0))
        last = masks[-1][1].get(layer, 0.0)
        rows.append((kind, f"{layer}: {last:.3g} in the last mask", _parts(shares, run)))
    label = f"importance of each layer, {name}"
    said = {"title": label, "y_label": label, "x_label": "step"}
    return charts.stretches(rows, **said, ends=(f"1e-{DECADES}", "max"))


def _moves(name: str, run: Run) -> Figure:
    """Draw how many triplets each mask pruned and how many it let revive."""
    drawn = [(at, m) for at, m in run.masks if m.importance or m.pruned or m.revived]
    at, series = [step for step, _ in drawn], []
    for number, kind in enumerate(MOVED):
        counts = [float(sum(map(len, getattr(mask, kind).values()))) for _, mask in drawn]
        series.append(charts.Series(kind, number, at, counts))
    label = f"triplets moved by a mask, {name}"
    said = {"title": label, "y_label": label, "x_label": "step"}
    return charts.lines(series, **said, markers=len(at) <= MARKED, from_zero=True)


def _by_kind(run: Run) -> list[tuple[str, str]]:
    """Return (kind, layer) of all layers, those of a kind, the last part of the name, together."""
    kinds = {layer: layer.rpartition(".")[2] for layer in run.ranks[-1][1]}
    order = list(kinds.values())
    return sorted(((kind, layer) for layer, kind in kinds.items()), key=lambda p: order.index(p[0]))


def _parts(changes: list[tuple[int, float]], run: Run) -> list[tuple[int, int, float]]:
    """Return stretches from each change to the next, the last one up to the end of the run."""
    end = max(run.ranks[-1][0] + 1, run.points[-1][0] if run.points else 0)
    ends = [step for step, _ in changes[1:]] + [end]
    return [(step, end, value) for (step, value), end in zip(changes, ends, strict=True)]


def _moves_of(layer: str, run: Run) -> str:
    """Say which triplets of a layer were pruned and revived when, the last few times."""
    found = [
        f"step {step}: {kind} {', '.join(map(str, triplets))}"
        for step, mask in run.masks
        for kind in MOVED
        if (triplets := getattr(mask, kind).get(layer))
    ]
    more = [f"{len(found) - TOLD} times before"] if len(found) > TOLD else []
    return "".join(f"; {one}" for one in [*more, *found[-TOLD:]])
