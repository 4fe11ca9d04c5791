"""Inspection of an adapter as a page: maps of layer x module, spectra, every update."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from matplotlib.figure import Figure

from peftkern.tools import layer_charts, pages
from peftkern.tools.adapters.inspect import Inspection, Row, Spectrum, rows
from peftkern.tools.adapters.terminal import COLUMNS, cells, heading, remarks


def html(found: Inspection) -> str:
    """Return the page."""
    listed = rows(found.spectra, lambda one: one.key)
    return pages.render(
        "adapter.html.j2",
        source=found.adapter.source,
        heading=list(heading(found)),
        remarks=list(remarks(found)),
        maps=maps(found.spectra),
        spectra=list(layer_charts.spectra([(one.key, one.sigma) for one in found.spectra])),
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
    energies = [(one.key, one.energy) for one in found]
    norms = layer_charts.layer_map(energies, "|D|, the norm of each update", _root_mean)
    effective = [(one.key, one.effective_rank) for one in found]
    ranks = layer_charts.layer_map(effective, "effective rank")
    return [drawn for drawn in (norms, ranks) if drawn is not None]


def _root_mean(energies: list[float]) -> float:
    return fmean(energies) ** 0.5
