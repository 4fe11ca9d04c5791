"""Charts of what differs from layer to layer: maps of layer x module, singular values."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median

from matplotlib.figure import Figure

from peftkern.tools import charts
from peftkern.tools.adapters.inspect import labels

WIDTHS = {"wide": charts.WIDE, "narrow": charts.NARROW}
_POINTS = 400  # of a curve, at most
_LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


def layer_map(
    values: Sequence[tuple[str, float]],
    title: str,
    combine: Callable[[list[float]], float] = median,
) -> dict[str, Figure] | None:
    """Draw a value of each module of each layer, in both widths of a page; None without layers.

    Args: values, (name of the module, value); combine, what is shown of values of one place.
    """
    kinds = labels(name for name, _ in values)
    places: dict[str, dict[int, list[float]]] = {}
    for name, value in values:
        if (layer := _LAYER.search(name)) is not None:
            places.setdefault(kinds[name], {}).setdefault(int(layer[1]), []).append(value)
    if not places:
        return None
    return {name: _map(places, title, combine, width) for name, width in WIDTHS.items()}


def _map(
    places: Mapping[str, Mapping[int, list[float]]],
    title: str,
    combine: Callable[[list[float]], float],
    width: int,
) -> Figure:
    drawn = []
    for kind, layers in places.items():
        values = {layer: combine(parts) for layer, parts in sorted(layers.items())}
        values = {layer: float(f"{one:.3g}") for layer, one in values.items() if one == one}
        told = ", ".join(f"{layer}: {one:g}" for layer, one in values.items())
        parts = [(layer - 0.5, layer + 0.5, one) for layer, one in values.items()]
        drawn.append((kind, f"{kind}: {told}", parts))
    return charts.stretches(drawn, title=title, y_label=title, x_label="layer", width=width)


def spectra(found: Sequence[tuple[str, Sequence[float]]]) -> Iterator[tuple[str, Figure]]:
    """Draw the singular values of each kind of module: the median over its layers, and between
    which they lie.

    Args: found, (name of the module, its singular values, descending).
    """
    kinds = labels(name for name, _ in found)
    groups: dict[str, list[Sequence[float]]] = {}
    for name, sigma in found:
        groups.setdefault(kinds[name], []).append(sigma)
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


def _columns(parts: Sequence[Sequence[float]]) -> Iterator[tuple[int, list[float]]]:
    """Yield the i-th singular values of all that have so many, for at most _POINTS i."""
    longest = max(len(sigma) for sigma in parts)
    for index in range(0, longest, max(1, -(-longest // _POINTS))):
        values = [sigma[index] for sigma in parts if index < len(sigma)]
        yield index + 1, [value for value in values if value == value] or [0.0]
