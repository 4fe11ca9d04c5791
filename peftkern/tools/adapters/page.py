"""Inspection of an adapter as a page: maps of layer x module, spectra, every update."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from statistics import fmean, median

from matplotlib.figure import Figure

from peftkern.tools import charts, pages
from peftkern.tools.adapters.inspect import Inspection, Row, Spectrum, labels, rows
from peftkern.tools.adapters.terminal import COLUMNS, cells, heading, remarks

WIDTHS = {"wide": charts.WIDE, "narrow": charts.NARROW}
_POINTS = 400  # of a curve, at most
_LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


def html(found: Inspection) -> str:
    """Return the page."""
    listed = rows(found.spectra, lambda one: one.key)
    return pages.render(
        "adapter.html.j2",
        source=found.adapter.source,
        heading=list(heading(found)),
        remarks=list(remarks(found)),
        maps=maps(found.spectra),
        spectra=list(spectra(found.spectra)),
        columns=COLUMNS,
        rows=[(row.name, zip(cells(row), _order(row), strict=True)) for row in listed],
    )


def _order(row: Row) -> list[float]:
    """Return what the table is sorted by, column by column."""
    m, n = row.sizes[0]
    ranges = row.rank[1], row.true_rank[1], row.scaling[1]
    return [m * n, *ranges, row.norm, row.share, row.stable_rank, row.effective_rank]


def maps(found: Sequence[Spectrum]) -> list[dict[str, Figure]]:
    """Draw the norm and the effective rank of each module of each layer; [] without layers.

    Of what a layer has more than once, experts for one, the root mean square of the norms, and the
    median of the ranks.
    """
    kinds = labels(one.key for one in found)
    places: dict[str, dict[int, list[Spectrum]]] = {}
    for one in found:
        if (layer := _LAYER.search(one.key)) is not None:
            places.setdefault(kinds[one.key], {}).setdefault(int(layer[1]), []).append(one)
    if not places:
        return []
    norms = "|D|, the norm of each update", lambda parts: fmean(p.energy for p in parts) ** 0.5
    ranks = "effective rank", lambda parts: median(p.effective_rank for p in parts)
    return [
        {name: _map(places, title, value, width) for name, width in WIDTHS.items()}
        for title, value in (norms, ranks)
    ]


def _map(places, title: str, value, width: int) -> Figure:
    drawn = []
    for kind, layers in places.items():
        values = {layer: value(parts) for layer, parts in sorted(layers.items())}
        values = {layer: float(f"{one:.3g}") for layer, one in values.items() if one == one}
        told = ", ".join(f"{layer}: {one:g}" for layer, one in values.items())
        parts = [(layer, layer + 1, one) for layer, one in values.items()]
        drawn.append((kind, f"{kind}: {told}", parts))
    return charts.stretches(drawn, title=title, y_label=title, x_label="layer", width=width)


def spectra(found: Sequence[Spectrum]) -> Iterator[tuple[str, Figure]]:
    """Draw the singular values of each kind of module: the median over its updates, and between
    which they lie."""
    kinds = labels(one.key for one in found)
    groups: dict[str, list[Spectrum]] = {}
    for one in found:
        groups.setdefault(kinds[one.key], []).append(one)
    for kind, parts in groups.items():
        columns = list(_columns(parts))
        curves = {"median": median, "largest": max, "smallest": min}
        series = []
        for number, (name, of) in enumerate(curves.items()):
            points = [(at, of(values)) for at, values in columns]
            points = [(at, value) for at, value in points if value > 0]
            if points and (not number or len(parts) > 1):
                series.append(charts.Series(name, number, *zip(*points, strict=True)))
        if series:
            said = {"title": f"singular values of {kind}", "x_label": "index", "log_y": True}
            yield kind, charts.lines(series, y_label="singular value", markers=False, **said)


def _columns(parts: Sequence[Spectrum]) -> Iterator[tuple[int, list[float]]]:
    """Yield the i-th singular values of all that have so many, for at most _POINTS i."""
    longest = max(len(one.sigma) for one in parts)
    for index in range(0, longest, -(-longest // _POINTS)):
        values = [one.sigma[index] for one in parts if index < len(one.sigma)]
        yield index + 1, [value for value in values if value == value] or [0.0]
